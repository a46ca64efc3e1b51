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

    def ours(self, settings: PolicyLossSettings) -> tuple[float, torch.Tensor, torch.Tensor]:
        hidden_TH = self.hidden_BLH.flatten(0, 1).clone().requires_grad_()
        weight_VH = self.weight_VH.clone().requires_grad_()
        loss = policy_loss_from_hidden(
            hidden_TH,
            weight_VH,
            self.ids_BL.flatten(),
            sequence_ids_T=torch.arange(B).repeat_interleave(L),
            advantages_S=self.advantages_B,
            proximal_log_probs_T=self.old_BL.flatten(),
            behaviour_log_probs_T=(self.old_BL - self.weights_BL.log()).flatten(),
            reference_log_probs_T=None
            if self.reference_BL is None
            else self.reference_BL.flatten(),
            mask_T=self.mask_BL.flatten(),
            token_count=int(self.mask_BL.sum()),
            sequence_count=B,
            settings=settings,
        ).loss
        loss.backward()
        assert hidden_TH.grad is not None and weight_VH.grad is not None
        return loss.item(), hidden_TH.grad, weight_VH.grad


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


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "normalisation"), AGGREGATIONS)
def test_grpo_equals_trl(loss_type: str, normalisation: str, level: str, kl: float) -> None:
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    batch = Padded(kl > 0)
    leaves = [batch.hidden_BLH.clone().requires_grad_(), batch.weight_VH.clone().requires_grad_()]
    inputs = {
        "prompt_ids": batch.ids_BL[:, :1], "prompt_mask": batch.mask_BL[:, :1],
        "completion_ids": batch.ids_BL, "completion_mask": batch.mask_BL,
        "advantages": batch.advantages_B, "old_per_token_logps": batch.old_BL,
        "ref_per_token_logps": batch.reference_BL,
        "importance_sampling_ratio": batch.weights_BL.clamp(max=2.0),
        "num_items_in_batch": batch.mask_BL.sum(),
    }  # fmt: skip
    trainer = TrlTrainer(batch, leaves, loss_type, level, kl)
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    ours, hidden_TH, weight_VH = batch.ours(settings_for(normalisation, level, kl))
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert relative_error(hidden_TH, leaves[0].grad.flatten(0, 1)) < 1e-5
    assert relative_error(weight_VH, leaves[1].grad) < 1e-5


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "normalisation"), AGGREGATIONS)
def test_grpo_equals_liger(loss_type: str, normalisation: str, level: str, kl: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    batch = Padded(kl > 0)
    leaves = [batch.hidden_BLH.clone().requires_grad_(), batch.weight_VH.clone().requires_grad_()]
    module = chunked.LigerFusedLinearGRPOLoss(
        beta=kl, compiled=False, use_ref_model=kl > 0, epsilon_low=COMMON["clip_low"],
        epsilon_high=COMMON["clip_high"], loss_type=loss_type, max_completion_length=L,
        importance_sampling_level=level, temperature=1.0, delta=COMMON["dual_clip"],
    )  # fmt: skip
    loss, _ = module(
        leaves[0], leaves[1], batch.ids_BL, batch.mask_BL, batch.advantages_B,
        ref_per_token_logps=batch.reference_BL, old_per_token_logps=batch.old_BL,
        vllm_is_ratio=batch.weights_BL.clamp(max=2.0),
    )  # fmt: skip
    loss.backward()
    ours, hidden_TH, weight_VH = batch.ours(settings_for(normalisation, level, kl))
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert relative_error(hidden_TH, leaves[0].grad.flatten(0, 1)) < 1e-5
    assert relative_error(weight_VH, leaves[1].grad) < 1e-5


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
