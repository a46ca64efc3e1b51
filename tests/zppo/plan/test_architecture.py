"""What is read from a model's configuration, and what `--dry-run` refuses because of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from zppo.config.load import load
from zppo.errors import UserError
from zppo.plan.architecture import (
    NO_LIMIT,
    NO_SLOTS,
    UNTRAINED,
    context_of,
    other_state,
    setting,
    slots_window_of,
    window_of,
)
from zppo.plan.machine import Machine
from zppo.plan.make import make_plan
from zppo.plan.model_class import CAUSAL_TABLE, SEEING_TABLE, auto_class
from zppo.plan.model_defaults import completed
from zppo.plan.model_folder import inspect_model

MACHINE = Machine(cores=4, memory=1 << 34, shared=1 << 34)
PAGE = Path(__file__).parents[3] / "docs/models.md"
LATE = r"cannot decode|cannot serve|\((NoneType|no attention heads)\)"
"""What the engine says of a family of which the configuration said nothing."""
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, NO_LIMIT),
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 131072, "rope_parameters": LONG}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "su", "long_factor": [], "short_factor": []},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"full_attention": LONG, "sliding_attention": {}},
            },
            4096,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic"}}, 2048),
        # Their factors are the same at every length.
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {**LONG, "rope_type": "yarn"},
            },
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": None}, 131072),
    ],
)
def test_context_ends_where_positions_change_their_meaning(
    config: dict[str, Any], context: int
) -> None:
    assert context_of(config) == context


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, 512),
        ({"attention_chunk_size": 8192}, 8192),
        ({"window_size": 256}, 256),
    ],
)
def test_window_is_how_far_the_shortest_sighted_layer_looks(
    config: dict[str, Any], window: int | None
) -> None:
    assert window_of(config) == window


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 4096, "floor_scale": 8192}, 4096),
        ({"floor_scale": 8192, "attn_temperature_tuning": False}, None),
        ({"floor_scale": 8192, "attn_temperature_tuning": True}, 8160),
        ({"floor_scale": 20, "attn_temperature_tuning": True}, 1),
    ],
)
def test_slots_end_before_the_number_of_tokens_changes_what_a_layer_computes(
    config: dict[str, Any], window: int | None
) -> None:
    assert slots_window_of(config) == window


def test_state_that_slots_do_not_hold() -> None:
    assert other_state({}) is None
    assert other_state({"layer_types": ["full_attention", "sliding_attention"]}) is None
    assert other_state({"layer_types": ["linear_attention", "full_attention", "conv"]}) is None
    assert other_state({"layer_types": ["indexed_attention", "full_attention"]}) == (
        "indexed_attention"
    )
    assert other_state({"block_types": ["recurrent", "recurrent", "attention"]}) == "recurrent"


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def planned(*overrides: str) -> list[str]:
    """Notes of the plan of the small topology."""
    return make_plan(load(Path("topology.yaml"), overrides), 6, MACHINE).notes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model_type": "roberta"},
            "student.model: 'student' (roberta) is a masked language model, which sees the tokens "
            "that it should predict; expected a decoder-only language model",
        ),
        (
            {"model_type": "bart", "is_encoder_decoder": True},
            "student.model: 'student' (bart) is an encoder-decoder; expected a decoder-only "
            "language model",
        ),
        (
            {"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]},
            "student.model: 'student' (recurrent_gemma) keeps other state than a key-value cache "
            "(recurrent), which the engine 'transformers' does not serve",
        ),
        (
            {"model_type": "cpmant"},
            "student.model: 'student' (cpmant) lets a token see more than the tokens before it, so "
            "it cannot be trained; expected a family that has a number in docs/models.md",
        ),
        (
            {"model_type": "vit"},
            "student.model: 'student' (vit) is of no family that the installed transformers "
            "generates text with; expected one of docs/models.md",
        ),
        (
            {"model_type": "falcon"},
            "student.model: 'student' (falcon) asks more of attention or of a cache than the "
            "engine 'transformers' has; expected a family that has a number in docs/models.md, or "
            "the engine 'vllm'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "student.model: the weights of 'student' are quantised and cannot be trained; expected "
            "a folder in float32 or bfloat16",
        ),
        (
            {"sliding_window": 8},
            "student.sampling.max_new_tokens is 8; expected less than 8, the context of 'student'",
        ),
        (
            {"rope_parameters": LONG | {"original_max_position_embeddings": 8}},
            "student.sampling.max_new_tokens is 8; expected less than 8, the context of 'student'",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_starts(
    small: Path, changes: dict[str, Any], sentence: str
) -> None:
    configure(small / "student", **changes)
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == sentence.replace("'student'", repr(str(small / "student")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": ["llama"]}, "unhashable type: 'list'"),
        ({"text_config": None}, "argument of type 'NoneType' is not iterable"),
        (
            {"max_position_embeddings": "many"},
            "invalid literal for int() with base 10: 'many'",
        ),
    ],
)
def test_settings_that_are_not_of_their_kind_are_one_sentence(
    small: Path, changes: dict[str, Any], reason: str
) -> None:
    configure(small / "student", **changes)
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == (
        f"student.model: {str(small / 'student/config.json')!r} has a setting that is not of its "
        f"kind ({reason}); expected a file as save_pretrained writes it"
    )


def test_files_of_weights_that_are_not_there_are_missed(small: Path) -> None:
    folder = small / "student"
    whole = inspect_model(folder, "student.model").parameters
    one = folder / "model.safetensors"
    (folder / "consolidated.safetensors").write_bytes(one.read_bytes())  # the same weights twice
    assert inspect_model(folder, "student.model").parameters == whole
    header = one.read_bytes()[8:]
    names = json.loads(header[: int.from_bytes(one.read_bytes()[:8], "little")])
    names.pop("__metadata__", None)
    shard = one.rename(folder / "model-00001-of-00002.safetensors")

    def index(**more: str) -> None:
        places = dict.fromkeys(names, shard.name) | more
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    index()
    assert inspect_model(folder, "student.model").parameters == whole
    index(head="model-00002-of-00002.safetensors")
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == (
        f"student.model: {str(folder)!r} is not whole: model-00002-of-00002.safetensors is "
        "missing, which model.safetensors.index.json names"
    )
    index(head=shard.name)
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == (
        f"student.model: {str(shard)!r} lacks head, which model.safetensors.index.json names"
    )


def test_families_without_slots_are_those_that_the_engine_refused() -> None:
    """The page is what the engine itself said of a tiny model of each family."""
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    found_late = {
        row[0].removeprefix("| ") for row in rows if len(row) == 3 and re.search(LATE, row[2])
    }
    assert found_late == NO_SLOTS


def test_families_that_are_not_trained_are_those_that_the_trainer_refused() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    found_late = {
        row[0].removeprefix("| ")
        for row in rows
        if len(row) == 3 and "the trainer cannot use it" in row[1]
    }
    assert found_late == UNTRAINED


@pytest.mark.parametrize(
    ("config", "opened_by"),
    [
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "qwen3_5"}, "AutoModelForImageTextToText"),
        (
            {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},
            "AutoModelForImageTextToText",
        ),
        (
            {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]},
            "AutoModelForCausalLM",
        ),
        (
            {
                "model_type": "qwen3_5",
                "architectures": ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"],
            },
            "AutoModelForImageTextToText",
        ),
        (
            {"model_type": "qwen3_5", "architectures": ["Mine", "Qwen3_5ForCausalLM"]},
            "AutoModelForCausalLM",
        ),
        ({"model_type": "qwen3_5", "architectures": 3}, "AutoModelForImageTextToText"),
        (
            {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"]},
            "AutoModelForImageTextToText",
        ),
        ({"model_type": "mllama_text_model"}, None),
        ({}, None),
    ],
)
def test_a_folder_is_opened_by_the_class_that_its_architectures_name(
    config: dict[str, Any], opened_by: str | None
) -> None:
    assert auto_class(config) == opened_by


def test_the_tables_of_classes_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto

    for name in (CAUSAL_TABLE, SEEING_TABLE):
        for family, of_family in getattr(modeling_auto, name).items():
            config = {"model_type": family, "architectures": [of_family]}
            found = auto_class(config)
            assert found is not None
            table = CAUSAL_TABLE if found == "AutoModelForCausalLM" else SEEING_TABLE
            assert getattr(modeling_auto, table)[family] == of_family


GEMMA = {"model_type": "gemma3_text", "hidden_size": 2560, "sliding_window": 1024}
"""Much of what Gemma 3 4B has on the hub; heads and vocabulary are not in the file."""


@pytest.mark.parametrize(
    "text",
    [
        GEMMA,
        {"model_type": "llama", "vocab_size": 32064},
        {"model_type": "qwen3_5_text", "num_hidden_layers": 24, "head_dim": 64},
        {"model_type": "gpt2", "n_embd": 1024},
        {"model_type": "llama4_text"},
        {"model_type": "mistral", "sliding_window": None},
    ],
)
def test_what_a_configuration_leaves_out_is_what_transformers_has(text: dict[str, Any]) -> None:
    from transformers import AutoConfig

    whole, found = AutoConfig.for_model(**text).to_dict(), completed(text)
    for name, value in found.items():
        if value is not None:
            assert whole[name] == value, name
    assert setting(found, "num_attention_heads") and setting(found, "hidden_size")


def test_an_older_name_that_is_given_beats_a_default() -> None:
    assert setting(completed({"model_type": "opt", "d_model": 5}), "hidden_size") == 5
    assert completed({"model_type": "mine", "n_embd": 5}) == {"model_type": "mine", "n_embd": 5}


def test_a_tower_folder_without_the_defaults_is_planned(small: Path) -> None:
    path = small / "student" / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "gemma3",
                "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": GEMMA | {"num_hidden_layers": 34},
                "vision_config": {"model_type": "siglip_vision_model"},
            }
        )
    )
    facts = inspect_model(small / "student", "student.model")
    assert (facts.hidden, facts.layers, facts.kv_heads, facts.head_dim) == (2560, 34, 4, 256)
    assert (facts.vocabulary, facts.context, facts.window) == (262208, 131072, 1024)


def test_a_window_bounds_only_the_engine_that_knows_none(small: Path) -> None:
    configure(small / "student", sliding_window=16)
    assert any("the student's context has 16" in note for note in planned())
    assert not any(
        "the student's context" in note for note in planned("actors.rollout.engine=simulated")
    )


def test_a_decoder_of_a_masked_family_may_be_tried(small: Path) -> None:
    configure(small / "student", model_type="bert", is_decoder=True)
    assert inspect_model(small / "student", "student.model").family == "bert"


def test_sizes_have_older_names(small: Path) -> None:
    path = small / "student" / "config.json"
    path.write_text(
        json.dumps({"n_head": 2, "n_embd": 8, "n_layer": 3, "n_positions": 32, "vocab_size": 16})
    )
    facts = inspect_model(small / "student", "student.model")
    assert (facts.hidden, facts.layers, facts.kv_heads, facts.context) == (8, 3, 2, 32)
