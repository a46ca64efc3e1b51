"""Sources of the user's own: a function that gives rows, by file, module or entry point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from zppo.config.load import load as load_topology
from zppo.config.topology import DataConfig, is_own_source
from zppo.data.corpus import Corpus, load_questions
from zppo.errors import UserError
from zppo.plan.extensions import changed, identities

ROWS = """
def rows():
    for i in range(3):
        yield {"question": f"What is {i} + 1?", "answer": i + 1}
"""


def load(use: str, base: Path, **options: Any) -> Corpus:
    return load_questions(use, DataConfig(train=use, **options), base)


def mine(folder: Path, code: str = ROWS, name: str = "mine.py") -> str:
    (folder / name).write_text(code)
    return f"{folder / name}:rows"


@pytest.mark.parametrize(
    ("source", "own"),
    [
        ("./mine.py:rows", True),
        ("package.module:rows", True),
        ("reasoning_gym:chain_sum", False),
        ("reasoning_gym:chain_sum?size=3", False),
        ("train.jsonl", False),
        ("hf://datasets/openai/gsm8k", False),
        ("mine.py", False),
        ("a folder/mine.py:rows", True),
    ],
)
def test_what_names_code_is_told_by_its_form(source: str, own: bool) -> None:
    assert is_own_source(source) == own


def test_rows_of_a_function_become_questions(tmp_path: Path) -> None:
    use = mine(tmp_path)
    corpus = load(use, Path.cwd())
    assert [(one.text, one.answer) for one in corpus.questions] == [
        (f"What is {i} + 1?", str(i + 1)) for i in range(3)
    ]
    assert corpus.questions[0].id.startswith("rows-")
    assert load("./mine.py:rows", tmp_path).questions == corpus.questions


def test_layouts_and_fields_hold_for_them_too(tmp_path: Path) -> None:
    use = mine(tmp_path, "def rows():\n    return [{'prompt': '1 + 1?', 'gold': {'is': 2}}]\n")
    (question,) = load(use, tmp_path, fields={"answer": "gold.is"}).questions
    assert (question.text, question.answer) == ("1 + 1?", "2")


def test_a_module_and_an_announced_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine(tmp_path, name="zppo_test_rows.py")
    info = tmp_path / "zppo_test_rows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zppo_test_rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zppo.sources]\nsums = zppo_test_rows:rows\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "zppo_test_rows", raising=False)
    for use in ("zppo_test_rows:rows", "sums"):
        assert is_own_source(use)
        assert len(load(use, tmp_path).questions) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def row():\n    return []\n", ": '{file}' has no 'rows' (did you mean 'row'?)"),
        ("rows = 7\n", ": '{use}' is of type int; expected a function of ()"),
        (
            "def rows(split):\n    return []\n",
            ": '{use}' takes (split); expected a function of (): missing a required argument: "
            "'split'",
        ),
        ("def rows():\n    return 7\n", ": gave a number; expected rows, one dictionary each"),
        ("def rows():\n    return []\n", ": holds no question; expected at least one row"),
        (
            "def rows():\n    yield {'question': '?', 'answer': 1}\n    raise KeyError('split')\n",
            ", row 2: raised KeyError: 'split'",
        ),
        ("def rows():\n    raise SystemExit('no rows')\n", ", row 1: raised SystemExit: no rows"),
        (
            "def rows():\n    yield {'question': '?', 'answer': 1}\n    yield 7\n",
            ", row 2: a number where a JSON object was expected; 1 bad row where data.max_bad_rows "
            "allows 0: mend the file or raise the limit",
        ),
        (
            "def rows():\n    yield {'question': '?', 'answer': 1}\n    yield {7: 8}\n",
            ", row 2: a row whose columns have names that are no text; 1 bad row where "
            "data.max_bad_rows allows 0: mend the file or raise the limit",
        ),
        (
            "def rows():\n    yield {'question': '?', 'answer': 1}\n    raise SystemExit(0)\n",
            ", row 2: raised SystemExit: 0",
        ),
        (
            "def rows():\n    yield {'question': '?', 'answer': 10**5000}\n",
            ", row 1: the gold answer ('answer') is a number of too many digits; expected it as "
            "text; 1 bad row where data.max_bad_rows allows 0: mend the file or raise the limit",
        ),
        (
            "import nothing_there\n",
            ": '{file}' cannot be imported: ModuleNotFoundError: No module named 'nothing_there'",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, code: str, message: str) -> None:
    use = mine(tmp_path, code)
    with pytest.raises(UserError) as caught:
        load(use, tmp_path)
    file = use.rpartition(":")[0]
    assert str(caught.value) == use + message.replace("{file}", file).replace("{use}", use)


def test_what_a_source_prints_is_no_output_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
def rows():
    print("begin")
    yield {"question": "?", "answer": 1}
    print("end")
"""
    load(mine(tmp_path, code), tmp_path)
    assert capsys.readouterr() == ("", "begin\nend\n")


def test_a_file_of_code_without_a_name_is_one_sentence(tmp_path: Path) -> None:
    mine(tmp_path)
    with pytest.raises(UserError) as caught:
        load("mine.py", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'mine.py'}: is code; expected the name of its function too: mine.py:name"
    )


def test_a_source_that_never_ends_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo.data.sources.own.MAX_ROWS", 5)
    code = "def rows():\n    while True:\n        yield {'question': '?', 'answer': 1}\n"
    use = mine(tmp_path, code)
    with pytest.raises(UserError, match="gave more than 5 rows; expected a source that ends"):
        load(use, tmp_path)


def test_the_topology_says_where_the_code_is_and_the_run_what_it_was(tmp_path: Path) -> None:
    use = mine(tmp_path)
    (tmp_path / "topology.yaml").write_text(
        "data: {train: ./mine.py:rows, heldout: held.jsonl}\nstudent: {model: m}\n"
        "method: {name: grpo}\n"
    )
    topology = load_topology(tmp_path / "topology.yaml")
    assert topology.data.train == use
    before = identities(topology)
    assert list(before) == [use] and changed(topology, before, "then") == []
    mine(tmp_path, ROWS.replace("range(3)", "range(4)"))
    with pytest.raises(UserError) as caught:
        changed(topology, before, "the run began")
    assert str(caught.value).startswith(
        f"data.train: the code of {use!r} has changed since the run began (it was sha256:"
    )
