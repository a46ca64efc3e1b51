"""Equal settings, equal loss and gradients: TRL's GRPO and JSD, Liger's chunked GRPO and its Triton
kernel's maths.

`make peers` installs the peers and runs these tests; they are skipped where those are absent.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import relative_error

from zppo_kernels import (
    PolicyLossSettings,
    jsd_loss_from_logits,
    policy_loss_from_hidden,
    token_log_probs,
)

pytestmark = [pytest.mark.slow, pytest.mark.peers]
B, L, H, V = 4, 6, 8, 50
COMMON: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 4.0}
# (their loss_type, our normalisation)
AGGREGATIONS = [("dapo", "token"), ("grpo", "sequence"), ("dr_grpo", "fixed_length")]


class Padded:
    """A padded batch as the peers take it, and the same rows packed as we take them."""

    def __init__(self, kl: bool) -> None:
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden_BLH, self.weight_VH = normal(B, L, H), normal(V, H)
        self.ids_BL = torch.randint(V, (B, L), generator=generator)
        self.mask_BL = (torch.arange(L) < torch.tensor([6, 3, 5, 1]).unsqueeze(1)).int()
        self.advantages_B = torch.tensor([1.0, -0.7, 0.4, -1.5])
        logp, _ = token_log_probs(
            self.hidden_BLH.flatten(0, 1), self.weight_VH, self.ids_BL.flatten()
        )
        self.old_BL = logp.view(B, L) + 0.5 * normal(B, L)
        self.weights_BL = (0.4 * normal(B, L)).exp()  # importance weights before truncation
        self.reference_BL = self.old_BL + 0.3 * normal(B, L) if kl else None

    def ours(
        self, settings: PolicyLossSettings, **changes: Any
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss and gradients by hidden states and head; changes: other arguments of the loss."""
        inputs = self.inputs() | changes
        hidden_TH = self.hidden_BLH.flatten(0, 1).clone().requires_grad_()
        weight_VH = self.weight_VH.clone().requires_grad_()
        loss = policy_loss_from_hidden(
            hidden_TH,
            weight_VH,
            self.ids_BL.flatten(),
            **inputs,
            settings=settings,
        ).loss
        loss.backward()
        assert hidden_TH.grad is not None and weight_VH.grad is not None
        return loss.item(), hidden_TH.grad, weight_VH.grad

    def inputs(self) -> dict[str, Any]:
        """The arguments of our loss besides hidden states, head and ids."""
        return {
            "sequence_ids_T": torch.arange(B).repeat_interleave(L),
            "advantages_S": self.advantages_B,
            "proximal_log_probs_T": self.old_BL.flatten(),
            "behaviour_log_probs_T": (self.old_BL - self.weights_BL.log()).flatten(),
            "reference_log_probs_T": None
            if self.reference_BL is None
            else self.reference_BL.flatten(),
            "mask_T": self.mask_BL.flatten(),
            "token_count": int(self.mask_BL.sum()),
            "sequence_count": B,
        }

    def leaves(self) -> list[torch.Tensor]:
        """Hidden states and head for a peer."""
        return [self.hidden_BLH.clone().requires_grad_(), self.weight_VH.clone().requires_grad_()]


def check(
    loss: torch.Tensor, leaves: list[torch.Tensor], ours: tuple[float, torch.Tensor, torch.Tensor]
) -> None:
    """A peer's loss and its gradients are ours."""
    loss.backward()
    assert ours[0] == pytest.approx(loss.item(), rel=1e-5)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert relative_error(ours[1], leaves[0].grad.flatten(0, 1)) < 1e-5
    assert relative_error(ours[2], leaves[1].grad) < 1e-5


def settings_for(normalisation: str, level: str, kl: float) -> PolicyLossSettings:
    return PolicyLossSettings(
        **COMMON,
        normalisation=normalisation,
        fixed_length=L if normalisation == "fixed_length" else None,
        ratio_level=level,
        kl_coefficient=kl,
        correction="truncate",
        correction_cap=2.0,
    )


