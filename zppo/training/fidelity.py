"""Whether a model computes in rows of a batch what its authors' code computes for one sequence.

The reference is transformers' own `eager` attention on one sequence without padding. Faster kernels
leave out what they do not know (caps on scores, sinks), and an architecture may let tokens see what
stands behind them, or beside them in the batch: neither shows in a loss curve. So a model is asked
a few short rows when it is loaded, and what cannot be seen on those (windows) is read from its
configuration.

Shape legend: L positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zppo.errors import UserError, first_line
from zppo.plan.architecture import context_of, layer_kinds, tempered_from, window_of
from zppo.training import attention
from zppo.training.layout import PAD_ID, SHARED_WIDTH, attention_mask
from zppo.training.loading import is_recurrent

log = logging.getLogger("zppo.trainer")

LARGEST_DIFFERENCE = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Log-probs of a likely token that differ by less are taken for equal but for rounding: in float32
that is 1e-4; in 16 bits the bound is chosen below what another computation gave on tiny models (0.6
and more), and not measured on large ones. Caps at their usual 50 give 0.02, and are therefore read
from the configuration."""
PROBE_LENGTHS = (40, 13, 2)
BRANCHING = 6
"""So many tokens the two rows of a probe of trees begin with."""
EAGER = "eager"
FAULTS = (
    *(NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError),
    *(IndexError, KeyError),
)
"""What architectures raise that meet an input, a cache or an attention they were not written
for."""


@contextmanager
def refusals(model: Any, where: str) -> Iterator[None]:
    """Turn what an architecture raises on the probes into one sentence that names `where`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except FAULTS as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{_cannot(model, where)} ({reason})") from error


def _cannot(model: Any, where: str) -> str:
    return f"{where}: the trainer cannot use {model.name_or_path!r} ({model.config.model_type})"


@torch.no_grad()
def hold_to_eager(model: Any, where: str) -> None:
    """Leave `model` with an attention whose log-probs in a padded batch are those of the reference:
    its own, or else the reference itself.

    Raises UserError, naming the setting `where`, if both differ: then its tokens see more than the
    tokens before them.
    """
    own, limit, difference = model.config._attn_implementation, LARGEST_DIFFERENCE[model.dtype], 0.0
    expected = _alone(model)
    for implementation in dict.fromkeys((own, EAGER)):
        model.set_attn_implementation(implementation)
        difference = _in_a_batch(model, expected)
        if difference < limit:
            return
        log.warning(
            "%s: the attention %r differs by %.3f from the authors' own; trying the next",
            where,
            implementation,
            difference,
        )
    raise UserError(
        f"{_cannot(model, where)}: the log-prob of a token differs by {difference:.3f} between a "
        f"sequence alone and the same sequence in a batch (less than {limit:g} is rounding)"
    )


def _alone(model: Any) -> list[Tensor]:
    """Log-probs [L, V] of each probe row by the reference, without padding."""
    model.set_attn_implementation(EAGER)
    return [_log_probs(model, input_ids=row[None])[0] for row in _probe_rows(model)]


def _in_a_batch(model: Any, expected: list[Tensor]) -> float:
    """Largest difference of the probe rows, padded on the right in one pass, from `expected`."""
    padded_BL = pad_sequence(_probe_rows(model), batch_first=True, padding_value=PAD_ID)
    found_BLV = _log_probs(model, input_ids=padded_BL)
    return max(
        _difference(found_LV[: len(expected_LV)], expected_LV)
        for found_LV, expected_LV in zip(found_BLV, expected, strict=True)
    )


@torch.no_grad()
def can_share_prompts(model: Any) -> bool:
    """Say whether two rollouts behind one prompt, which begin with the same tokens, get the
    log-probs that they get one by one."""
    text = model.config.get_text_config().to_dict()
    if layer_kinds(text) - {"full_attention", "attention"}:
        return False  # their windows stand in masks that ours would replace
    if is_recurrent(model):
        return False  # a state goes on from one rollout of a row into the next
    if "position_ids" not in signature(model.forward).parameters:
        return False  # it counts places (ALiBi)
    if (window_of(text) or SHARED_WIDTH) < SHARED_WIDTH:
        return False
    if (tempered_from(text) or SHARED_WIDTH + 1) <= SHARED_WIDTH:
        return False  # a place in a row with several rollouts is no position
    if model.config._attn_implementation not in ("sdpa", EAGER, attention.NAME):
        return False
    return _same_in_a_tree(model, lambda ends_BL: attention_mask(ends_BL, model.dtype))


@torch.no_grad()
def can_share_long_rows(model: Any) -> bool:
    """Say whether a model that can share prompts does so in rows longer than `SHARED_WIDTH` as
    well: by our own attention, branch by branch, in which there are no windows."""
    if model.config._attn_implementation != attention.NAME:
        return False
    text = model.config.get_text_config().to_dict()
    if window_of(text) or tempered_from(text):
        return False
    return _same_in_a_tree(model, lambda ends_BL: ends_BL[:, None, None])


def _same_in_a_tree(model: Any, mask_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether two probe rows that begin alike get, with this mask, their own log-probs.

    The first is long, so that the second stands far behind its positions: what a model makes of
    places then shows in 16 bits as well."""
    first = _probe_rows(model)[0]
    second = torch.cat([first[:BRANCHING], first[-4:]])
    expected = torch.cat(
        [_log_probs(model, input_ids=row[None])[0, BRANCHING:][:4] for row in (first, second)]
    )
    places = torch.arange(len(first) + len(second) - BRANCHING, device=first.device)
    behind = places >= len(first)
    ends = torch.where((places >= BRANCHING) & ~behind, len(first), len(places))
    try:
        found = _log_probs(
            model,
            input_ids=torch.cat([first, second[BRANCHING:]])[None],
            position_ids=torch.where(behind, places - len(first) + BRANCHING, places)[None],
            attention_mask=mask_of(ends[None]),
        )[0]
    except FAULTS:
        return False  # a model that takes no such mask
    found = torch.cat([found[BRANCHING:][:4], found[len(first) :]])
    return _difference(found, expected) < LARGEST_DIFFERENCE[model.dtype]


def _probe_rows(model: Any) -> list[Tensor]:
    """Rows of unequal length within the model's context, longest first."""
    text = model.config.get_text_config()
    context = context_of(text.to_dict())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = torch.arange(1, PROBE_LENGTHS[0] + 1, device=model.device) * 7 % vocabulary
    return [longest[: min(length, context)] for length in PROBE_LENGTHS]


def _log_probs(model: Any, **inputs: Tensor) -> Tensor:
    """Of the whole vocabulary, float32 [B, L, V]."""
    log_probs: Tensor = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
    return log_probs


def _difference(found_LV: Tensor, expected_LV: Tensor) -> float:
    """Largest difference at the likeliest token of each position; infinite for NaN."""
    likeliest_L1 = expected_LV.argmax(-1, keepdim=True)
    gaps = found_LV.gather(-1, likeliest_L1) - expected_LV.gather(-1, likeliest_L1)
    return float(gaps.abs().nan_to_num(nan=torch.inf).max())
