"""A model's most probable tokens at given tokens, by plain forward passes over prompt and response.

A pass reads several responses behind copies of their prompt, padded on the right, where causal
attention never looks. Only the positions that predict response tokens reach the head, and of their
logits a chunk exists at a time: the whole vocabulary enters the normaliser, K tokens leave.

Legend: B responses of a pass, L padded positions, R response tokens of a pass, C of a chunk, n of
one response, H hidden size, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zppo.data.pictures import PictureError
from zppo.errors import UserError
from zppo.prompting.picture_families import unsampled_ids
from zppo.training.head import hidden_states, probe_head
from zppo.training.pictures import Tower
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.score_tasks import ScoreTable
from zppo_kernels.linear_chunks import logit_chunks
from zppo_kernels.logit_map import LogitMap
from zppo_kernels.projection import Projection, chunk_rows
from zppo_protocol.messages import ScoreTask

PASS_TOKENS = 8192
"""Padded tokens of one pass; bounds the activations and how long running sequences wait."""
CHUNK_ROWS = 256
"""Rows of logits that exist at once; `zppo.plan.memory` counts with this number and the one
above."""
PASS_LOGITS = 1 << 25
"""Logits of one pass, where the head is more than a matrix and gives those of all positions."""


class Scorer:
    """Forward passes of one model in evaluation mode; `where` is the setting that names it, `tower`
    what sees pictures in it."""

    def __init__(self, model: Any, where: str, tower: Tower | None = None) -> None:
        self._model = model
        self._tower = tower
        unsampled = unsampled_ids(model.config.to_dict())
        self._unsampled = torch.tensor(unsampled, device=model.device) if unsampled else None
        self._head = probe_head(model, where)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.pass_tokens = (
            PASS_TOKENS if self._head else max(1, min(PASS_TOKENS, PASS_LOGITS // self.vocabulary))
        )

    @torch.inference_mode()
    def read(self, task: ScoreTask, members: list[int], table: ScoreTable) -> None:
        """Score the responses `members`, none of them empty, in one pass; their rows of `table` are
        filled."""
        ids_BL, rows_R = _layout(task, members)
        device = self._model.device
        inputs = {"input_ids": ids_BL.to(device)} | self._seen(task, ids_BL.to(device))
        chunks = [
            _most_probable(self._sampled(logits_CV), table.width, task.temperature)
            for logits_CV in self._logits(inputs, rows_R.to(device))
        ]
        ids_RK, log_probs_RK = (
            torch.cat(columns).cpu().numpy() for columns in zip(*chunks, strict=True)
        )
        ends = np.cumsum(np.diff(task.offsets)[members])[:-1]
        parts = zip(members, np.split(ids_RK, ends), np.split(log_probs_RK, ends), strict=True)
        for member, ids_nK, log_probs_nK in parts:
            table.put(member, ids_nK, log_probs_nK)

    def _seen(self, task: ScoreTask, ids_BL: Tensor) -> dict[str, Any]:
        """The pictures of the task's prompt, which all rows begin with. Raises EngineError, or
        UserError if the model's folder cannot show any."""
        if not task.media:
            return {}
        if self._tower is None:
            raise EngineError(
                "the model takes text only, but the prompt has pictures", retryable=False
            )
        try:
            seen = self._tower.seen(task.prompt_ids, task.media)
            places_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand(ids_BL.shape)
            return self._tower.inputs([seen] * len(ids_BL), places_BL)
        except UserError:
            raise
        except (PictureError, ValueError) as error:
            raise EngineError(str(error), retryable=False) from error

    def _sampled(self, logits_CV: Tensor) -> Tensor:
        """The logits without those of tokens that no response may hold."""
        if self._unsampled is None:
            return logits_CV
        return logits_CV.index_fill(1, self._unsampled, -torch.inf)

    def _logits(self, inputs: dict[str, Any], rows_R: Tensor) -> Iterator[Tensor]:
        """Logits [C, V] of the rows, in order; a chunk may lie where the last one lay."""
        if self._head is None:
            logits_RV = (
                self._model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, rows_R)
            )
            yield from logits_RV.split(CHUNK_ROWS)
            return
        hidden_RH = hidden_states(self._model, **inputs).flatten(0, 1).index_select(0, rows_R)
        projection = Projection.of(self._head.weight_VH, self._head.bias_V)
        shape = LogitMap.of(self._head.logit_scale, self._head.soft_cap)
        rows = min(CHUNK_ROWS, chunk_rows(len(hidden_RH), self.vocabulary, hidden_RH.device))
        for _, _, logits_CV in logit_chunks(projection, hidden_RH, rows):
            yield shape.apply_(logits_CV)


def passes(task: ScoreTask, max_tokens: int) -> list[list[int]]:
    """The responses that have tokens, longest first, cut where B*L would pass `max_tokens`; a
    longer one goes alone."""
    lengths = np.diff(task.offsets)
    batches: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())].tolist():
        if (
            batches
            and (len(batches[-1]) + 1) * (len(task.prompt_ids) + lengths[batches[-1][0]] - 1)
            <= max_tokens
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _layout(task: ScoreTask, members: list[int]) -> tuple[Tensor, Tensor]:
    """Input ids [B, L], and the flat positions [R] that predict the members' tokens; a last token
    predicts nothing."""
    prompt, lengths = len(task.prompt_ids), np.diff(task.offsets)
    width = prompt + int(lengths[members].max()) - 1
    ids_BL, rows = np.zeros((len(members), width), dtype=np.int64), []
    for row, member in enumerate(members):
        start, length = int(task.offsets[member]), int(lengths[member])
        ids_BL[row, :prompt] = task.prompt_ids
        ids_BL[row, prompt : prompt + length - 1] = task.token_ids[start : start + length - 1]
        rows.append(row * width + prompt - 1 + np.arange(length))
    return torch.from_numpy(ids_BL), torch.from_numpy(np.concatenate(rows))


def _most_probable(logits_CV: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probs [C, K] of the most probable tokens under the softmax of the whole
    vocabulary."""
    scaled_CV = logits_CV.float() / temperature
    best_CK, ids_CK = scaled_CV.topk(count, dim=-1)
    return ids_CK, best_CK - scaled_CV.logsumexp(-1, keepdim=True)
