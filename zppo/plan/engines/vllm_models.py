"""What vLLM asks of a model and of what is installed, which it would say only after minutes of
loading, in lines that do not name the cause."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zppo.config.served import ServedModel
from zppo.errors import UserError
from zppo.plan.model_folder import ModelFacts

NEEDS_TORCHVISION = frozenset(
    {
        *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        *("gemma3", "llava", "llava_next", "llava_onevision", "mistral3", "pixtral", "lfm2_vl"),
        *("internvl", "llama4", "glm4v", "glm4v_moe", "cohere2_vision"),
    }
)
"""Kinds of folders (`model_type`) whose code in vLLM 0.32 imports torchvision, Qwen3.5's on text as
well. Not all of them: the actor says the same of any other when it starts."""
PREFIX_CACHING = "enable_prefix_caching"
"""Off on a CPU for recurrent layers: vLLM 0.32 keeps the states of a prefix only where prompts are
read in parts, which it cannot do there for requests with a seed."""
DELTA_WIDTHS = (64, 128)
"""Widths of heads for which vLLM's CPU kernels of a gated delta rule are compiled."""
DEVICES = ("cu", "rocm", "xpu")
VERSION = re.compile(r"^__version__ = '[^+']*\+(\w+)", re.MULTILINE)


def check_torchvision(kind: str, served: ServedModel) -> None:
    """Raise UserError if vLLM's code of a folder of this `model_type` needs torchvision and cannot
    have it."""
    if kind not in NEEDS_TORCHVISION:
        return
    if problem := torchvision_problem():
        raise UserError(torchvision_sentence(problem, served))


def torchvision_sentence(problem: str, served: ServedModel) -> str:
    """What a user reads whose torchvision has this `problem`."""
    return (
        f"{served.actor_path}.engine is 'vllm', whose code of {served.model.model!r} "
        f"({served.model_path}) needs torchvision, which {problem}; install the build that fits "
        "the installed torch (docs/vllm.md), or choose the engine 'transformers'"
    )


def torchvision_problem() -> str | None:
    """Why torchvision cannot be used; None if nothing is known against it.

    It is not imported, which would import torch: a build for other devices than those of the
    installed torch is known by what its version says.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "is not installed"
    own, beside = _devices("torchvision"), _devices("torch")
    if own.startswith(DEVICES) and beside.startswith((*DEVICES, "cpu")) and own != beside:
        return f"is built for {own}, and torch for {beside}"
    return None


def _devices(package: str) -> str:
    """What a package of PyTorch is built for, as `cu130` or `cpu`; empty if it does not say."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    file = Path(spec.submodule_search_locations[0]) / "version.py"
    found = VERSION.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else ""


def check_recurrent_on_cpu(
    arguments: Mapping[str, Any], facts: ModelFacts, served: ServedModel
) -> None:
    """Raise UserError for what vLLM cannot do on a CPU with a model of recurrent layers."""
    where, model = served.actor_path, f"{served.model.model!r} ({served.model_path})"
    if facts.states and arguments.get(PREFIX_CACHING):
        raise UserError(
            f"{where}.engine_args.{PREFIX_CACHING} is true; expected false on a CPU, where vLLM "
            f"keeps no states of the recurrent layers of {model} for a prefix"
        )
    if facts.delta_widths is None:
        return
    if served.model.dtype != "bfloat16":
        raise UserError(
            f"{served.section}.dtype is {served.model.dtype!r}; expected 'bfloat16' on a CPU, "
            f"where vLLM computes the recurrent layers of {model} in nothing else; or "
            f"{where}.engine 'transformers'"
        )
    key, value = facts.delta_widths
    if key != value or key not in DELTA_WIDTHS:
        raise UserError(
            f"{served.model_path}: {served.model.model!r} has recurrent layers with keys of width "
            f"{key} and values of width {value}; on a CPU vLLM serves "
            f"{' and '.join(map(str, DELTA_WIDTHS))} only, both alike, the engine 'transformers' "
            "any"
        )
