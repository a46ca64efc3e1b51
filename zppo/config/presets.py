"""`method.preset`: the loss of a known method under its usual name, as values of other settings.

A preset fills in what the topology does not say; what it says wins. It is resolved when the
topology is read, so plan, `run.json` and checkpoints hold the values themselves. Presets change
the loss and the advantages alone, so they combine with every `method.name` that has a policy loss.

The values are those of the papers; where a paper leaves one open, those that TRL 1.16 or verl 0.9
give it.
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal[
    "grpo",
    "dapo",
    "dr_grpo",
    "rloo",
    "gspo",
    "luspo",
    "cispo",
    "sapo",
    "dppo",
    "icepop",
    "bnpo",
    "gdpo",
]

_GRPO: dict[str, Any] = {
    "advantage": "grpo_bessel",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
}
PRESETS: dict[PresetName, dict[str, Any]] = {
    # Shao et al. 2024: the mean of a response's tokens, then of the responses.
    "grpo": _GRPO | {"loss_normalisation": "sequence"},
    # Yu et al. 2025: a wider upper clip, all tokens alike, no trivial groups, no loss on what was
    # cut off.
    "dapo": _GRPO
    | {
        "clip_high": 0.28,
        "loss_normalisation": "token",
        "dynamic_sampling": True,
        "truncated": "mask",
    },
    # Liu et al. 2025: neither the group's std nor the response's length divides.
    "dr_grpo": _GRPO | {"advantage": "center_only", "loss_normalisation": "fixed_length"},
    # Ahmadian et al. 2024: the other responses of the group are the baseline.
    "rloo": {"advantage": "rloo"},
    # Zheng et al. 2025, section 5.1.
    "gspo": _GRPO
    | {
        "ratio_level": "sequence",
        "loss_normalisation": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    # Liu et al. 2026: GSPO with each response weighted by its length.
    "luspo": _GRPO
    | {
        "ratio_level": "sequence",
        "loss_normalisation": "fixed_length",
        "fixed_length": 1,
        "clip_low": 2e-3,
        "clip_high": 2.5e-3,
    },
    # MiniMax 2025; the bound 5 of the weight is ScaleRL's.
    "cispo": _GRPO
    | {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "loss_normalisation": "token"},
    # Gao et al. 2025.
    "sapo": _GRPO
    | {
        "surrogate": "sapo",
        "sapo_temperature_positive": 1.0,
        "sapo_temperature_negative": 1.05,
        "loss_normalisation": "sequence",
    },
    # Qi et al. 2026: the total variation bounds the step; verl's bound of the ratio is 20.
    "dppo": _GRPO | {"surrogate": "dppo_tv", "dual_clip": 20.0, "loss_normalisation": "token"},
    # Ling Team 2025: tokens on which engine and trainer disagree have no loss.
    "icepop": {"correction": "mask", "correction_floor": 0.5, "correction_cap": 5.0},
    # TRL's: the mean over the tokens of each forward pass.
    "bnpo": _GRPO | {"loss_normalisation": "micro_batch"},
    # Liu et al. 2026: each reward is normalised by itself.
    "gdpo": _GRPO | {"advantage_rewards": "decoupled"},
}


def with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """A topology as plain data, with the values of its preset where it says nothing; an unknown
    preset is left for the check of its type."""
    method = data.get("method")
    if not isinstance(method, dict):
        return data
    name = method.get("preset")
    values = next((values for known, values in PRESETS.items() if known == name), {})
    return data | {"method": values | method}
