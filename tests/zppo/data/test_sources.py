"""Sources of questions: tables, data set folders and procedural tasks obey the same rules as JSONL,
row by row."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.config import load as topologies
from zppo.config.topology import DataConfig
from zppo.data.corpus import Corpus, bad_rows_text, load_questions
from zppo.data.question import Question
from zppo.data.sources import tables
from zppo.data.sources.layouts import Wanted
from zppo.errors import UserError
from zppo.grading import get_grader, grade, quick_grade, shown_gold
from zppo.grading.procedural import GUARDS

ROWS = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]
needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="the package reasoning-gym is not installed",
)


def load(path: Path | str, **options: Any) -> Corpus:
    return load_questions(str(path), DataConfig(train=str(path), **options), Path.cwd())


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **options)
    return str(error.value)


def ids(corpus: Corpus) -> list[str]:
    return [question.id for question in corpus.questions]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_stream(path: Path, rows: list[dict[str, Any]]) -> Path:
    """An Arrow stream, as `save_to_disk` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def save_to_disk(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    """The layout of `datasets.Dataset.save_to_disk`."""
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_stream(folder / name, rows)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


# ---- tables --------------------------------------------------------------------------------------


def test_parquet_and_arrow_give_the_questions_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_parquet(tmp_path / "train.parquet", ROWS)
    write_stream(tmp_path / "train.arrow", ROWS)
    table = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    names = ["train.jsonl", "train.parquet", "train.arrow", "file.arrow"]
    first, *others = (load(tmp_path / name).questions for name in names)
    assert len(first) == 5 and all(other == first for other in others)


def test_columns_can_be_named_and_others_are_not_read(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "solution": i / 10, "big": b"\xff" * 1000} for i in range(3)]
    corpus = load(
        write_parquet(tmp_path / "t.parquet", rows),
        fields={"question": "problem", "answer": "solution"},
    )
    assert [question.answer for question in corpus.questions] == ["0.0", "0.1", "0.2"]
    source = tables.open_table(
        tmp_path / "t.parquet", Wanted(fields={"question": "problem", "answer": "solution"})
    )
    assert {key for _, row in source.rows for key in row} == {"problem", "solution"}  # type: ignore[union-attr]


def test_narrow_floats_keep_their_digits(tmp_path: Path) -> None:
    table = pa.table({"question": ["a", "b"], "answer": pa.array([0.1, 1e-3], pa.float32())})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [question.answer for question in load(tmp_path / "t.parquet").questions] == [
        "0.1",
        "0.001",
    ]


def test_decimal_numbers_are_numbers(tmp_path: Path) -> None:
    answers = [Decimal("1.50"), Decimal("-0.000000001"), None]
    write_parquet(
        tmp_path / "t.parquet",
        [{"question": name, "answer": one} for name, one in zip("abc", answers, strict=True)],
    )
    corpus = load(tmp_path / "t.parquet", max_bad_rows=1)
    assert [one.answer for one in corpus.questions] == ["1.500000000", "-0.000000001"]


@pytest.mark.parametrize("kind", ["struct", "list", "dictionary"])
def test_nested_narrow_floats_keep_their_digits(tmp_path: Path, kind: str) -> None:
    narrow = pa.array([0.1, None, 1e-3], pa.float32())
    wide = [0.1, None, 0.001]
    column, expected = {
        "struct": (pa.StructArray.from_arrays([narrow], ["x"]), [{"x": one} for one in wide]),
        "list": (pa.FixedSizeListArray.from_arrays(narrow, 3), [wide]),
        "dictionary": (narrow.dictionary_encode(), wide),
    }[kind]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": column}), path)
    assert [row["a"] for row in tables.table_rows(path, ["a"])] == expected


