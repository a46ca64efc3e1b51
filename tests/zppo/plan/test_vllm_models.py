"""What vLLM asks of a model and of what is installed: refused before a run, each in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs
from served import student_of

from zppo.errors import UserError
from zppo.plan.engines import vllm_models
from zppo.plan.engines.vllm_models import (
    check_recurrent_on_cpu,
    check_torchvision,
    torchvision_problem,
)
from zppo.plan.model_folder import ModelFacts

FACTS = ModelFacts(
    parameters=1, context=512, hidden=64, layers=4, kv_heads=1, head_dim=32, vocabulary=40,
    states=3 * 1000, without_keys=3, delta_widths=(128, 128),
)  # fmt: skip


def refused(facts: ModelFacts, dtype: str = "bfloat16", **arguments: Any) -> str:
    served = student_of("m", engine="vllm", **arguments)
    served = structs.replace(served, model=structs.replace(served.model, dtype=dtype))
    with pytest.raises(UserError) as caught:
        check_recurrent_on_cpu(arguments, facts, served)
    return str(caught.value)


def test_what_vllm_cannot_do_with_recurrent_layers_on_a_cpu() -> None:
    assert refused(FACTS, enable_prefix_caching=True) == (
        "actors.rollout.engine_args.enable_prefix_caching is true; expected false on a CPU, where "
        "vLLM keeps no states of the recurrent layers of 'm' (student.model) for a prefix"
    )
    assert refused(FACTS, "float32") == (
        "student.dtype is 'float32'; expected 'bfloat16' on a CPU, where vLLM computes the "
        "recurrent layers of 'm' (student.model) in nothing else; or actors.rollout.engine "
        "'transformers'"
    )
    for widths in ((32, 32), (128, 64)):
        assert refused(structs.replace(FACTS, delta_widths=widths)) == (
            f"student.model: 'm' has recurrent layers with keys of width {widths[0]} and values of "
            f"width {widths[1]}; on a CPU vLLM serves 64 and 128 only, both alike, the engine "
            "'transformers' any"
        )


def test_other_models_are_not_asked() -> None:
    plain = structs.replace(FACTS, states=0, without_keys=0, delta_widths=None)
    check_recurrent_on_cpu({"enable_prefix_caching": True}, plain, student_of("m", engine="vllm"))


def test_absent_torchvision_is_named_for_models_that_need_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_torchvision("qwen3_5_text", student_of("m", engine="vllm"))
    assert str(caught.value) == (
        "actors.rollout.engine is 'vllm', whose code of 'm' (student.model) needs torchvision, "
        "which is not installed; install the build that fits the installed torch (docs/vllm.md), "
        "or choose the engine 'transformers'"
    )
    check_torchvision("llama", student_of("m", engine="vllm"))


@pytest.mark.parametrize(
    ("torchvision", "beside", "problem"),
    [
        ("0.28.0+cu130", "2.13.0+cpu", "is built for cu130, and torch for cpu"),
        ("0.28.0+cu128", "2.13.0+cu130", "is built for cu128, and torch for cu130"),
        ("0.28.0+cu130", "2.13.0+cu130", None),
        ("0.28.0+cpu", "2.13.0+cpu", None),
        ("0.28.0+cpu", "2.13.0+cu130", None),
        ("0.28.0", "2.13.0", None),
        ("0.28.0+python", "2.13.0+cpu", None),
        ("0.28.0+cu130", "2.13.0a0+git1234", None),
    ],
)
def test_a_build_for_other_devices_is_known_by_its_version(
    torchvision: str, beside: str, problem: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def found(name: str) -> Any:
        return SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])

    for name, version in (("torchvision", torchvision), ("torch", beside)):
        (tmp_path / name).mkdir()
        lines = f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
        (tmp_path / name / "version.py").write_text(lines)
    monkeypatch.setattr("importlib.util.find_spec", found)
    assert torchvision_problem() == problem


def test_the_builds_of_the_installed_packages_are_read() -> None:
    assert vllm_models._devices("torch") == torch.__version__.partition("+")[2]
    assert vllm_models._devices("numpy") == ""
    assert vllm_models._devices("no_such_package") == ""
