"""Data as people have it: conversations, nested columns, the layouts of TRL, verl and GSM8K, JSON,
CSV and packed files; and what is said about those that cannot be read."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zppo.config.topology import DataConfig
from zppo.data.corpus import Corpus, held_out_overlap, load_questions, source_notes
from zppo.data.question import Question, digest
from zppo.errors import UserError
from zppo.grading import grade
from zppo.prompting.prompts import PromptSet
from zppo_protocol.values import ChatMessage

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "How much is 3 * 4?"}
REPLY = {"role": "assistant", "content": "12"}
AGAIN = {"role": "user", "content": "And if we double it?"}
ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]


def load(path: Path, **options: Any) -> Corpus:
    return load_questions(str(path), DataConfig(train=str(path), **options), Path.cwd())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **options)
    return str(error.value).removeprefix(str(path))


def jsonl(folder: Path, *rows: object, name: str = "train.jsonl") -> Path:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder / name


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# ---- conversations -------------------------------------------------------------------------------


def test_a_conversation_is_its_last_turn_and_those_before(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, ASK, REPLY, AGAIN], "answer": 24}]
    (question,) = load(jsonl(tmp_path, *rows)).questions
    assert question.text == "And if we double it?" and question.has_system
    assert question.earlier == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "How much is 3 * 4?"),
        ChatMessage("assistant", "12"),
    )
    assert question.characters == sum(len(turn["content"]) for turn in (SYSTEM, ASK, REPLY, AGAIN))
    # The same from a table, where absent keys of a part are nulls.
    parts = [{"type": "text", "text": "How much "}, {"type": "text", "text": "is 3 * 4?"}]
    table = parquet(tmp_path / "train.parquet", rows)
    assert load(table).questions == [question]
    split = jsonl(tmp_path, {"prompt": [{**ASK, "content": parts}], "answer": 12}, name="t.jsonl")
    assert load(split).questions[0].text == ASK["content"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the question ('prompt') has 0 messages; expected 1 to 1000"),
        (
            [ASK, REPLY],
            "the question ('prompt') ends with a message of the assistant; expected the user's",
        ),
        (
            [SYSTEM],
            "the question ('prompt') ends with a message of the system; expected the user's",
        ),
        (
            [ASK, SYSTEM, AGAIN],
            "message 2 of the question ('prompt') is a system message; expected it to come first",
        ),
        (
            [SYSTEM, REPLY, ASK],
            "the question ('prompt') begins with a message of the assistant; expected the user's",
        ),
        (
            [ASK, AGAIN],
            "the question ('prompt') has two messages of one role in a row; expected user and "
            "assistant in turn",
        ),
        (
            [{"role": "human", "content": "?"}],
            "message 1 of the question ('prompt') has the role 'human'; expected system, user or "
            "assistant",
        ),
        (
            [{"role": "user", "content": " "}],
            "message 1 of the question ('prompt') (user) is empty",
        ),
        (
            [{"role": "user"}],
            "message 1 of the question ('prompt') has a null as content; expected text or a list "
            "of parts",
        ),
        (
            ["hello"],
            "message 1 of the question ('prompt') is a text; expected {role, content}",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
            "the question ('prompt') is empty but for <image>",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            "message 1 of the question ('prompt') has a video with 'video'; expected {type: video} "
            "for the next video of the row",
        ),
        (
            [{"role": "user", "content": [{"type": "video_url", "video_url": "a.mp4"}]}],
            "message 1 of the question ('prompt') holds a part of the type 'video_url', which "
            "cannot be read; expected parts of text, and pictures as {type: image}",
        ),
        (
            [{"role": "system", "content": [{"type": "image", "path": "a.png"}]}, ASK],
            "message 1 of the question ('prompt') is a system message with a picture or video; "
            "expected those in messages of user and assistant",
        ),
        (
            [{"role": "user", "content": [{"type": "tool"}]}],
            "message 1 of the question ('prompt') holds a part \"{'type': 'tool'}\"; expected "
            "{type: text, text: …}",
        ),
        (
            str([ASK]),
            "the question ('prompt') is a list of messages written as text; expected the list "
            "itself, in JSONL, JSON or Parquet",
        ),
    ],
)
def test_what_is_no_conversation_is_a_bad_row(tmp_path: Path, messages: Any, reason: str) -> None:
    good = {"prompt": [ASK], "answer": "12"}
    file = jsonl(tmp_path, good, {"prompt": messages, "answer": "1"})
    assert [row.reason for row in load(file, max_bad_rows=1).bad_rows] == [reason]


def test_all_turns_make_a_question_what_it_is(tmp_path: Path) -> None:
    """Ids, the check for repeats, and the digest of the corpus."""
    rows = [
        {"prompt": [ASK, REPLY, AGAIN], "answer": "24"},
        {"prompt": [{**ASK, "content": "How much is 5 * 4?"}, REPLY, AGAIN], "answer": "40"},
        {"prompt": [SYSTEM, ASK, REPLY, AGAIN], "answer": "24"},
        {"prompt": [ASK, {**REPLY, "content": " 12 "}, AGAIN], "answer": "24"},
    ]
    corpus = load(jsonl(tmp_path, *rows), max_bad_rows=1)
    assert len({question.id for question in corpus.questions}) == 3
    assert [row.reason for row in corpus.bad_rows] == ["asks the same as line 1"]
    digests = {digest([question]) for question in corpus.questions}
    saved = msgspec.msgpack.encode(corpus.questions)
    assert msgspec.msgpack.decode(saved, type=list[Question]) == corpus.questions
    assert len(digests) == 3


def test_a_plain_corpus_keeps_its_digest() -> None:
    """That of a run that began before questions had earlier turns."""
    plain = [Question(id="a", text="1 + 1?", answer="2", grader="exact")]
    assert digest(plain) == hashlib.sha256(b'["a","1 + 1?","2"]\n').hexdigest()


def test_a_question_is_held_out_under_any_system_message(tmp_path: Path) -> None:
    train = load(
        jsonl(
            tmp_path,
            {"prompt": [SYSTEM, ASK], "answer": "12"},
            ROWS[0] | {"prompt": "What is 0 + 1?"},
        )
    )
    held = load(
        jsonl(tmp_path, {"question": "how much is  3 * 4?", "answer": "12"}, name="h.jsonl")
    )
    assert held_out_overlap(train.questions, held.questions) == [train.questions[0].id]


# ---- layouts -------------------------------------------------------------------------------------

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [SYSTEM, ASK],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "12"},
    "extra_info": {"index": 0, "split": "train"},
}


def test_verl(tmp_path: Path) -> None:
    table = parquet(tmp_path / "train.parquet", [VERL])
    corpus = load(table)
    (question,) = corpus.questions
    assert (question.text, question.answer) == (ASK["content"], "12") and question.has_system
    assert source_notes("data.train", corpus) == [
        "data.train: read as verl's (question: prompt, answer: reward_model.ground_truth)"
    ]
    assert load(jsonl(tmp_path, VERL)).questions == [question]


@pytest.mark.parametrize("answer", ["solution", "answer", "ground_truth"])
@pytest.mark.parametrize("prompt", [ASK["content"], [ASK]])
def test_trl(tmp_path: Path, prompt: Any, answer: str) -> None:
    corpus = load(jsonl(tmp_path, {"prompt": prompt, answer: r"So it is $\boxed{12}$."}))
    (question,) = corpus.questions
    assert question.text == ASK["content"] and not question.earlier
    assert grade(r"\boxed{12}", question.answer, "math").reward == 1.0
    assert source_notes("data.train", corpus) == [
        f"data.train: read as TRL's (question: prompt, answer: {answer})"
    ]


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How much?", "answer": "He has <<6*7=42>>42 and 1,000.\n#### 1,042"}
    corpus = load(parquet(tmp_path / "train.parquet", [row]))
    assert source_notes("data.train", corpus) == []
    gold = corpus.questions[0].answer
    assert grade(r"\boxed{1042}", gold, "math").reward == 1.0
    assert grade(r"\boxed{42}", gold, "math").reward == 0.0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (VERL, "Be brief."),
        ({"prompt": [ASK], "solution": "12"}, "Be kind."),
        ({"question": ASK["content"], "answer": "3 * 4 = <<3*4=12>>12\n#### 12"}, "Be kind."),
    ],
    ids=["verl", "TRL", "GSM8K"],
)
def test_from_a_file_to_the_prompt(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (question,) = load(parquet(tmp_path / "train.parquet", [row])).questions
    prompts = PromptSet(system_prompt="Be kind.")
    for prompt in (prompts.plain(question), prompts.bcq(question, ["one", "two"])):
        assert [turn.role for turn in prompt.messages] == ["system", "user"]
        assert prompt.messages[0].content == told
        assert prompt.messages[1].content.startswith(f"{ASK['content']}\n\n")
        assert prompt.messages[1].content.endswith("\\boxed{}.")
    assert grade(r"\boxed{12}", question.answer, question.grader).reward == 1.0


def test_fields_win_over_a_layout(tmp_path: Path) -> None:
    row = {**VERL, "question": "not this", "extra_info": {"answer": "13", "index": 7}}
    corpus = load(
        parquet(tmp_path / "t.parquet", [row]),
        fields={"question": "prompt", "answer": "extra_info.answer", "id": "extra_info.index"},
    )
    assert [(one.id, one.text, one.answer) for one in corpus.questions] == [
        ("7", ASK["content"], "13")
    ]
    assert source_notes("data.train", corpus) == []


def test_a_column_of_that_very_name_wins_over_a_path(tmp_path: Path) -> None:
    row = {"question": "?", "a.b": "1", "a": {"b": "2"}}
    for file in (jsonl(tmp_path, row), parquet(tmp_path / "t.parquet", [row])):
        assert load(file, fields={"answer": "a.b"}).questions[0].answer == "1"


def test_a_misspelt_path_names_the_nearest(tmp_path: Path) -> None:
    fields = {"question": "prompt", "answer": "reward_model.groundtruth"}
    assert refusal(parquet(tmp_path / "t.parquet", [VERL]), fields=fields) == (
        ": there is no column 'reward_model.groundtruth' for data.fields.answer (did you mean "
        "'reward_model.ground_truth'?); name it in data.fields"
    )
    assert refusal(jsonl(tmp_path, VERL), fields=fields).startswith(
        ":1: the gold answer ('reward_model.groundtruth') is missing (did you mean "
        "'reward_model.ground_truth'?); 1 bad row"
    )


def test_mixed_layouts_are_named_with_their_line(tmp_path: Path) -> None:
    file = jsonl(tmp_path, ROWS[0], {"prompt": "1 + 1?", "solution": "2"})
    assert refusal(file).startswith(
        ":2: the question ('question') is missing: the row is laid out as TRL's (prompt, solution), "
        "and the first one as zppo's (question, answer); expected one layout in a source; 1 bad row"
    )


def test_a_layout_without_its_gold_answer_is_named_by_it(tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1?", "solutions": "2"}]
    assert refusal(parquet(tmp_path / "t.parquet", rows)).startswith(
        ": there is no column 'answer' for data.fields.answer (valid: prompt, solutions)"
    )


def test_pictures_of_a_verl_table(tmp_path: Path) -> None:
    """Bytes that are no picture make a bad row, rows with none are text."""
    picture = {"bytes": b"\x89PNG", "path": None}
    rows = [{**VERL, "images": [picture]}, {**VERL, "images": [], "prompt": [AGAIN]}]
    corpus = load(parquet(tmp_path / "t.parquet", rows), max_bad_rows=1)
    assert [question.text for question in corpus.questions] == [AGAIN["content"]]
    assert [row.reason for row in corpus.bad_rows] == [
        "a picture inside the images ('images') is not a picture; expected one of PNG, JPEG, WEBP, "
        "GIF, BMP, TIFF"
    ]


@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_as_the_hub_has_them(tmp_path: Path, column: str) -> None:
    """A column of pictures, one or a list a row, under either name: rows with none are text, in
    whatever way none is said, and those with some are not read as if they were text."""
    picture, none = {"bytes": b"\x89PNG", "path": "a.png"}, {"bytes": None, "path": None}
    one = [
        {"question": f"q{i}", "answer": "1", column: value}
        for i, value in enumerate((none, None, picture))
    ]
    lists = [
        {"question": f"q{i}", "answer": "1", column: value}
        for i, value in enumerate(([], [none], [picture]))
    ]
    for name, rows in (("one", one), ("lists", lists)):
        corpus = load(parquet(tmp_path / f"{name}.parquet", rows), max_bad_rows=1)
        assert [(question.text, question.media) for question in corpus.questions] == [
            ("q0", ()),
            ("q1", ()),
        ]
        assert [(row.line, row.reason) for row in corpus.bad_rows] == [
            (
                3,
                f"a picture inside the images ({column!r}) is not a picture; expected one of PNG, "
                "JPEG, WEBP, GIF, BMP, TIFF",
            )
        ]


def test_a_column_that_was_named_is_the_one_of_the_pictures(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "1", "image": {"bytes": b"x", "path": None}, "views": []}]
    corpus = load(parquet(tmp_path / "t.parquet", rows), fields={"images": "views"})
    assert corpus.questions[0].media == ()


def test_tables_of_large_rows_are_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """From any row on, in files of several row groups, whatever the size of the rows."""
    from zppo.data.sources.tables import table_columns, table_rows

    rows = [{"question": f"q{i}", "answer": str(i), "blob": bytes(2**19)} for i in range(50)]
    for kind in ("parquet", "arrow"):
        file = tmp_path / f"t.{kind}"
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=20)
        else:
            with pa.ipc.new_stream(str(file), table.schema) as stream:
                stream.write_table(table, max_chunksize=20)
        assert table_columns(file) == ["question", "answer", "blob"]
        for start in (0, 1, 19, 20, 21, 49, 50, 60):
            found = [row["answer"] for row in table_rows(file, ["answer", "blob"], start)]
            assert found == [str(i) for i in range(start, 50)]


# ---- what rows say of themselves -----------------------------------------------------------------


def test_rows_bring_system_prompt_and_grader(tmp_path: Path) -> None:
    fields = {"system_prompt": "told", "grader": "rule"}
    rows = [{**ROWS[0], "told": "Be brief.", "rule": "exact"}, ROWS[1]]
    first, second = load(jsonl(tmp_path, *rows), fields=fields).questions
    assert first.earlier == (ChatMessage("system", "Be brief."),)
    assert (first.grader, first.own_grader) == ("exact", True)
    assert (second.earlier, second.grader) == ((), "math")
    plain = load(jsonl(tmp_path, *rows)).questions[0]
    assert (plain.earlier, plain.grader) == ((), "math")
    assert digest([first]) != digest([plain])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"rule": "exat"},
            "the grader ('rule') is 'exat' (did you mean 'exact'?)",
        ),
        (
            {"rule": "judge"},
            "the grader ('rule') is 'judge', which asks the teacher; expected data.grader 'judge' "
            "too",
        ),
        ({"told": " "}, "the system prompt ('told') is empty"),
        (
            {"question": [SYSTEM, ASK], "told": "Be long."},
            "the question ('question') begins with a system message, and the system prompt "
            "('told') is another; expected one of them",
        ),
    ],
)
def test_what_rows_may_not_say(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    fields = {"system_prompt": "told", "grader": "rule"}
    good = {**ROWS[0], "told": "Be brief.", "rule": "math"}
    file = jsonl(tmp_path, good, {**ROWS[1], **values})
    assert [row.reason for row in load(file, fields=fields, max_bad_rows=1).bad_rows] == [reason]


# ---- files ---------------------------------------------------------------------------------------


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def packed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))
    return path


def test_every_kind_of_file_gives_the_same_questions(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": 'Two\nlines, "quoted", é?', "answer": "1,5"}]
    plain = jsonl(tmp_path, *rows)
    expected = load(plain).questions
    files = [as_csv(tmp_path / "train.csv", rows), tmp_path / "train.json"]
    files[1].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for file in [plain, *files]:
        for packing in (".gz", ".zst"):
            files.append(packed(tmp_path / f"{file.name}{packing}", file.read_bytes()))
    assert all(load(file).questions == expected for file in files)
    for text in (json.dumps({"data": rows, "version": 1}), plain.read_text(encoding="utf-8")):
        (tmp_path / "train.json").write_text(text, encoding="utf-8")
        assert load(tmp_path / "train.json").questions == expected


def test_a_ragged_csv_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('question,answer\n"a\nb",1\n"c\nd"\ne,2,3\n')
    corpus = load(tmp_path / "t.csv", max_bad_rows=2)
    assert [(row.line, row.reason) for row in corpus.bad_rows] == [
        (4, "has 1 field where the header has 2"),
        (6, "has 3 fields where the header has 2"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "t.csv",
            b'question,answer\na,1\n"b,2\n',
            ":3: not CSV (unexpected end of data); expected fields with commas between them, and "
            "quotes around those that hold one",
        ),
        ("t.csv", b"", ": holds no question; expected a header and at least one row"),
        ("t.csv", b"answer,answer\n", ":1: the header has 'answer' twice; expected each name once"),
        (
            "t.csv",
            b"question,answer\na,\xff\n",
            ":2: not UTF-8 text (byte 3 of the line); expected CSV in UTF-8",
        ),
        (
            "t.csv",
            b"question;answer\na;1\n",
            ": there is no column 'question' for data.fields.question (did you mean "
            "'question;answer'?); name it in data.fields",
        ),
        (
            "t.json",
            b'[{"question": "a", "answer": "1"},\n {"question": }]',
            ":2: not JSON (JSON is malformed: invalid character (byte 49)); expected a list of "
            "objects",
        ),
        (
            "t.json",
            b'{"question": ["a"], "answer": ["1"]}',
            ":1: message 1 of the question ('question') is a text; expected {role, content}; 1 bad "
            "row where data.max_bad_rows allows 0: mend the file or raise the limit",
        ),
        (
            "t.json",
            b'{\n"rows": []}',
            ": holds a JSON object without a list 'data'; expected a list of objects, or "
            '{"data": […]}',
        ),
        (
            "t.json",
            b'[{"question": "a", "answer": "1"}, 7]',
            ", row 2: a number where a JSON object was expected; 1 bad row where "
            "data.max_bad_rows allows 0: mend the file or raise the limit",
        ),
        (
            "t.jsonl.gz",
            b"no gzip",
            ":1: cannot be unpacked from here on (Not a gzipped file (b'no')); expected a whole "
            ".gz file",
        ),
        (
            "t.jsonl.zst",
            b"no zstd",
            ":1: cannot be unpacked from here on (ZSTD decompress failed: Unknown frame "
            "descriptor); expected a whole .zst file",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name) == message


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_ends_early_is_named_with_its_line(tmp_path: Path, packing: str) -> None:
    rows = [{"question": f"{i} {hash(str(i))}?", "answer": "1"} for i in range(5000)]
    data = jsonl(tmp_path, *rows).read_bytes()
    file = packed(tmp_path / f"train.jsonl{packing}", data)
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 3])
    said = refusal(file, max_bad_rows=10)
    line = int(said.split(":")[1])
    assert 1 < line < 5000
    assert "cannot be unpacked from here on (" in said and said.endswith(
        f"expected a whole {packing} file"
    )


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("openai/gsm8k", "openai/gsm8k"),
        ("hf://datasets/openai/gsm8k", "openai/gsm8k"),
        ("https://huggingface.co/datasets/openai/gsm8k", "openai/gsm8k"),
    ],
)
def test_a_name_of_the_hub_says_how_to_fetch_it(tmp_path: Path, name: str, folder: str) -> None:
    path = tmp_path / name
    assert refusal(path) == (
        ": no such question file; if openai/gsm8k is a data set of the Hugging Face Hub, fetch it "
        f"with: hf download openai/gsm8k --repo-type dataset --local-dir {tmp_path / folder}, and "
        f"name {tmp_path / folder}"
    )
    (tmp_path / folder / "main").mkdir(parents=True)
    parquet(tmp_path / folder / "main" / "train-00000-of-00001.parquet", ROWS)
    assert refusal(tmp_path / folder).endswith("; the folder 'main' in it has some")
    assert len(load(tmp_path / folder / "main").questions) == 3