def test_bad_rows_of_a_table_are_numbered_by_row(tmp_path: Path) -> None:
    table = pa.table(
        {"question": ["a", "b", None, "A"], "answer": pa.array([1.0, float("nan"), 3.0, 4.0])}
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    corpus = load(tmp_path / "t.parquet", max_bad_rows=3)
    assert bad_rows_text(corpus) == (
        "row 2: the gold answer ('answer') is not a finite number\n"
        "row 3: the question ('question') is missing\n"
        "row 4: asks the same as row 1\n"
    )
    assert refusal(tmp_path / "t.parquet") == (
        f"{tmp_path / 't.parquet'}, row 2: the gold answer ('answer') is not a finite number; 3 "
        "bad rows where "
        "data.max_bad_rows allows 0: mend the file or raise the limit"
    )


@pytest.mark.parametrize(
    ("row", "key"),
    [
        (r'{"question": "a", "answer": 1, "answer": 2}', "answer"),
        (r'{"question" : "a", "answer" : 1, "answer": 2}', "answer"),
        (r'{"question": "a", "answer": 1, "more": [{"b": {"c": 1, "\u0063": 2}}]}', "c"),
        (r'{"question": "a", "answer": 1, "x\\": 1, "answer": 2}', "answer"),
        (r'{"question": "a", "answer": 1, "question": ": b"}', "question"),
    ],
)
def test_a_row_that_holds_a_key_twice_is_a_bad_one(tmp_path: Path, row: str, key: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"question": "q", "answer": 1}}\n{row}\n')
    corpus = load(tmp_path / "t.jsonl", max_bad_rows=1)
    assert bad_rows_text(corpus) == f"line 2: the key {key!r} stands in it twice; expected once\n"
    (tmp_path / "t.json").write_text(f"[{row}]")
    assert refusal(tmp_path / "t.json") == (
        f"{tmp_path / 't.json'}: an object in it holds the key {key!r} twice; expected once"
    )


@pytest.mark.parametrize(
    "text", [r"a: \"b\": c", r"a \\", '": b', "{'a': 1, 'a': 2}", r"{\"a\": 1, \"a\": 2}"]
)
def test_what_looks_like_a_key_in_a_text_is_none(tmp_path: Path, text: str) -> None:
    escaped = text.replace('": b', r"\": b")
    (tmp_path / "t.jsonl").write_text(
        f'{{"question": "{escaped}", "answer": 1, "more": {{"answer": [1e9, {{"more": 2}}]}}}}\n'
    )
    assert not load(tmp_path / "t.jsonl").bad_rows


@pytest.mark.parametrize("value", [b"raw", {"a": 1}, ["x"]])
def test_values_that_are_no_answers_are_bad_rows(tmp_path: Path, value: object) -> None:
    write_parquet(tmp_path / "t.parquet", [{"question": "a", "answer": value}])
    assert "expected text or a number" in refusal(tmp_path / "t.parquet")


def test_columns_that_python_cannot_hold_are_named(tmp_path: Path) -> None:
    words = pa.array(["a", "b"])
    torn = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")],
    )
    late = pa.array([2**61, 2], pa.timestamp("us"))
    for column, kind, why in (
        (torn, "string", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (late, "timestamp[us]", "date value out of range"),
    ):
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"question": column, "answer": words}), path)
        assert refusal(path) == (
            f"{path}: the column 'question' ({kind}) cannot be read ({why}); mend it, or leave it "
            "out of the file"
        )


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    words, path = pa.array(["a", "b"]), tmp_path / "twice.parquet"
    names = ["question", "answer", "question"]
    pq.write_table(pa.Table.from_arrays([words, words, words], names=names), path)
    assert refusal(path) == f"{path}: has the column 'question' twice; expected each name once"


def test_a_missing_column_is_one_sentence(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"question": "a", "answers": "1"}])
    assert refusal(tmp_path / "t.parquet") == (
        f"{tmp_path / 't.parquet'}: there is no column 'answer' for data.fields.answer (did you "
        "mean 'answers'?); name it in data.fields"
    )
    assert "no column 'uid' for data.fields.id" in refusal(
        tmp_path / "t.parquet", fields={"answer": "answers", "id": "uid"}
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_files_that_are_no_tables_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"hello world, this is no table")
    kind = "a Parquet" if name.endswith("parquet") else "an Arrow"
    assert f"{tmp_path / name}: cannot be read as {kind} file (" in refusal(tmp_path / name)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "t.arrow", ROWS * 50)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot be read as an Arrow file" in refusal(path)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 40), batch=st.integers(1, 7), size=st.integers(1, 9))
