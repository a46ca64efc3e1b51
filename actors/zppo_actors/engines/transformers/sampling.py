"""Vectorised sampling: one uniform number per row and token picks the token by inverse CDF, in
float32.

The behaviour log-prob is that of the distribution really sampled: after penalty, temperature,
min-p, top-k and top-p. Rows do not see each other: which truncation a neighbour uses changes
nothing, so a row's tokens depend on its own logits and its own uniform numbers alone. Of tokens
that are equally probable, the one with the lower id comes first, so a support never has more than
top-k tokens.

Legend: B rows in the batch, V vocabulary, K rows that truncate alike, W tokens looked at of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zppo_protocol.values import Sampling


class Sampler:
    """The decoding settings of the rows now in the batch, laid out as tensors once per change of
    the batch."""

    def __init__(
        self,
        settings: Sequence[Sampling],
        device: torch.device,
        seen_BV: Tensor | None = None,
        support_limits: Sequence[int] = (),
        unsampled: Tensor | None = None,
    ) -> None:
        """`seen_BV` (bool) marks the tokens each row holds already and is kept up to date; None: no
        penalties. `support_limits` (none: all 0): most ids of a support, 0 where it is not asked
        for. `unsampled`: ids that are never sampled, and count in no distribution."""
        self._unsampled = unsampled
        self._penalty_B1 = _column([setting.presence_penalty for setting in settings], device)
        self._seen_BV = seen_BV
        temperatures = [setting.temperature for setting in settings]
        self._temperature_B1 = _column([t or 1.0 for t in temperatures], device)
        self._tempered = any(t not in (0.0, 1.0) for t in temperatures)
        self._greedy_B = torch.tensor([t == 0.0 for t in temperatures], device=device)
        self._some_greedy = 0.0 in temperatures
        limits = support_limits or [0] * len(settings)
        self._cuts = [
            _Cut(rows, [settings[row] for row in rows], width, device)
            for width, rows in _by_width(settings, limits).items()
        ]
        self.supports: list[tuple[list[int], Tensor]] = []
        """Of the last tokens, where they are asked for: rows of the batch, and the ids of each,
        int64, -1 behind the last one."""

    def __call__(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sample one token per row: ids [B] int64 and natural log-probs [B] float32."""
        logits_BV = logits_BV.float()
        if self._unsampled is not None:
            logits_BV = logits_BV.index_fill(1, self._unsampled, -torch.inf)
        if self._seen_BV is not None:
            logits_BV = logits_BV - self._penalty_B1 * self._seen_BV
        if self._tempered:
            logits_BV = logits_BV / self._temperature_B1
        log_probs_BV = torch.log_softmax(logits_BV, dim=-1)
        tokens_B1 = draw(log_probs_BV, uniforms_B[:, None])
        if self._some_greedy:
            tokens_B1 = torch.where(
                self._greedy_B[:, None], logits_BV.argmax(-1, keepdim=True), tokens_B1
            )
        chosen_B1 = log_probs_BV.gather(1, tokens_B1)
        self.supports = []
        for cut in self._cuts:
            index_K = cut.index_K
            tokens_K1, chosen_K1, ids_KW = cut(log_probs_BV[index_K], uniforms_B[index_K, None])
            tokens_B1.index_copy_(0, index_K, tokens_K1)
            chosen_B1.index_copy_(0, index_K, chosen_K1)
            if cut.width is not None:
                self.supports.append((cut.rows, ids_KW))
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B1, True)
        return tokens_B1[:, 0], chosen_B1[:, 0]