class TrlTrainer:
    """What `GRPOTrainer._compute_loss` asks its trainer for, with log-probs from our hidden
    states."""

    def __init__(
        self, batch: Padded, leaves: list[torch.Tensor], loss_type: str, level: str, kl: float
    ) -> None:
        self.leaves, self.batch = leaves, batch
        self.loss_type, self.importance_sampling_level, self.beta = loss_type, level, kl
        self.epsilon_low, self.epsilon_high = COMMON["clip_low"], COMMON["clip_high"]
        self.args = SimpleNamespace(
            delta=COMMON["dual_clip"], use_bias_correction_kl=False, steps_per_generation=1
        )
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, **_: x,
        )
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self.use_vllm = self.vllm_importance_sampling_correction = True
        self.off_policy_mask_threshold, self.top_entropy_quantile = None, 1.0
        self.current_gradient_accumulation_steps, self.max_completion_length = 1, L
        self.aux_loss_enabled = self._entropy_bonus_enabled = False

    def _get_per_token_logps_and_entropies(
        self, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        logits_BLV = self.leaves[0] @ self.leaves[1].T
        return (
            selective_log_softmax(logits_BLV, self.batch.ids_BL),
            entropy_from_logits(logits_BLV),
            None,
        )


def trl_loss(
    batch: Padded, leaves: list[torch.Tensor], loss_type: str, level: str, kl: float, **changes: Any
) -> torch.Tensor:
    """`GRPOTrainer._compute_loss`; changes: other inputs, or arguments (`args_...`) and attributes
    (`trainer_...`) of the trainer."""
    module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    inputs = {
        "prompt_ids": batch.ids_BL[:, :1], "prompt_mask": batch.mask_BL[:, :1],
        "completion_ids": batch.ids_BL, "completion_mask": batch.mask_BL,
        "advantages": batch.advantages_B, "old_per_token_logps": batch.old_BL,
        "ref_per_token_logps": batch.reference_BL,
        "importance_sampling_ratio": batch.weights_BL.clamp(max=2.0),
        "num_items_in_batch": batch.mask_BL.sum(),
    }  # fmt: skip
    trainer = TrlTrainer(batch, leaves, loss_type, level, kl)
    for name, value in changes.items():
        if name.startswith("args_"):
            setattr(trainer.args, name.removeprefix("args_"), value)
        elif name.startswith("trainer_"):
            setattr(trainer, name.removeprefix("trainer_"), value)
        else:
            inputs[name] = value
    loss: torch.Tensor = module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


def liger_loss(
    batch: Padded, leaves: list[torch.Tensor], loss_type: str, level: str, kl: float, **changes: Any
) -> torch.Tensor:
    """Liger's chunked GRPO; changes: other arguments of its module."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    options = {
        "beta": kl, "compiled": False, "use_ref_model": kl > 0, "epsilon_low": COMMON["clip_low"],
        "epsilon_high": COMMON["clip_high"], "loss_type": loss_type, "max_completion_length": L,
        "importance_sampling_level": level, "temperature": 1.0, "delta": COMMON["dual_clip"],
    }  # fmt: skip
    old_BL = changes.pop("old_per_token_logps", batch.old_BL)
    loss: torch.Tensor = chunked.LigerFusedLinearGRPOLoss(**options | changes)(
        leaves[0], leaves[1], batch.ids_BL, batch.mask_BL, batch.advantages_B,
        ref_per_token_logps=batch.reference_BL, old_per_token_logps=old_BL,
        vllm_is_ratio=batch.weights_BL.clamp(max=2.0),
    )[0]  # fmt: skip
    return loss


PEERS = [pytest.param(trl_loss, id="TRL"), pytest.param(liger_loss, id="Liger")]


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "normalisation"), AGGREGATIONS)
@pytest.mark.parametrize("peer", PEERS)
def test_grpo_is_theirs(
    peer: Any, loss_type: str, normalisation: str, level: str, kl: float
) -> None:
    batch = Padded(kl > 0)
    leaves = batch.leaves()
    loss = peer(batch, leaves, loss_type, level, kl)
    check(loss, leaves, batch.ours(settings_for(normalisation, level, kl)))


@pytest.mark.parametrize("peer", PEERS)
def test_other_surrogates_are_theirs(peer: Any) -> None:
    """CISPO (their bound is the ratio itself, and there is none below), SAPO, LUSPO and BNPO."""
    batch = Padded(False)
    leaves = batch.leaves()
    bound = {"trainer_epsilon_high": 1.3} if peer is trl_loss else {"epsilon_high": 1.3}
    loss = peer(batch, leaves, "cispo", "token", 0.0, **bound)
    cispo = PolicyLossSettings(surrogate="cispo", clip_low=1.0, clip_high=0.3)
    check(loss, leaves, batch.ours(cispo))
    leaves = batch.leaves()
    heat = {"sapo_temperature_pos": 1.2, "sapo_temperature_neg": 2.0}
    if peer is trl_loss:
        heat = {f"args_{name}": value for name, value in heat.items()}
    loss = peer(batch, leaves, "sapo", "token", 0.0, **heat)
    sapo = PolicyLossSettings(
        surrogate="sapo", normalisation="sequence", sapo_temperature_positive=1.2,
        sapo_temperature_negative=2.0,
    )  # fmt: skip
    check(loss, leaves, batch.ours(sapo))
    leaves = batch.leaves()
    loss = peer(batch, leaves, "luspo", "sequence", 0.0)
    if peer is trl_loss:  # Liger's is over the tokens' mean length
        luspo = PolicyLossSettings(
            **COMMON, ratio_level="sequence", normalisation="fixed_length", fixed_length=1
        )
        check(loss, leaves, batch.ours(luspo))
    leaves = batch.leaves()
    loss = peer(batch, leaves, "bnpo", "token", 0.0)
    check(loss, leaves, batch.ours(PolicyLossSettings(**COMMON)))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("peer", PEERS)
def test_bias_corrected_kl_and_ratio_of_one_are_theirs(peer: Any, level: str) -> None:
    batch = Padded(True)
    chosen = PolicyLossSettings(
        **COMMON, ratio_level=level, kl_coefficient=0.1, kl_correction="importance"
    )
    flag = "args_use_bias_correction_kl" if peer is trl_loss else "use_bias_correction_kl"
    leaves = batch.leaves()
    check(peer(batch, leaves, "dapo", level, 0.1, **{flag: True}), leaves, batch.ours(chosen))
    leaves = batch.leaves()
    loss = peer(batch, leaves, "dapo", level, 0.1, **{flag: True}, old_per_token_logps=None)
    logp_T, _ = token_log_probs(
        batch.hidden_BLH.flatten(0, 1), batch.weight_VH, batch.ids_BL.flatten()
    )
    late = {
        "proximal_log_probs_T": None,
        "behaviour_log_probs_T": logp_T - batch.weights_BL.log().flatten(),
    }
    check(loss, leaves, batch.ours(chosen, **late))


def test_entropy_bonus_and_advantages_per_token_are_those_of_trl() -> None:
    """Their bonus is a mean over all tokens, as ours is with this normalisation."""
    batch = Padded(False)
    leaves = batch.leaves()
    advantages_BL = torch.randn(B, L, generator=torch.Generator().manual_seed(3))
    loss = trl_loss(
        batch, leaves, "dapo", "token", 0.0, advantages=advantages_BL,
        trainer__entropy_bonus_enabled=True, trainer_use_adaptive_entropy=False,
        trainer_entropy_coef=0.2,
    )  # fmt: skip
    chosen = PolicyLossSettings(**COMMON, entropy_coefficient=0.2)
    ours = batch.ours(chosen, advantages_S=None, advantages_T=advantages_BL.flatten())
    check(loss, leaves, ours)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_corrections_by_sequence_are_those_of_trl(mode: str) -> None:
    """What TRL computes where it generates: the product of a sequence, clamped or masked."""
    batch = Padded(False)
    leaves = batch.leaves()
    product_B1 = (batch.weights_BL.log() * batch.mask_BL).sum(-1, keepdim=True).exp()
    low, high = sorted(product_B1.flatten().tolist())[0] * 1.5, 1.7
    weights_B1 = product_B1.clamp(low, high)
    if mode == "mask":
        weights_B1 = torch.where((product_B1 < low) | (product_B1 > high), 0.0, product_B1)
    loss = trl_loss(batch, leaves, "dapo", "token", 0.0, importance_sampling_ratio=weights_B1)
    chosen = PolicyLossSettings(
        **COMMON, correction=mode, correction_level="sequence", correction_floor=low,
        correction_cap=high,
    )  # fmt: skip
    check(loss, leaves, batch.ours(chosen))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_equals_trl(beta: float) -> None:
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed")
    generator = torch.Generator().manual_seed(2)
    student_BLV, teacher_BLV = (
        torch.randn(2, 5, V, generator=generator),
        torch.randn(2, 5, V, generator=generator),
    )
    labels_BL = torch.randint(V, (2, 5), generator=generator)
    labels_BL[1, 3:] = -100
    leaves = [student_BLV.clone().requires_grad_() for _ in range(2)]
    theirs = module.GKDTrainer.generalized_jsd_loss(
        leaves[0], teacher_BLV, labels_BL, beta=beta, temperature=2.0
    )
    theirs.backward()
    ours = jsd_loss_from_logits(
        leaves[1].flatten(0, 1), teacher_BLV.flatten(0, 1), mask_T=labels_BL.flatten() != -100,
        token_count=8, beta=beta, temperature=2.0,
    ).loss  # fmt: skip
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert relative_error(leaves[1].grad, leaves[0].grad) < 1e-4