def test_rows_come_once_each_in_order_whatever_the_batches(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("t")
    rows = [{"question": f"{i}?", "answer": i} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", row_group_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BATCH_ROWS", batch)
        assert [question.text for question in load(folder / "t.parquet").questions] == [
            f"{i}?" for i in range(count)
        ]


# ---- folders -------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", ROWS[:2], ROWS[2:])
    assert ids(load(folder)) == ["q0", "q1", "q2", "q3", "q4"]


def test_splits_of_a_saved_data_set_are_named_like_folders(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved" / "train", ROWS[:3])
    save_to_disk(tmp_path / "saved" / "test", ROWS[3:])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert ids(load(tmp_path / "saved" / "test")) == ["q3", "q4"]
    assert refusal(tmp_path / "saved") == (
        f"{tmp_path / 'saved'}: holds several splits: test, train; name one of them, for example "
        f"{tmp_path / 'saved' / 'test'}"
    )


@pytest.mark.parametrize("inner", ["", "data"])
def test_splits_of_the_hub_are_the_beginnings_of_file_names(tmp_path: Path, inner: str) -> None:
    write_parquet(tmp_path / inner / "train-00001-of-00002.parquet", ROWS[2:4])
    write_parquet(tmp_path / inner / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / inner / "test-00000-of-00001-0a1b2c.parquet", ROWS[4:])
    assert ids(load(tmp_path / "train")) == ["q0", "q1", "q2", "q3"]
    assert ids(load(tmp_path / "test")) == ["q4"]
    assert refusal(tmp_path / "trian") == (
        f"{tmp_path / 'trian'}: the data set has no split 'trian' (did you mean 'train'?)"
    )


def test_files_without_split_names_belong_together(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part-0.parquet", ROWS[:2])
    write_parquet(tmp_path / "part-1.parquet", ROWS[2:])
    assert len(load(tmp_path).questions) == 5
    assert f"{tmp_path / 'part'}: no such question file" in refusal(tmp_path / "part")


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no Parquet or Arrow files; expected a data set as save_to_disk or the "
        "Hub lays it out"
    )


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", ".."])
def test_a_data_set_may_not_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = save_to_disk(tmp_path / "saved", ROWS)
    write_stream(tmp_path / "outside.arrow", ROWS)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"state\.json: (expected a list of plain|\.\. is missing)"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", ROWS[:2], ROWS[2:])
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "state.json: data-00001-of-00002.arrow is missing" in refusal(folder)


# ---- worked solutions as gold answers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "right"),
    [
        ("6 * 3 = 18\n#### 18", "18"),
        ("#### 1,200\n", "1200"),
        ("so \\boxed{7}\n#### 8", "7"),
        ("#### 3\nmore", ""),
    ],
)
def test_the_answer_of_a_worked_solution(gold: str, right: str) -> None:
    assert grade(rf"\boxed{{{right or 3}}}", gold, "math").reward == float(bool(right))


# ---- procedural questions ------------------------------------------------------------------------


def test_a_specification_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "data: {train: 'reasoning_gym:gcd?size=3', heldout: h.jsonl}\nstudent: {model: m}\nmethod: "
        "{name: grpo}\n"
    )
    data = topologies.load(tmp_path / "t.yaml").data
    assert (data.train, data.heldout) == ("reasoning_gym:gcd?size=3", str(tmp_path / "h.jsonl"))