class _Cut:
    """Rows that truncate, to be handled alike. `width`: their supports are asked for, and have at
    most so many ids; None: the whole vocabulary is sorted."""

    def __init__(
        self,
        rows: list[int],
        settings: Sequence[Sampling],
        width: int | None,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.width = width
        self.index_K = torch.tensor(rows, dtype=torch.int64, device=device)
        self._top_k_K1 = _column([setting.top_k or 2**31 for setting in settings], device)
        # A sum of float32 reaches 1 before the last tokens, which a share of 1 does not leave out.
        shares = [setting.top_p if setting.top_p < 1 else torch.inf for setting in settings]
        self._top_p_K1 = _column(shares, device)
        self._min_p_K1 = _column([setting.min_p for setting in settings], device)

    def __call__(self, log_probs_KV: Tensor, uniforms_K1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Min-p, top-k, then top-p of what is left, as in the usual order; the most likely token
        always stays. Tokens and log-probs [K, 1], and the ids that could have been, -1 behind
        them."""
        sorted_KW, order_KW = most_probable(log_probs_KV, self.width)
        ranks_W = torch.arange(sorted_KW.shape[-1], device=sorted_KW.device)
        outside_KW = ranks_W >= self._top_k_K1
        # log(0) = -inf: no token is less probable than that.
        outside_KW |= sorted_KW < sorted_KW[:, :1] + self._min_p_K1.log()
        sorted_KW = sorted_KW.masked_fill(outside_KW, -torch.inf).log_softmax(-1)
        probs_KW = sorted_KW.exp()
        before_KW = probs_KW.cumsum(-1) - probs_KW
        outside_KW = (before_KW >= self._top_p_K1) & (ranks_W > 0)
        sorted_KW = sorted_KW.masked_fill(outside_KW, -torch.inf).log_softmax(-1)
        inside_KW = sorted_KW > -torch.inf
        # A row of NaN has nothing inside; its log-prob will say so.
        last_K1 = (inside_KW.sum(-1, keepdim=True) - 1).clamp_(min=0)
        ranks_K1 = torch.minimum(draw(sorted_KW, uniforms_K1), last_K1)
        return (
            order_KW.gather(1, ranks_K1),
            sorted_KW.gather(1, ranks_K1),
            order_KW.masked_fill(~inside_KW, -1),
        )


def most_probable(log_probs_KV: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The `width` most probable tokens of each row (None: all), best first, and their ids; of equal
    ones the lower ids come first.

    Sorting a large vocabulary takes a CPU longer than a step of a small model, and `topk` may take
    any of equal tokens, so it only says where to cut.
    """
    if width is None or width >= log_probs_KV.shape[-1]:
        return log_probs_KV.sort(dim=-1, descending=True, stable=True)
    known_KV = log_probs_KV.masked_fill(log_probs_KV.isnan(), -torch.inf)
    last_K1 = known_KV.topk(width, dim=-1).values[:, -1:]
    above_KV, equal_KV = known_KV > last_K1, known_KV == last_K1
    room_K1 = width - above_KV.sum(-1, keepdim=True)
    kept_KV = above_KV | (equal_KV & (equal_KV.cumsum(-1) <= room_K1))
    ids_KW = kept_KV.nonzero()[:, 1].view(len(log_probs_KV), width)
    sorted_KW, places_KW = log_probs_KV.gather(1, ids_KW).sort(dim=-1, descending=True, stable=True)
    return sorted_KW, ids_KW.gather(1, places_KW)


def _by_width(settings: Sequence[Sampling], limits: Sequence[int]) -> dict[int | None, list[int]]:
    """Rows that truncate, by the width of their supports: a row is computed at its own width,
    whoever is beside it."""
    groups: dict[int | None, list[int]] = {}
    for row, (setting, limit) in enumerate(zip(settings, limits, strict=True)):
        if setting.truncates:
            groups.setdefault(limit or None, []).append(row)
    return groups


def draw(log_probs_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """Inverse CDF: the first token [B, 1] whose cumulative probability exceeds the uniform
    number."""
    cumulative_BV = log_probs_BV.exp().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Rounded up to the total, it would be behind the last token that has a probability.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    places_B1 = torch.minimum(uniforms_B1 * total_B1, below_B1)
    return torch.searchsorted(cumulative_BV, places_B1, right=True).clamp_(
        max=log_probs_BV.shape[-1] - 1
    )


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
