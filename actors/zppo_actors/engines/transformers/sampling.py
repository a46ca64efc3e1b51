"""Vectorised sampling: one uniform number per row and token picks the token by inverse CDF, in
float32.

The behaviour log-prob is that of the distribution really sampled: after penalty, temperature,
min-p, top-k and top-p. Rows do not see each other: which truncation a neighbour uses changes
nothing, so a row's tokens depend on its own logits and its own uniform numbers alone. Of tokens
that are equally probable, the one with the lower id comes first, so a support never has more than
top-k tokens.

Legend: B rows in the batch, V vocabulary, K rows that truncate, W widest support that is reported.
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
    ) -> None:
        """`seen_BV` (bool) marks the tokens each row holds already and is kept up to date; None: no
        penalties. `support_limits` (none: all 0): most ids of a support, 0 where it is not asked
        for."""
        self._penalty_B1 = _column([setting.presence_penalty for setting in settings], device)
        self._seen_BV = seen_BV
        temperatures = [setting.temperature for setting in settings]
        self._temperature_B1 = _column([t or 1.0 for t in temperatures], device)
        self._tempered = any(t not in (0.0, 1.0) for t in temperatures)
        self._greedy_B = torch.tensor([t == 0.0 for t in temperatures], device=device)
        self._some_greedy = 0.0 in temperatures
        cut = [i for i, setting in enumerate(settings) if setting.truncates]
        limits = {i: limit for i, limit in enumerate(support_limits) if limit}
        self.reported = [(k, i) for k, i in enumerate(cut) if i in limits]
        """Rows whose support is reported: (place among those that truncate, place in the batch)."""
        self._widest = max((limits[i] for _, i in self.reported), default=0)
        self._cut_K = torch.tensor(cut, dtype=torch.int64, device=device) if cut else None
        self._top_k_K1 = _column([settings[i].top_k or 2**31 for i in cut], device)
        self._top_p_K1 = _column([settings[i].top_p for i in cut], device)
        self._min_p_K1 = _column([settings[i].min_p for i in cut], device)
        self.support_KW: Tensor | None = None
        """Supports of the last tokens of the rows that truncate, int64, -1 behind the last id of
        each; None if no row reports any."""

    def __call__(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sample one token per row: ids [B] int64 and natural log-probs [B] float32."""
        logits_BV = logits_BV.float()
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
        if self._cut_K is not None:
            tokens_K1, chosen_K1 = self._truncated(
                log_probs_BV[self._cut_K], uniforms_B[self._cut_K, None]
            )
            tokens_B1.index_copy_(0, self._cut_K, tokens_K1)
            chosen_B1.index_copy_(0, self._cut_K, chosen_K1)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B1, True)
        return tokens_B1[:, 0], chosen_B1[:, 0]

    def _truncated(self, log_probs_KV: Tensor, uniforms_K1: Tensor) -> tuple[Tensor, Tensor]:
        """Min-p, top-k, then top-p of what is left, as in the usual order; the most likely token
        always stays."""
        sorted_KV, order_KV = log_probs_KV.sort(dim=-1, descending=True, stable=True)
        ranks_V = torch.arange(sorted_KV.shape[-1], device=sorted_KV.device)
        outside_KV = ranks_V >= self._top_k_K1
        # log(0) = -inf: no token is less probable than that.
        outside_KV |= sorted_KV < sorted_KV[:, :1] + self._min_p_K1.log()
        sorted_KV = sorted_KV.masked_fill(outside_KV, -torch.inf).log_softmax(-1)
        probs_KV = sorted_KV.exp()
        before_KV = probs_KV.cumsum(-1) - probs_KV
        outside_KV = (before_KV >= self._top_p_K1) & (ranks_V > 0)
        sorted_KV = sorted_KV.masked_fill(outside_KV, -torch.inf).log_softmax(-1)
        inside_KV = sorted_KV > -torch.inf
        last_K1 = inside_KV.sum(-1, keepdim=True) - 1
        if self._widest:
            self.support_KW = order_KV.masked_fill(~inside_KV, -1)[:, : self._widest]
        ranks_K1 = torch.minimum(draw(sorted_KV, uniforms_K1), last_K1)
        return order_KV.gather(1, ranks_K1), sorted_KV.gather(1, ranks_K1)


def draw(log_probs_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """Inverse CDF: the first token [B, 1] whose cumulative probability exceeds the uniform
    number."""
    cumulative_BV = log_probs_BV.exp().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, uniforms_B1 * total_B1, right=True).clamp_(
        max=log_probs_BV.shape[-1] - 1
    )


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
