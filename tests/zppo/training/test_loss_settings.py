"""The topology's words become the settings of the loss, and wrong pairs become one sentence."""

from __future__ import annotations

import pytest
import torch

from zppo.config.method import MethodConfig
from zppo.errors import UserError
from zppo.training.loss_settings import loss_settings, old_log_probs
from zppo_kernels import PolicyLossSettings
from zppo_protocol.values import Sampling

SAMPLING = Sampling(max_new_tokens=8)
PROXIMAL, BEHAVIOUR, FROZEN = (
    torch.tensor([-1.0, -3.0]),
    torch.tensor([-2.0, -9.0]),
    torch.tensor([False, True]),
)
WHERE_SAMPLED = [-2.0, -3.0]
"""The behaviour log-probs, but the proximal one for the token of a frozen model."""


def test_defaults_are_table_8() -> None:
    assert loss_settings(MethodConfig(), SAMPLING) == PolicyLossSettings(
        clip_low=0.20,
        clip_high=0.28,
        dual_clip=10.0,
        temperature=1.0,
        correction="truncate",
        correction_cap=2.0,
    )


def test_every_word_arrives() -> None:
    method = MethodConfig(
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=None,
        correction="mask",
        correction_cap=3.0,
        loss_normalisation="sequence",
    )
    assert loss_settings(method, Sampling(max_new_tokens=8, temperature=0.7)) == PolicyLossSettings(
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=None,
        temperature=0.7,
        correction="mask",
        correction_cap=3.0,
        normalisation="sequence",
    )


def test_greedy_sampling_reports_the_plain_softmax() -> None:
    assert (
        loss_settings(MethodConfig(), Sampling(max_new_tokens=8, temperature=0.0)).temperature
        == 1.0
    )


def test_ratio_against_proximal_keeps_the_behaviour_weight() -> None:
    old, behaviour = old_log_probs(MethodConfig(), PROXIMAL, BEHAVIOUR, FROZEN)
    assert behaviour is not None
    assert (old.tolist(), behaviour.tolist()) == (PROXIMAL.tolist(), WHERE_SAMPLED)


def test_ratio_against_behaviour_has_nothing_to_correct() -> None:
    method = MethodConfig(ratio="behaviour")
    assert loss_settings(method, SAMPLING).correction == "none"
    old, behaviour = old_log_probs(method, PROXIMAL, BEHAVIOUR, FROZEN)
    assert behaviour is None and old.tolist() == WHERE_SAMPLED


def test_a_dual_clip_inside_the_clip_is_the_users_error() -> None:
    with pytest.raises(UserError) as error:
        loss_settings(MethodConfig(dual_clip=1.1), SAMPLING)
    assert str(error.value) == "method: dual_clip is 1.1; expected None or at least 1 + clip_high"
