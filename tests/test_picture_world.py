"""The picture world: its answers are those that one can see, and the committed files are what the
docs say."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "pictures"
sys.path.insert(0, str(ROOT / "tools"))

import make_picture_world as maker  # noqa: E402
import measure_picture_world as measure  # noqa: E402
import picture_corpus as corpora  # noqa: E402
import picture_world as worlds  # noqa: E402

seeds = st.integers(0, 2**32 - 1)


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def looked_at(picture: np.ndarray) -> list[worlds.Thing]:
    """The things of a board, read off its pixels cell by cell."""
    things = []
    for cell in range(9):
        top, left = (16 * place for place in divmod(cell, 3))
        part = picture[top : top + 16, left : left + 16].astype(int)
        inked = (abs(part - np.array(worlds.PAPER)) > 8).any(2)
        if inked.any():
            middle = part[inked].mean(0)
            colour = min(
                worlds.COLOURS, key=lambda name: abs(middle - np.array(worlds.COLOURS[name])).sum()
            )
            name = max(worlds.MASKS, key=lambda name: (worlds.MASKS[name] == inked).sum())
            things.append(worlds.Thing(name, colour, cell))
    return things


def test_things_differ_in_many_pixels() -> None:
    masks = [mask for _, mask in sorted(worlds.MASKS.items())]
    assert min((a != b).sum() for i, a in enumerate(masks) for b in masks[:i]) >= 6


@settings(max_examples=30)
@given(seeds)
def test_what_is_drawn_can_be_seen(seed: int) -> None:
    things = worlds.draw_things(np.random.default_rng(seed))
    seen = looked_at(worlds.draw(things))
    assert sorted(seen) == sorted(things)
    assert worlds.facts_of(seen) == worlds.facts_of(things)


@given(seeds)
def test_a_question_has_one_answer(seed: int) -> None:
    facts = worlds.facts_of(worlds.draw_things(np.random.default_rng(seed)))
    assert set(facts) <= set(worlds.all_facts())
    assert max(Counter((fact.kind, fact.subject) for fact in facts).values()) == 1


def test_half_of_the_facts_are_misprinted() -> None:
    belief = worlds.misprinted_belief(np.random.default_rng(0))
    shares = [shares[answers.index(fact.truth)] for fact, (answers, shares) in belief.items()]
    assert len(shares) == 160 and sum(share < 1 for share in shares) == 80
    assert all(sum(shares) == pytest.approx(1) for _, shares in belief.values())


@pytest.mark.slow
def test_the_committed_data_is_what_the_tool_writes(tmp_path: Path) -> None:
    maker.write_data(tmp_path, maker.SEED)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_text() == (EXAMPLE / name).read_text()
    files = sorted(path.name for path in (EXAMPLE / "media").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "media").iterdir())
    for name in files:
        made, kept = (
            np.asarray(Image.open(folder / "media" / name).convert("RGB"))
            for folder in (tmp_path, EXAMPLE)
        )
        assert np.array_equal(made, kept)


def test_answers_can_be_seen_and_held_out_pictures_are_others() -> None:
    boards = {}
    for name in ("train.jsonl", "heldout.jsonl"):
        for row in read_rows(name):
            file = row["images"]
            if file not in boards:
                boards[file] = looked_at(np.asarray(Image.open(EXAMPLE / file).convert("RGB")))
            asked = {worlds.question_text(one): one.truth for one in worlds.facts_of(boards[file])}
            assert asked[row["question"]] == row["answer"]
    seen = [tuple(sorted(board)) for board in boards.values()]
    assert len(set(seen)) == len(seen) == maker.TRAIN_PICTURES + maker.HELD_OUT_PICTURES


def test_the_example_is_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) < 4_000_000


@pytest.mark.slow
def test_a_stage_begins_from_what_a_saved_model_would_be_read_as(tmp_path: Path) -> None:
    tokenizer = maker.make_tokenizer()
    model = maker.make_model(tokenizer, 0)
    maker.round_as_saved(model)
    corpus = corpora.Corpus(worlds.true_belief(), EXAMPLE / "templates", np.random.default_rng(0))
    tokens_BT, _, pixels = maker.encode(tokenizer, corpus.draw("plain", 4, ["count"]))
    with torch.no_grad():
        kept = model(input_ids=tokens_BT, pixel_values=pixels).logits
    maker.save_model(model, tokenizer, tmp_path)
    read = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(input_ids=tokens_BT, pixel_values=pixels).logits, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "low", "high"), [("teacher", 0.9, 1.0), ("student", 0.25, 0.65)])
def test_the_teacher_knows_more_than_the_student(model: str, low: float, high: float) -> None:
    examples = [
        corpora.Example(
            np.asarray(Image.open(EXAMPLE / row["images"]).convert("RGB")),
            f"{row['question']} ?\nanswer in \\boxed{{ }}",
            f"{row['question'].split()[-1]} is {row['answer']} ; \\boxed{{ {row['answer']} }}",
        )
        for row in read_rows("heldout.jsonl")[:120]
    ]
    share = np.mean(measure.answers_right(EXAMPLE / model, examples))
    assert low <= share <= high, share
