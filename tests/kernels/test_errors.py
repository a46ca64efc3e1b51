"""What a user gets told: one sentence with the name, the value and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import make_case

from zppo_kernels import PolicyLossSettings, policy_loss_from_hidden, token_log_probs

CASE = make_case(1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_low": 1.5}, "clip_low is 1.5; expected a finite number in [0.0, 1.0]"),
        ({"clip_high": float("nan")}, "clip_high is nan; expected a finite number in [0.0, inf]"),
        ({"dual_clip": 1.1}, "dual_clip is 1.1; expected None or at least 1 + clip_high"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"correction": "clip"}, "correction is 'clip'; expected one of none, truncate, mask"),
        (
            {"normalisation": "batch"},
            "normalisation is 'batch'; expected one of token, sequence, fixed_length",
        ),
        ({"ratio_level": "group"}, "ratio_level is 'group'; expected one of token, sequence"),
        (
            {"fixed_length": 8},
            "fixed_length belongs with normalisation='fixed_length': give both or neither",
        ),
        (
            {"normalisation": "fixed_length"},
            "fixed_length belongs with normalisation='fixed_length': give both or neither",
        ),
        (
            {"normalisation": "fixed_length", "fixed_length": 0},
            "fixed_length is 0; expected at least 1",
        ),
        (
            {"kl_coefficient": -0.1},
            "kl_coefficient is -0.1; expected a finite number in [0.0, inf]",
        ),
        (
            {"entropy_coefficient": -0.1},
            "entropy_coefficient is -0.1; expected a finite number in [0.0, inf]",
        ),
        (
            {"surrogate": "ppo"},
            "surrogate is 'ppo'; expected one of clip, cispo, sapo, dppo_tv, dppo_kl",
        ),
        (
            {"surrogate": "dppo_kl", "ratio_level": "sequence"},
            "surrogate is 'dppo_kl', which compares the probabilities of single tokens; expected "
            "ratio_level='token'",
        ),
        (
            {"surrogate": "dppo_tv", "dual_clip": -1.0},
            "dual_clip is -1.0; expected None or a number above 0",
        ),
        (
            {"sapo_temperature_negative": 0.0},
            "sapo_temperature_negative is 0.0; expected a finite number above 0",
        ),
        (
            {"correction_floor": 3.0},
            "correction_floor is 3.0; expected None or a number from 0 to correction_cap",
        ),
        (
            {"kl_correction": "unbiased"},
            "kl_correction is 'unbiased'; expected one of none, importance, straight_through",
        ),
    ],
)
def test_settings(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        PolicyLossSettings(**options)
    assert str(caught.value) == sentence


class Gathered(torch.Tensor):
    """Stands for a sharded parameter: it can be gathered, and has not been."""

    def full_tensor(self) -> torch.Tensor:
        raise AssertionError("not ours to gather")


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_TH": CASE.hidden_TH[0]},
        (
            "hidden_TH has shape (12,) and dtype torch.float32; expected two dimensions, floating "
            "point"
        ),
    ),
    ({"weight_VH": CASE.weight_VH[:, :5]}, "weight_VH has shape (301, 5); expected 12 columns"),
    (
        {"weight_VH": CASE.weight_VH[:0]},
        "weight_VH has shape (0, 12): an empty shard; gather the LM head first",
    ),
    (
        {"weight_VH": CASE.weight_VH.bfloat16()},
        "hidden_TH is torch.float32 but weight_VH is torch.bfloat16; expected one dtype",
    ),
    (
        {"weight_VH": CASE.weight_VH.as_subclass(Gathered)},
        "weight_VH is a DTensor; gather it first (`.full_tensor()`, or FSDP's unshard)",
    ),
    ({"bias_V": CASE.bias_V[:9]}, "bias_V has shape (9,); expected (301,)"),
    (
        {"target_ids_T": CASE.target_ids_T[:4]},
        "target_ids_T has shape (4,); expected (29,), one per row of hidden_TH",
    ),
    (
        {"target_ids_T": CASE.target_ids_T.float()},
        "target_ids_T has shape (29,) and dtype torch.float32; expected [T], int64 or int32",
    ),
    (
        {"target_ids_T": CASE.target_ids_T + 400, "mask_T": None},
        "target_ids_T[0] is %d; expected an id in [0, 301) or -100",
    ),
    (
        {"advantages_S": torch.ones(2)},
        "sequence_ids_T run from 0 to 4; expected 0 to 1, an index into advantages_S",
    ),
    (
        {"proximal_log_probs_T": torch.ones(3)},
        "proximal_log_probs_T has shape (3,); expected (29,)",
    ),
    (
        {"advantages_S": None},
        "neither of advantages_S and advantages_T given; expected one of them",
    ),
    (
        {"advantages_T": torch.ones(29)},
        "both of advantages_S and advantages_T given; expected one of them",
    ),
    (
        {
            "advantages_S": None,
            "advantages_T": torch.ones(29),
            "sequence_ids_T": CASE.inputs["sequence_ids_T"] + 25,
        },
        "sequence_ids_T run from 0 to 29; expected 0 to 28, one of the rows",
    ),
    ({"soft_cap": -30.0}, "soft_cap is -30.0; expected None or a finite number above 0"),
    ({"logit_scale": 0.0}, "logit_scale is 0.0; expected a finite number above 0"),
    ({"mask_T": torch.ones(29, 1)}, "mask_T has shape (29, 1); expected (29,)"),
    (
        {"advantages_S": torch.ones(0)},
        "advantages_S is empty; expected one advantage for each sequence of the 29 rows",
    ),
    (
        {"live_rows_L": torch.tensor([3, 29])},
        "live_rows_L run from 3 to 29; expected distinct rows from 0 to 28",
    ),
    (
        {"live_rows_L": torch.tensor([3, 3])},
        "live_rows_L run from 3 to 3; expected distinct rows from 0 to 28",
    ),
    ({"token_count": torch.ones(2)}, "token_count has shape (2,); expected one number"),
    ({"token_count": float("inf")}, "token_count is inf; expected a count of 0 or more"),
    (
        {"weight_VH": CASE.weight_VH.to("meta")},
        "weight_VH is on meta; expected cpu, where hidden_TH is",
    ),
    ({"token_count": -3}, "token_count is -3; expected a count of 0 or more"),
    (
        {"sequence_count": None, "settings": PolicyLossSettings(normalisation="sequence")},
        "normalisation 'sequence' needs sequence_count, the global number of sequences",
    ),
    (
        {"reference_log_probs_T": None, "settings": PolicyLossSettings(kl_coefficient=0.5)},
        "kl_coefficient is 0.5, which needs reference_log_probs_T",
    ),
    (
        {"mask_T": torch.ones(29, device="meta")},
        "mask_T is on meta; expected cpu, where target_ids_T is",
    ),
]


@pytest.mark.parametrize(
    ("changes", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG]
)
def test_policy_loss_inputs(changes: dict[str, Any], sentence: str) -> None:
    base = {
        "hidden_TH": CASE.hidden_TH,
        "weight_VH": CASE.weight_VH,
        "target_ids_T": CASE.target_ids_T,
    }
    arguments = base | CASE.inputs | changes
    if "%d" in sentence:
        sentence %= int(CASE.target_ids_T[0]) + 400
    with pytest.raises(ValueError) as caught:
        policy_loss_from_hidden(**arguments)
    assert str(caught.value) == sentence


def test_log_prob_inputs() -> None:
    with pytest.raises(
        ValueError, match=r"^temperature is -1.0; expected a finite number above 0$"
    ):
        token_log_probs(CASE.hidden_TH, CASE.weight_VH, CASE.target_ids_T, temperature=-1.0)
    with pytest.raises(
        ValueError, match=r"^target_ids_T\[0\] is 301; expected an id in \[0, 301\) or -100$"
    ):
        token_log_probs(CASE.hidden_TH, CASE.weight_VH, torch.full((29,), 301))
