"""A model inside the trainer, the student or a frozen teacher: a causal LM, cut between last hidden
state and LM head.

Only the rows that predict response tokens are gathered before the head, so prompts and padding
never reach it. Padding stands on the right and attention is causal, so a real token cannot see it:
ordinary rows need no attention mask and no position ids, and the fast causal attention path stays
open. Rows with several rollouts behind one prompt need both. `zppo.training.fidelity` finds out
whether a model computes either as it would compute the rollouts alone.

A head that is more than a matrix, a bias, a scale and a soft cap goes through the model's own
logits instead (`zppo.training.head`): right for every model, at the price of logits for all
positions. Its rows predict no more tokens than they have positions, because each token has logits
of its own.

The weights of a sharded model are whole within a pass only (`Policy.within`).

Shape legend: B rows, L padded positions, R response tokens of a micro-batch, H hidden size, V
vocabulary, K most probable tokens of a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zppo.data.pictures import PictureError
from zppo.errors import UserError, first_line
from zppo.plan.architecture import context_of
from zppo.prompting.picture_families import unsampled_ids
from zppo.training import attention
from zppo.training.batch import Reach
from zppo.training.fidelity import (
    can_share_long_rows,
    can_share_prompts,
    hold_to_eager,
    refusals,
)
from zppo.training.head import Head, hidden_states, probe_head
from zppo.training.layout import MicroBatch, tree_mask, with_row
from zppo.training.pictures import SeenPrompt, Tower, blank
from zppo.training.ranks import Ranks, Root, gathered
from zppo_kernels import (
    JsdLossOutput,
    PolicyLossOutput,
    jsd_loss_from_hidden,
    jsd_loss_from_logits,
    jsd_loss_top_k_from_hidden,
    jsd_loss_top_k_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    token_log_probs,
    token_log_probs_from_logits,
)
from zppo_protocol.samples import TrainGroup

T = TypeVar("T")


class Outputs(NamedTuple):
    """What one forward pass gives of its response tokens, with its gradient: hidden states that
    predict them, [R, H], or [U, H] with the one of each token, [R], where tokens share them; logits
    [R, V] if the head is no `Head`."""

    states: Tensor
    state_R: Tensor | None = None


class Policy:
    """Log-probs and losses of micro-batches under the current weights."""

    def __init__(self, model: Any, where: str = "student.model") -> None:
        """`model` is a transformers causal LM; it is put into evaluation mode, because dropout
        would bend the ratio. `shares_prompts`: several rollouts may lie behind one prompt;
        `shares_long_rows`: in rows longer than `SHARED_WIDTH` as well; `shares_states`: the tokens
        that one hidden state predicts need no logits each.

        Raises UserError, naming the setting `where`, if its logits are not finite, or not those of
        a decoder.
        """
        self.model = model.eval()
        attention.adopt(model)
        with refusals(model, where):
            self.head: Head | None = probe_head(model, where)
            hold_to_eager(model, where)
            self.shares_prompts = can_share_prompts(model)
            self.shares_long_rows = self.shares_prompts and can_share_long_rows(model)
        self.shares_states = self.head is not None
        self.unsampled: tuple[int, ...] = ()
        self.leave_out(unsampled_ids(model.config.to_dict()))
        self._where = where
        self._tower: Tower | None = None
        self._root: Root | None = None
        self._blank: tuple[list[int], SeenPrompt] | None = None

    def leave_out(self, unsampled: tuple[int, ...]) -> None:
        """Take these tokens, which no response may hold, out of every softmax; those that the model
        lacks are out of it already."""
        unsampled = tuple(one for one in unsampled if one < self.vocabulary)
        if unsampled == self.unsampled:
            return
        self.unsampled = unsampled
        if self.head is None:
            return
        weight_VH = self.head.layer.weight
        bias_V = torch.zeros(self.vocabulary, dtype=weight_VH.dtype, device=weight_VH.device)
        bias_V[list(unsampled)] = -torch.inf
        self.head = replace(self.head, unsampled_V=bias_V)

    def open_eyes(self, folder: str, *, train_tower: bool = False) -> None:
        """Read pictures from here on as the model of `folder` does; nothing for one that sees none.
        Raises UserError."""
        self._tower = Tower.of(self.model, folder, self._where, frozen=not train_tower)

    def look(self, group: TrainGroup) -> SeenPrompt | None:
        """The pictures and videos of a group's prompt. Raises UserError unless the prompt is what
        this model makes of them."""
        if self._tower is None:
            raise UserError(
                f"{self._where}: the question {group.question_id!r} has pictures, and the trainer "
                f"shows none to {self.model.name_or_path!r} ({self.model.config.model_type}); "
                "expected a family that docs/pictures.md names"
            )
        try:
            seen = self._tower.seen(group.samples.prompt_ids, group.media)
            counts = [] if seen is None else seen.media_tokens
            if counts != group.samples.media_tokens:
                raise ValueError(f"they take {counts} tokens, not {group.samples.media_tokens}")
        except ValueError as error:
            raise UserError(
                f"{self._where}: the engine read the pictures of the question "
                f"{group.question_id!r} as other tokens than the trainer ({error}); expected the "
                "same preprocessor_config.json and video_preprocessor_config.json for both"
            ) from error
        return seen

    @property
    def vocabulary(self) -> int:
        """Number of logits, which may be more than there are tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def reach(self) -> Reach:
        """Tokens and lengths that the model has an embedding and positions for."""
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        return Reach(
            vocabulary=min(self.vocabulary, int(embeddings)),
            unsampled=self.unsampled,
            context=context_of(self.model.config.get_text_config().to_dict()),
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def recompute_layers(self) -> None:
        """Keep only the inputs of the layers and recompute the rest in the backward pass (gradient
        checkpointing).

        transformers does so in training mode only; the layers alone are put into it, so that
        dropout stays off. Raises UserError for an architecture whose layers cannot.
        """
        try:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        except ValueError as error:
            raise UserError(
                "actors.trainer.gradient_checkpointing is true; expected false, because the layers "
                f"of {self.model.name_or_path!r} ({self.model.config.model_type}) cannot be "
                "computed again"
            ) from error
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
                # A few architectures apply dropout in the layer itself, with a rate kept here.
                if isinstance(getattr(layer, "dropout", None), float):
                    setattr(layer, "dropout", 0.0)  # noqa: B010 - typed as a module, which it is not

    def shard(self, ranks: Ranks) -> None:
        """Cut the weights over several ranks, in place; `parameters` are other ones from here on.

        Raises UserError for a model that cannot be cut.
        """
        try:
            self._root = ranks.shard(self.model)
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"actors.trainer.ranks is {ranks.count}; expected 1, because "
                f"{self.model.name_or_path!r} cannot be sharded: {first_line(error)}"
            ) from error
        # Each has asked its own kernels, but rows must lie alike on all of them.
        able = [self.shares_prompts, self.shares_long_rows, self.shares_states]
        able_A = torch.tensor(able, dtype=torch.float32, device=self.device)
        self.shares_prompts, self.shares_long_rows, self.shares_states = (
            count == ranks.count for count in ranks.sum(able_A).tolist()
        )

    def within(self, work: Callable[[], T]) -> T:
        """Do `work`, a pass and what is computed from its outputs and the head. All ranks must, and
        as often."""
        if self._root is None:
            return work()
        done: T = self._root(work)
        return done

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of the state dict, tied ones once, gathered one at a time on the
        first rank; all ranks must go through to the end."""
        met: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            met.setdefault(id(tensor), (name, tensor))
        return gathered((name, tensor.detach()) for name, tensor in met.values())

    @torch.no_grad()
    def log_probs(
        self, batch: MicroBatch, target_ids_R: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, float32 [R] each."""
        return self.within(
            lambda: self.log_probs_of(
                self.outputs(batch),
                target_ids_R,
                temperature=temperature,
                support_ids_TK=batch.support_RK,
            )
        )

    def outputs(self, batch: MicroBatch) -> Outputs:
        """What predicts the response tokens, for `log_probs_of` and `policy_loss_of`."""
        if self.head is None:
            return Outputs(self.logits(batch))
        if batch.ends_BL is None or batch.rows_R.is_cuda:
            return Outputs(self.hidden(batch))
        rows_U, state_R = batch.rows_R.unique(return_inverse=True)
        return Outputs(self.hidden(replace(batch, rows_R=rows_U)), state_R)

    @torch.no_grad()
    def log_probs_of(
        self, outputs: Outputs, target_ids_R: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, float32 [R] each, of what one forward pass gave; `arguments` are
        those of `zppo_kernels.token_log_probs`."""
        if self.head is None:
            return token_log_probs_from_logits(outputs.states, target_ids_R, **arguments)
        return token_log_probs(
            outputs.states,
            self.head.weight_VH,
            target_ids_R,
            hidden_rows_T=outputs.state_R,
            bias_V=self.head.bias_V,
            **self.head.map,
            **arguments,
        )

    def policy_loss_of(
        self, outputs: Outputs, target_ids_R: Tensor, **arguments: Any
    ) -> PolicyLossOutput:
        """Policy loss of one forward pass; `arguments` are those of
        `zppo_kernels.policy_loss_from_hidden`."""
        if self.head is None:
            # The logits are a copy of the model's own, read for the last time.
            return policy_loss_from_logits(outputs.states, target_ids_R, in_place=True, **arguments)
        return policy_loss_from_hidden(
            outputs.states,
            self.head.weight_VH,
            target_ids_R,
            hidden_rows_T=outputs.state_R,
            bias_V=self.head.bias_V,
            **self.head.map,
            **arguments,
        )

    def jsd_loss(self, batch: MicroBatch, teacher: Policy, **arguments: Any) -> JsdLossOutput:
        """Divergence from a teacher that reads the same tokens; `arguments` are those of
        `jsd_loss_from_hidden`.

        The teacher gets no gradient. Logits exist a chunk at a time if both have a `Head`.
        """
        if self.head is None or teacher.head is None:
            with torch.no_grad():
                teacher_logits_RW = teacher.within(lambda: teacher.logits(batch))
            return jsd_loss_from_logits(self.logits(batch), teacher_logits_RW, **arguments)
        with torch.no_grad():
            teacher_hidden_RG = teacher.within(lambda: teacher.hidden(batch))
        return jsd_loss_from_hidden(
            self.hidden(batch),
            self.head.weight_VH,
            teacher_hidden_RG,
            teacher.head.weight_VH,
            student_bias_V=self.head.bias_V,
            teacher_bias_W=teacher.head.bias_V,
            **{f"student_{name}": value for name, value in self.head.map.items()},
            **{f"teacher_{name}": value for name, value in teacher.head.map.items()},
            **arguments,
        )

    def jsd_loss_top_k(
        self, batch: MicroBatch, ids_RK: Tensor, log_probs_RK: Tensor, **more: Any
    ) -> JsdLossOutput:
        """Divergence from a teacher of which K tokens a position are known; see
        `jsd_loss_top_k_from_hidden`."""
        if self.head is None:
            return jsd_loss_top_k_from_logits(self.logits(batch), ids_RK, log_probs_RK, **more)
        return jsd_loss_top_k_from_hidden(
            self.hidden(batch),
            self.head.weight_VH,
            ids_RK,
            log_probs_RK,
            student_bias_V=self.head.bias_V,
            **{f"student_{name}": value for name, value in self.head.map.items()},
            **more,
        )

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden states that predict the response tokens [R, H]."""
        batch = self._with_blank(batch)
        return (
            hidden_states(self.model, **self._inputs(batch))
            .flatten(0, 1)
            .index_select(0, batch.rows_R)
        )

    def logits(self, batch: MicroBatch) -> Tensor:
        """The model's own logits at the same rows [R, V]."""
        batch = self._with_blank(batch)
        logits_BLV = self.model(**self._inputs(batch), use_cache=False).logits
        logits_RV = logits_BLV.flatten(0, 1).index_select(0, batch.rows_R)
        if not self.unsampled:
            return logits_RV
        unsampled = torch.tensor(self.unsampled, device=logits_RV.device)
        return logits_RV.index_fill(1, unsampled, -torch.inf)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_BL}
        if batch.ends_BL is not None and batch.positions_BL is not None:
            inputs["position_ids"] = batch.positions_BL
            inputs["attention_mask"] = tree_mask(
                batch.ends_BL, self.model.dtype, long=self.shares_long_rows
            )
        if batch.seen_B:
            assert self._tower is not None, "`look` has refused such a window"
            inputs |= self._show(self._tower, batch)
        return inputs

    def _show(self, tower: Tower, batch: MicroBatch) -> dict[str, Any]:
        positions_BL = batch.positions_BL
        if positions_BL is None:
            rows, width = batch.input_ids_BL.shape
            positions_BL = torch.arange(width, device=self.device).expand(rows, width)
        try:
            return tower.inputs(batch.seen_B, positions_BL)
        except PictureError as error:
            raise UserError(f"data.train: {error}") from error

    def _with_blank(self, batch: MicroBatch) -> MicroBatch:
        """A tower that is trained is gone through in every pass: one without a picture gets a row
        with a small one, which nobody reads.

        Of several ranks that share its weights out those with a picture would else wait for the
        others for ever. And whether a mini-batch has one decides then neither there nor on one rank
        which weights an update reaches: without a gradient they would not decay."""
        if self._tower is None or self._tower.frozen or batch.seen_B:
            return batch
        if self._blank is None:
            self._blank = blank(self._tower)
        return with_row(batch, *self._blank)
