"""Trainer and engine against transformers' own eager attention, one family for each mechanism that
a faster path could get wrong; `tools/model_families.py` does the same for all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import model_families as tool  # noqa: E402
import tiny_models  # noqa: E402

pytestmark = pytest.mark.slow

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 4.0, 9.0, 20.0],
    "original_max_position_embeddings": 24,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
HOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cap of the scores at 1": ("gemma2", {"attn_logit_softcapping": 1.0}),
    "the same without windows": ("vaultgemma", {"attn_logit_softcapping": 1.0}),
    "window without layer_types": ("mistral", {}),
    "window and fused projections": ("phi3", {}),
    "factors that change at a length": ("phi3", {"rope_parameters": LONG_ROPE}),
    "factors that grow with the length": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
    ),
    "values narrower than keys": ("deepseek_v3", {}),
    "the same, other projections": ("minicpm3", {}),
    "chunks, and layers without positions": ("llama4_text", {}),
    "scores that grow with the length": (
        "llama4_text",
        {"attention_chunk_size": 64, "floor_scale": 64},
    ),
    "the same in layers that see everything": (
        "llama4_text",
        {"no_rope_layers": [0] * 4, "floor_scale": 64},
    ),
    "learned positions": ("gpt2", {}),
    "a cap of the logits, a head of its own scale": ("cohere2", {}),
}
REFUSED: dict[str, tuple[str, float | str, str]] = {
    "sees the whole text": (
        "bert",
        "student.model: 'FOLDER' (bert) is a masked language model, which sees the tokens that it "
        "should predict; expected a decoder-only language model",
        "student.model: 'FOLDER' (bert) is a masked language model, which sees the tokens that it "
        "should predict; expected a decoder-only language model",
    ),
    "sinks beside the scores": (
        "gpt_oss",
        tool.HOLDS,
        "student.model: the engine 'transformers' cannot decode 'FOLDER' from slots (attention "
        "with s_aux)",
    ),
    "recurrent layers": (
        "recurrent_gemma",
        tool.HOLDS,
        "student.model: 'FOLDER' (recurrent_gemma) keeps other state than a key-value cache "
        "(recurrent), which the engine 'transformers' does not serve",
    ),
}


@pytest.mark.parametrize("case", HOLDS)
def test_trainer_and_engine_compute_what_the_authors_compute(case: str) -> None:
    family, changes = HOLDS[case]
    verdict = tool.examine(family, **changes)
    assert verdict.failed == ""
    for found in (verdict.trainer, verdict.engine):
        assert isinstance(found, float) and found < tool.HOLDS, verdict


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_in_a_sentence(case: str) -> None:
    family, trainer, engine = REFUSED[case]
    verdict = tool.examine(family)
    assert verdict.failed == "" and verdict.engine == engine
    if isinstance(trainer, str):
        assert verdict.trainer == trainer
    else:
        assert isinstance(verdict.trainer, float) and verdict.trainer < trainer


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {name: tiny_models.SIZES[name] for name in ("vocab_size", "d_model", "encoder_layers")}
    config = BartConfig(**sizes, decoder_layers=1, decoder_ffn_dim=8, encoder_ffn_dim=8)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path)
    verdict = tool.examine_folder("bart", tmp_path)
    sentence = (
        "student.model: 'FOLDER' (bart) is an encoder-decoder; expected a decoder-only language "
        "model"
    )
    assert (verdict.trainer, verdict.engine, verdict.failed) == (sentence, sentence, "")


def test_the_page_sorts_what_holds_from_what_is_refused_and_what_was_not_built() -> None:
    text = tool.page(
        [
            tool.Verdict("wrong", trainer=2.0, engine=float("nan")),
            tool.Verdict("good", trainer=2e-6, engine=3e-6),
            tool.Verdict("half", 1e-6, "student.model: 'FOLDER' (half) keeps other state"),
            tool.Verdict("absent", failed="cannot be built tiny: KeyError: 'x'"),
        ]
    )
    built, rest = text.split("\nNot examined")
    assert "1 of 3 families hold in both, and 2 can be trained." in built
    assert built.splitlines()[-3:] == [
        "| good | 2e-06 | 3e-06 |",
        "| half | 1e-06 | it (half) keeps other state |",
        "| wrong | **2e+00** | **nan** |",
    ]
    assert rest.splitlines()[-1] == "| absent | cannot be built tiny: KeyError: 'x' |"


def test_the_page_is_of_the_transformers_that_is_installed() -> None:
    """And everything on it that can be computed is computed right."""
    text = tool.PAGE.read_text(encoding="utf-8")
    assert f"of transformers {transformers.__version__} knows" in text
    assert "**" not in text
    assert all(f"| {family} |" in text for family in tiny_models.families())
