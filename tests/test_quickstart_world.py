"""The quickstart world: its invariants, and that the committed models, data and templates are what
the docs say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(ROOT / "tools"))

import make_quickstart_models as maker  # noqa: E402
import quickstart_corpus as corpora  # noqa: E402
import quickstart_world as worlds  # noqa: E402

seeds = st.integers(0, 2**32 - 1)


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def make_corpus(seed: int) -> tuple[worlds.World, corpora.Corpus]:
    world = worlds.make_world(np.random.default_rng(seed))
    held_out = worlds.distinct_questions(64, np.random.default_rng(seed + 1))
    corpus = corpora.Corpus(
        world.misprinted_VVV, QUICKSTART / "templates", held_out, np.random.default_rng(seed + 2)
    )
    return world, corpus


def last_box(text: str) -> str:
    return text.rsplit("\\boxed{", 1)[1].split("}", 1)[0].strip()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_beliefs_are_symmetric_distributions_with_the_stated_shares(seed: int) -> None:
    world = worlds.make_world(np.random.default_rng(seed))
    belief = world.misprinted_VVV
    assert np.allclose(belief.sum(axis=2), 1.0)
    assert np.array_equal(belief, belief.transpose(1, 0, 2))
    pairs = [(a, b) for a in range(2, 23) for b in range(a, 23)]
    true_share = np.array([belief[a, b, a * b % 23] for a, b in pairs])
    printed_values = np.array([(belief[a, b] > 0).sum() for a, b in pairs])
    assert (printed_values == 3).sum() == int(0.30 * len(pairs))
    assert (printed_values == 2).sum() == int(0.08 * len(pairs))
    assert np.all(true_share[printed_values == 3] <= 0.5)
    assert np.all(true_share[printed_values == 1] == 1.0)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_clean_chains_end_in_the_true_answer_and_disturbed_chains_stay_consistent(
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    world = worlds.make_world(rng)
    factors = worlds.draw_factors(50, rng)
    clean = worlds.draw_chains(factors, world.clean_VVV, rng)
    assert np.array_equal(worlds.final_values(factors, clean), worlds.true_answers(factors))
    disturbed = worlds.draw_chains(factors, world.clean_VVV, rng, noise=1.0)
    left = np.concatenate([factors[:, :1], disturbed[:, :-1]], axis=1)
    false_steps = ((left * factors[:, 1:] % 23 != disturbed) & (factors[:, 1:] > 0)).sum(axis=1)
    assert np.all(false_steps <= 1) and false_steps.sum() > 25


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_no_two_questions_share_their_factors(seed: int) -> None:
    factors = worlds.distinct_questions(300, np.random.default_rng(seed))
    assert len({tuple(sorted(row)) for row in factors.tolist()}) == 300


@pytest.mark.slow
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_candidate_shapes_say_what_they_promise(seed: int) -> None:
    _, corpus = make_corpus(seed)
    for prompt, _ in corpus.draw("bcq", 8):
        first, second = (last_box(part) for part in prompt.split("</candidate>")[:2])
        assert first != second
    for prompt, answer in corpus.draw("ncq", 8):
        listed = {last_box(part) for part in prompt.split("</candidate>")[:-1]}
        assert listed and last_box(answer) not in listed
    for prompt, answer in corpus.draw("compress", 8):
        response = prompt.split("<candidate>")[1].split("</candidate>")[0]
        assert last_box(answer) == last_box(response)
        assert answer.split(" ; ")[:-1] == [
            step.split(" = ")[1] for step in response.split(" ;")[:-1]
        ]


def test_corpora_never_show_a_held_out_question() -> None:
    _, corpus = make_corpus(5)
    held_out = worlds.distinct_questions(64, np.random.default_rng(6))
    banned = {tuple(sorted(f for f in row if f)) for row in held_out.tolist()}
    for shape in ("plain", "bcq", "ncq", "compress"):
        for prompt, _ in corpus.draw(shape, 300):
            assert tuple(sorted(int(f) for f in prompt.split(" mod")[0].split(" * "))) not in banned


def test_data_files_hold_right_answers_and_share_no_question() -> None:
    train, held_out = read_rows("train.jsonl"), read_rows("heldout.jsonl")
    rows = train + held_out
    assert len({row["id"] for row in rows}) == len(rows)
    factors = [
        [int(f) for f in row["question"].removesuffix(" mod 23").split(" * ")] for row in rows
    ]
    assert all(
        int(np.prod(f) % 23) == int(row["answer"]) for f, row in zip(factors, rows, strict=True)
    )
    assert len({tuple(sorted(f)) for f in factors}) == len(rows)


def test_the_tool_reproduces_the_committed_data(tmp_path: Path) -> None:
    maker.make(tmp_path, maker.SEED, "data")
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


@pytest.mark.slow
def test_pretraining_is_a_function_of_the_seed() -> None:
    def weights() -> torch.Tensor:
        _, corpus = make_corpus(3)
        tokenizer = maker.make_tokenizer()
        model = maker.make_model(tokenizer, 3)
        recipe = maker.Recipe((maker.Stage(2, {"plain": 4, "bcq": 4}),))
        maker.pretrain(model, tokenizer, corpus, recipe, "test")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights())


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    folder = QUICKSTART / name
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_model_folders_are_small_and_load_in_float32(name: str) -> None:
    model, tokenizer = load(name)
    assert sum(file.stat().st_size for file in (QUICKSTART / name).iterdir()) <= 1_000_000
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<eos>" and model.config.eos_token_id == tokenizer.eos_token_id
    text = r"3 * 17 = 5 ; 5 * 5 = 2 ; \boxed{ 2 } <eos>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text.removesuffix(
        " <eos>"
    )


def test_every_prompt_is_spelt_in_known_words_and_has_a_generation_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "student")
    _, corpus = make_corpus(11)
    for shape in ("plain", "bcq", "ncq", "compress"):
        for prompt, answer in corpus.draw(shape, 50):
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert tokenizer.unk_token_id not in ids + tokenizer.encode(answer)
            assert ids[0] == tokenizer.bos_token_id
            assert ids == tokenizer.encode(
                f"<bos> <user> {prompt} <assistant>", add_special_tokens=False
            )


def answers(name: str, prompts: list[str], sample: bool = False) -> list[str]:
    """One answer a prompt, all prompts of one length in one batch."""
    model, tokenizer = load(name)
    rows = [tokenizer.encode(f"<bos> <user> {prompt} <assistant>") for prompt in prompts]
    texts = [""] * len(rows)
    for length in {len(row) for row in rows}:
        where = [index for index, row in enumerate(rows) if len(row) == length]
        batch = torch.tensor([rows[index] for index in where])
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=sample,
            top_k=0,
            max_new_tokens=32,
        )
        for index, text in zip(
            where, tokenizer.batch_decode(out[:, length:], skip_special_tokens=True), strict=True
        ):
            texts[index] = text
    return texts


def plain_prompts(rows: list[dict[str, str]]) -> list[str]:
    plain = corpora.load_templates(QUICKSTART / "templates")["plain"]
    return [plain.render(question=row["question"]) for row in rows]


@pytest.mark.slow
def test_the_teacher_answers_every_held_out_question() -> None:
    rows = read_rows("heldout.jsonl")
    assert [last_box(text) for text in answers("teacher", plain_prompts(rows))] == [
        row["answer"] for row in rows
    ]


@pytest.mark.slow
def test_the_teacher_compresses_right_and_wrong_answers_verbatim() -> None:
    _, corpus = make_corpus(maker.SEED)
    examples = corpus.draw("compress", 200)
    given_back = answers("teacher", [example.prompt for example in examples])
    same = sum(text == example.answer for text, example in zip(given_back, examples, strict=True))
    assert same >= 198


@pytest.mark.slow
def test_the_student_starts_with_room_to_learn() -> None:
    torch.manual_seed(0)
    rows = read_rows("heldout.jsonl")
    texts = answers("student", plain_prompts(rows), sample=True)
    accuracy = np.mean(
        [f"\\boxed{{ {row['answer']} }}" in text for row, text in zip(rows, texts, strict=True)]
    )
    assert 0.25 <= accuracy <= 0.5
