"""Each rule alone, on rows made in both layouts, and what a row that passes looks like to the data
room."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.inspect import type_info
from PIL import Image
from raw_data import LAYOUTS, RECIPE, first, png, second, write_recipe, write_source

from zppo.config.explain import settings
from zppo.config.topology import DataConfig
from zppo.curation.build import Order, build
from zppo.curation.examples import RULES
from zppo.curation.recipe import NamesConfig, Recipe, read_recipe
from zppo.curation.report import Report
from zppo.curation.sieve import PromptLengths
from zppo.data.corpus import load_questions

Row = dict[str, Any]


def made(
    folder: Path,
    rows: list[Row],
    others: list[Row] | None = None,
    layout: str = "parquet",
    lengths: PromptLengths | None = None,
    **changes: Any,
) -> Report:
    """Build in FOLDER/out, from rows of the first source and of the second."""
    recipe = write_recipe(folder / "recipe.yaml", **changes)
    folders = {
        "first": write_source(folder / "first", rows, layout),
        "second": write_source(folder / "second", others or [second(1)], layout),
    }
    order = Order(
        name="mine",
        recipe=read_recipe(str(recipe)),
        folders=folders,
        lengths=lengths,
        out=folder / "out",
    )
    return build(order, lambda line: None)


def lines(folder: Path) -> list[Row]:
    text = (folder / "out" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def gif_of_noise() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((100, 100), 50).save(stream, "GIF")
    return stream.getvalue()


TORN = png(7)[:-20]
CASES: list[tuple[str, Row, str]] = [
    ("not_listed", first(2, data_source="chartqa"), "'chartqa'"),
    ("question", first(2, question="<image> "), "the question is empty"),
    ("answer", first(2, answer="  "), "the gold answer is empty"),
    (
        "answer",
        first(2, answer="blue", reward_type="multiple_choice"),
        "'blue', which the grader 'choice' can never meet",
    ),
    ("reward_type", first(2, reward_type="grounding"), "'grounding'"),
    ("long_answer", first(2, answer="7" * 21), "21 characters"),
    ("few_pictures", first(2, images=[]), "0"),
    ("unreadable_picture", first(2, images=[png(2), TORN]), "is unreadable"),
    ("unreadable_picture", first(2, images=[b"hello"]), "is not a picture"),
    ("small_picture", first(2, images=[png(2, 99, 400)]), "99 × 400 pixels"),
    ("long_picture", first(2, images=[png(2, 20_100, 100)]), "its sides are more than 200 to 1"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rule", "row", "detail"), CASES)
def test_a_rule_drops_its_row_alone(
    tmp_path: Path, layout: str, rule: str, row: Row, detail: str
) -> None:
    report = made(
        tmp_path, [first(1), row, first(3, images=[png(3), gif_of_noise()])], layout=layout
    )
    assert [(one.rule, one.rows) for one in report.dropped] == [(rule, 1)]
    (sample,) = report.dropped[0].samples
    assert detail in sample.detail
    where = ":2" if layout == "jsonl" else ", row 2"
    assert sample.place == f"{tmp_path}/first/train-00000-of-00001.{layout}{where}"
    assert (report.rows, report.kept) == (4, 3)
    assert {row["answer"] for row in lines(tmp_path) if row["source"] == "first"} == {"1", "3"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_solved_too_often(tmp_path: Path, layout: str) -> None:
    """Above the limit, not at it; a row without a rate is kept."""
    rates = [0.0, 0.5, 0.50001, 1.0, None]
    others = [second(i, pass_rate=rate) for i, rate in enumerate(rates)]
    report = made(tmp_path, [first(1)], others, layout)
    assert [(one.rule, one.rows) for one in report.dropped] == [("pass_rate", 2)]
    kept = {row["answer"] for row in lines(tmp_path) if row["source"] == "second"}
    assert kept == {"0", "1", "4"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_source_keeps_a_sub_dataset(tmp_path: Path, layout: str) -> None:
    """Under one canonical name, even where none of its rows is good enough."""
    dropped = first(1, data_source="tqa", answer="x" * 30)
    others = [second(1), second(2, source="AI2D"), second(3, source="stem_ai2d-merged")]
    report = made(tmp_path, [first(1), dropped], others, layout)
    assert {(one.rule, one.rows) for one in report.dropped} == {
        ("long_answer", 1),
        ("earlier_source", 2),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_question_about_the_same_picture_is_kept_once(tmp_path: Path, layout: str) -> None:
    rows = [
        first(1),
        first(1, question="how LONG is  side 1?", answer="2"),  # the same but for case and spaces
        first(1, images=[png(2)]),
        first(1, images=[png(1), png(2)]),
        first(1, images=[png(2), png(1)]),
    ]
    report = made(tmp_path, rows, layout=layout)
    assert [(one.rule, one.rows) for one in report.dropped] == [("duplicate", 1)]
    assert report.kept == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caps_of_tiers(tmp_path: Path, layout: str) -> None:
    rows = [first(i) for i in range(20)] + [first(i, data_source="tqa") for i in range(100, 103)]
    others = [second(i) for i in range(9)] + [second(i, source="Raven") for i in range(50, 60)]
    report = made(tmp_path, rows, others, layout)
    kept = {(one.source, one.sub_dataset): (one.rows, one.cap) for one in report.sub_datasets}
    assert kept == {
        ("first", "ai2d"): (6, 6),
        ("first", "tqa"): (3, 6),
        ("second", "geo3k"): (6, 6),
        ("second", "raven"): (3, 3),
    }
    assert [(one.rule, one.rows) for one in report.dropped] == [("cap", 14 + 3 + 7)]
    assert report.rows == report.kept + sum(one.rows for one in report.dropped)


def test_another_seed_leaves_other_rows(tmp_path: Path) -> None:
    chosen = []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made(folder, [first(i) for i in range(20)], seed=seed)
        chosen.append({row["answer"] for row in lines(folder) if row["source"] == "first"})
    assert len(chosen[0]) == len(chosen[1]) == 6 and chosen[0] != chosen[1]


class WordTokenizer:
    """A token a word, and four of a frame."""

    chat_template = "there is one"

    def apply_chat_template(self, chats: list[Any], **options: Any) -> list[list[int]]:
        return [[0] * (4 + len(chat[-1]["content"].split())) for chat in chats]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_prompts(tmp_path: Path, layout: str) -> None:
    """The question with its closing instruction, and one token for each 32 × 32 pixels of the
    picture after its resize, with two marks."""
    from zppo.prompting.prompts import PromptSet

    prompts = PromptSet()
    lengths = PromptLengths(prompts=prompts, tokenizer=WordTokenizer(), folder=tmp_path)
    closing = (prompts._environment.get_template("closing.j2").render()).split()
    picture = 20 * 10 + 2
    limit = 4 + 5 + len(closing) + picture
    rows = [
        first(1, question="one two three four five", images=[png(1, 640, 320)]),
        first(2, question="one two three four five six", images=[png(1, 640, 320)]),
        first(3, question="one two three four five", images=[png(1, 640, 321 + 16)]),
    ]
    filters = RECIPE["filters"] | {"max_prompt_tokens": limit}
    report = made(tmp_path, rows, [second(1)], layout, lengths, filters=filters)
    assert [(one.rule, one.rows) for one in report.dropped] == [("long_prompt", 2)]
    assert {one.detail for one in report.dropped[0].samples} == {
        f"{limit + 1} tokens",
        f"{limit + 20} tokens",
    }


def test_a_row_of_the_corpus(tmp_path: Path) -> None:
    """Pictures of several, the grader by reward type, marks taken out; the data room reads it all
    and finds nothing bad."""
    chat = [
        {"role": "system", "content": "Answer in a box."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which one?"}]},
    ]
    jpeg = io.BytesIO()
    Image.new("RGB", (200, 130), "red").save(jpeg, "JPEG")
    row = first(1, reward_type="multiple_choice", answer="B", images=[png(1), jpeg.getvalue()])
    row["extra_info"]["question"] = chat
    made(tmp_path, [row], layout="jsonl", tiers=[])
    (line,) = [line for line in lines(tmp_path) if line["source"] == "first"]
    assert line["question"] == "Which one?" and line["grader"] == "choice"
    assert [Path(path).suffix for path in line["images"]] == [".png", ".jpg"]
    assert (tmp_path / "out" / line["images"][1]).read_bytes() == jpeg.getvalue()
    corpus = load_questions(str(tmp_path / "out"), DataConfig(train="x"), Path())
    assert corpus.bad_rows == [] and len(corpus.questions) == 2
    assert {question.grader for question in corpus.questions} == {"choice", "math"}
    assert {len(question.media) for question in corpus.questions} == {1, 2}


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "2 turns"),
        ([{"role": "assistant", "content": "b"}], "1 turns"),
        ([], "0 turns"),
        ([{"role": "user", "content": []}], "the question is empty"),
    ],
)
def test_conversations_are_no_questions(tmp_path: Path, messages: list[Row], detail: str) -> None:
    report = made(tmp_path, [first(1), first(2, question=messages)], layout="jsonl")
    assert [(one.rule, one.rows) for one in report.dropped] == [("question", 1)]
    assert report.dropped[0].samples[0].detail.startswith(detail)


def test_without_tiers_all_is_kept(tmp_path: Path) -> None:
    report = made(tmp_path, [first(i, data_source=f"s{i}") for i in range(20)], tiers=[])
    assert report.kept == 21 and report.sub_datasets[0].cap is None


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("stem-ai2d_merged", "ai2d"),
        ("FineVision-ai2d_merged", "ai2d"),
        ("AI2D", "ai2d"),
        ("CoSyn_400k_math", "cosyn_math"),
        ("FineVision-geo170k(qa)", "geo170k"),
        ("FineVision-geometry3k(mathv360k)", "geo3k"),
        ("Geometry3K", "geo3k"),
        ("FineVision-visualwebinstruct(filtered)", "visualwebinstruct"),
        ("mm-openr1", "mmopenr1"),
        ("mmopenr1-8k", "mmopenr1"),
        ("WeMath2-Standard", "wemath"),
        ("wemath20_standard", "wemath"),
        ("chartqa_difficulty", "chartqa"),
        ("arxivqa_formatted", "arxivqa"),
        ("multihop_qa", "multihop"),
        ("Euclid30K", "euclid"),
        ("LLaVA-CoT", "llava_cot"),
        ("Zebra-CoT", "zebra_cot"),
        ("ViRL39K", "virl39k"),
        ("objects365", "objects365"),
    ],
)
def test_names_of_the_papers_recipe(name: str, canonical: str) -> None:
    assert read_recipe("zppo77k").names.canonical(name) == canonical


def test_the_papers_recipe_has_the_papers_tiers() -> None:
    """Appendix B.1: 14 and 15 sub-datasets of Vero, 12 and 5 of MMFineReason."""
    caps = read_recipe("zppo77k").caps
    counts = {
        (source, cap): sum((s, c) == (source, cap) for (s, _), c in caps.items())
        for source in ("vero", "mmfinereason")
        for cap in (2800, 1400)
    }
    assert counts == {
        ("vero", 2800): 14,
        ("vero", 1400): 15,
        ("mmfinereason", 2800): 12,
        ("mmfinereason", 1400): 5,
    }


def test_names_of_none() -> None:
    assert NamesConfig().canonical("A b--C") == "a_b_c"
    assert NamesConfig().canonical("数学-Ω") == "数学_ω"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_without_a_name_are_of_their_source(tmp_path: Path, layout: str) -> None:
    """And not of one sub-dataset without a name, of which the first source would have all."""
    rows = [first(1, data_source=None), first(2, data_source="数学")]
    others = [second(3, source=None), second(4, source="物理")]
    report = made(tmp_path, rows, others, layout, tiers=[])
    assert [(one.source, one.sub_dataset) for one in report.sub_datasets] == [
        ("first", "first"), ("first", "数学"), ("second", "second"), ("second", "物理"),
    ]  # fmt: skip


PAGE = (Path(__file__).parents[3] / "docs" / "corpus.md").read_text(encoding="utf-8")


def test_the_page_names_every_rule_and_setting() -> None:
    assert [rule for rule in RULES if f"`{rule}`" not in PAGE] == []
    names = [path.rpartition(".")[2] for path in settings(type_info(Recipe))]
    assert [name for name in names if f"`{name}`" not in PAGE and f"{name}:" not in PAGE] == []


def test_the_recipe_of_the_page_builds(tmp_path: Path) -> None:
    text = PAGE.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    school = [
        {"problem": f"{i} + 1?", "answer": "B", "topic": "Algebra-v2", "kind": "letter"}
        for i in range(3)
    ]
    olympiad = [{"question": f"{i}?", "solution": "1", "rate": i / 2} for i in range(3)]
    folders = {
        "school": write_source(tmp_path / "school", school, "jsonl"),
        "olympiad": write_source(tmp_path / "olympiad", olympiad, "parquet"),
    }
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    out = tmp_path / "out"
    order = Order(name="mine", recipe=recipe, folders=folders, lengths=None, out=out)
    report = build(order, lambda line: None)
    assert (report.kept, [rule.rule for rule in report.dropped]) == (5, ["pass_rate"])
    assert {(row["grader"], row["sub_dataset"]) for row in lines(tmp_path)} == {
        ("choice", "algebra"),
        ("math", "olympiad"),
    }


HERE = {"type": "image", "text": None}


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("<image> Is <image> it?", "<image> Is <image> it?"),
        ("<image>\n<image> Is it?", "Is it?"),
        ("Is <image> it?", "Is it?"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Is"}, HERE, HERE]}],
            "Is<image><image>",
        ),
    ],
)
def test_pictures_between_words_keep_their_places(tmp_path: Path, asked: object, kept: str) -> None:
    """Where marks or parts are one for each; a corpus says so with marks, which a run reads."""
    made(tmp_path, [first(1, question=asked, images=[png(1), png(2)])], layout="jsonl")
    line = next(one for one in lines(tmp_path) if one["source"] == "first")
    assert line["question"] == kept
    corpus = load_questions("out", DataConfig(train="out"), tmp_path)
    [question] = [one for one in corpus.questions if len(one.media) == 2]
    assert question.has_places == ("<image>" in kept)


@pytest.mark.parametrize("mark", ["", "<image>", "[pic]"])
def test_marks_of_a_corpus_are_one_for_each_picture(tmp_path: Path, mark: str) -> None:
    """Whatever the recipe calls them: what a run would take for a mark is one, or not there."""
    asked = ["Is <image> an <image>?", "See <image> now.", "<image> What is it?"]
    rows = [first(i, question=one, images=[png(i)]) for i, one in enumerate(asked, start=1)]
    made(tmp_path, rows, layout="jsonl", picture_mark=mark)
    corpus = load_questions("out", DataConfig(train="out"), tmp_path)
    texts = {question.words for question in corpus.questions}
    assert {"Is an ?", "See [picture 1] now.", "What is it?"} <= texts
