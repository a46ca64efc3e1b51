"""The page and the JSON file: several models, rows that are missing, and nothing that runs."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from zppo.errors import UserError
from zppo.suites.order import Served, SuiteOrder
from zppo.suites.page import write_page
from zppo.suites.results import RowResult, Trouble, row_folder, write_result
from zppo.suites.table import load_suite

HOSTILE = "<script>alert(1)</script>"


def order(out: Path, *labels: str, suite: str = "paper") -> SuiteOrder:
    models = [Served(label=label, model=label) for label in labels]
    return SuiteOrder(
        suite=load_suite(suite, []), models=models, judge=None, harness_pythons={}, out=str(out),
        limit=None, concurrent=1, seed=0, timeout_seconds=1, retry_seconds=1, startup_seconds=1,
        server_args={}, templates=None, baseline=None,
    )  # fmt: skip


def put(out: Path, label: str, short: str, *scores: float) -> None:
    folder = row_folder(out, label, short)
    folder.mkdir(parents=True)
    made = RowResult(
        short=short, settings={}, harness="lm-eval 0.4.13",
        scores={str(i): score for i, score in enumerate(scores)}, judged=3, unboxed=0, cut_off=1,
        refused=0, tokens=10, seconds=1.0, asked=len(scores),
    )  # fmt: skip
    write_result(folder, made)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_models_side_by_side_in_the_layout_of_the_paper(tmp_path: Path) -> None:
    for short in ("AIME25", "MMLU"):
        put(tmp_path, "base", short, 0.0, 1.0, 0.0, 1.0)
    put(tmp_path, "zppo", "AIME25", 1.0, 1.0, 0.0, 1.0)
    write_page(order(tmp_path, "base"))
    write_page(order(tmp_path, "zppo"))  # a later call adds its column
    rows = cells((tmp_path / "suite.html").read_text())
    llm = next(i for i, row in enumerate(rows) if row[1:2] == ["AIME25"])
    assert rows[llm][1:] == [
        "AIME25", "AIME26", "CEval", "GPQA-D", "HLE", "IMO-AB", "MMLU", "MMLU-Pro", "MMLU-Rd",
        "MultiCh", "average",
    ]  # fmt: skip
    assert rows[llm + 1][0] == "base" and rows[llm + 1][1] == "50.0 [15.0, 85.0]"
    assert rows[llm + 1][-1].endswith(
        "(2 of 10: without AIME26, CEval, GPQA-D, HLE, IMO-AB, MMLU-Pro, MMLU-Rd, MultiCh)"
    )
    assert rows[llm + 2][0] == "zppo" and rows[llm + 2][-1].startswith("75.0 [30.1, 95.4] (1 of 10")
    assert rows[llm + 4][:2] == ["zppo", "+25.0 [+0.0, +75.0]"]
    assert rows[llm + 4][-1] == "+25.0 [+0.0, +75.0] over 1"
    data = json.loads((tmp_path / "suite.json").read_text())
    assert [model["label"] for model in data["models"]] == ["base", "zppo"]
    assert data["models"][1]["averages"]["VLM"]["value"] is None
    assert data["models"][1]["average_differences"]["LLM"]["benchmarks"] == 1


def test_reasons_stand_in_the_list_of_what_is_missing(tmp_path: Path) -> None:
    folder = row_folder(tmp_path, HOSTILE, "HLE")
    folder.mkdir(parents=True)
    write_result(folder, Trouble(reason=f"broke at {HOSTILE}"))
    write_page(order(tmp_path, HOSTILE, suite="llm"))
    page = (tmp_path / "suite.html").read_text()
    assert ["HLE", f"broke at {HOSTILE}", HOSTILE] in cells(page)
    assert "<script" not in page and "Judged by a prompt of their own: HLE, MultiCh." in page


def test_a_list_of_models_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text("[1]")
    with pytest.raises(UserError) as error:
        write_page(order(tmp_path, "base"))
    assert str(error.value) == (
        f"--out: {str(tmp_path / 'models.json')!r} is no list of models; remove it"
    )


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        write_page(replace(order(tmp_path, "base"), baseline="bsae"))
    assert str(error.value) == "--baseline: there is no model 'bsae' (did you mean 'base'?)"