@needs_gym
@pytest.mark.slow
class TestReasoningGym:
    def test_questions_are_different_and_graded_by_their_own_rule(self) -> None:
        corpus = load("reasoning_gym:chain_sum?size=40&seed=1&max_terms=3&max_digits=2")
        assert len({question.text for question in corpus.questions}) == 40 and not corpus.bad_rows
        for question in corpus.questions[:5]:
            reference = shown_gold(question.answer, question.grader)
            assert question.grader == "reasoning_gym:chain_sum?max_terms=3&max_digits=2"
            assert grade(rf"\boxed{{{reference}}}", question.answer, question.grader).reward == 1.0
            assert grade(rf"\boxed{{{reference}1}}", question.answer, question.grader).reward == 0.0
            assert quick_grade("no box", question.answer, question.grader) is not None

    def test_the_same_in_every_process(self) -> None:
        program = (
            "from pathlib import Path; from zppo.data.corpus import load_questions; from "
            "zppo.config.topology import DataConfig; "
            "corpus = load_questions('reasoning_gym:maze?size=3', DataConfig(train=''), Path()); "
            "print([question.text for question in corpus.questions])"
        )
        environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
        command = [sys.executable, "-c", program]
        runs = [
            subprocess.run(command, env=env, capture_output=True, text=True) for env in environments
        ]
        assert runs[0].stdout == runs[1].stdout != "" and runs[0].returncode == 0

    def test_neighbouring_seeds_are_unrelated(self) -> None:
        one, other = (
            ids_of_texts(f"reasoning_gym:base_conversion?size=50&seed={seed}") for seed in (1, 2)
        )
        assert not one & other

    def test_train_and_heldout_never_share_a_question(self) -> None:
        settings = "size=60&max_terms=2&max_digits=2"
        train = ids_of_texts(f"reasoning_gym:chain_sum?{settings}&seed=1&split=train")
        heldout = ids_of_texts(f"reasoning_gym:chain_sum?{settings}&seed=2&split=heldout")
        assert len(train) == len(heldout) == 60 and not train & heldout

    def test_a_task_with_too_few_questions_is_refused(self) -> None:
        said = refusal("reasoning_gym:chain_sum?size=500&min_digits=1&max_digits=1&max_terms=2")
        assert (
            "different questions were found; expected 500: lower size, or widen the settings"
            in said
        )

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("chain_sun", "reasoning-gym has no task 'chain_sun' (did you mean 'chain_sum'?)"),
            (
                "word_ladder",
                (
                    "the task 'word_ladder' cannot be used, because its questions differ from "
                    "process to"
                ),
            ),
            ("gcd?sise=3", "the task 'gcd' has no setting 'sise' (did you mean 'size'?)"),
            ("gcd?size=0", "size is '0'; expected a whole number from 1 to 10000000"),
            ("gcd?size=3&size=4", "size is given twice; expected each setting once"),
            ("gcd?seed=-1", "seed is '-1'; expected a whole number from 0 to"),
            ("gcd?split=tset", "split is 'tset'"),
            ("gcd?min_value=x", "min_value is 'x'; expected a whole number"),
            ("gcd?min_value=10&max_value=1", "the task 'gcd' refuses its settings ("),
            ("gcd?size", "'size' cannot be read; expected TASK?name=value&name=value"),
        ],
    )
    def test_mistakes_are_one_sentence(self, text: str, sentence: str) -> None:
        assert refusal(f"reasoning_gym:{text}").startswith(f"reasoning_gym:{text}: {sentence}")

    @pytest.mark.parametrize("task", sorted(GUARDS))
    def test_guards_let_right_answers_through_and_nothing_that_acts(
        self, task: str, tmp_path: Path
    ) -> None:
        trap = tmp_path / "trap"
        for question in load(f"reasoning_gym:{task}?size=4").questions:
            reference = shown_gold(question.answer, question.grader)
            assert grade(rf"\boxed{{{reference}}}", question.answer, question.grader).reward == 1.0
            for hostile in (
                f"open('{trap}','w')",
                f"__import__('pathlib').Path('{trap}').touch()",
                "().__class__",
            ):
                assert (
                    quick_grade(rf"\boxed{{{hostile}}}", question.answer, question.grader)
                    is not None
                )
                assert (
                    grade(rf"\boxed{{{hostile}}}", question.answer, question.grader).reward == 0.0
                )
        assert not trap.exists()


def ids_of_texts(specification: str) -> set[str]:
    return {question.text for question in load(specification).questions}


def test_a_gold_answer_that_is_no_entry_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "a", "answer": "1"}\n')
    said = refusal(tmp_path / "t.jsonl", grader="reasoning_gym:gcd")
    assert "the gold answer is '1', which the grader 'reasoning_gym:gcd' can never meet" in said


def test_without_the_package_the_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert refusal("reasoning_gym:gcd") == (
        "reasoning_gym:gcd: the package reasoning-gym is not installed; "
        "in the project's folder: pip install -e '.[reasoning-gym]'"
    )


def test_gold_answers_of_other_graders_are_shown_as_they_are() -> None:
    assert shown_gold("7", "math") == "7"
    assert (
        shown_gold('{"answer": null, "metadata": {}}', "reasoning_gym:graph_color")
        == "any that fits"
    )
    assert get_grader("reasoning_gym:gcd").usable('{"answer": "1", "metadata": {}}')
    assert Question(id="a", text="b", answer="c").grader == "math"
