"""The recipe of the paper on made-up rows that are laid out as its two data sets are: Vero as on the
Hub (a folder for each sub-dataset, splits, one picture a row) and as its own script writes it out
(JSONL with paths), MMFineReason as on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from raw_data import png, write_jsonl, write_parquet

from zppo.build_data import main

Row = dict[str, Any]
TOKENIZER = Path(__file__).parents[3] / "examples" / "quickstart" / "student"
SYSTEM = {"role": "system", "content": "Answer in <answer>."}


def vero(number: int, source: str, kind: str = "numeric", answer: str = "7") -> Row:
    question = f"<image>\nHow much is {number}?"
    return {
        "id": f"{source}_{number}",
        "data_source": source,
        "prompt": [SYSTEM, {"role": "user", "content": question}],
        "image": png(number, 320, 200),
        "ability": "stem",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"question": question, "answer": answer, "reward_type": kind},
    }


def mmfinereason(number: int, source: str, rate: float = 0.25) -> Row:
    return {
        "id": number,
        "source": source,
        "question": f"<image>Find x, number {number}.",
        "answer": "A",
        "original_answer": "<think>…</think><answer>A</answer>",
        "image": png(5000 + number, 320, 200),
        "pass_rate": rate,
        "is_consistent": True,
        "qwen3vl_235b_thinking_response": "…",
    }


def hub(folder: Path, rows: dict[str, list[Row]]) -> None:
    for name, part in rows.items():
        (folder / name).mkdir(parents=True)
        write_parquet(folder / name / "train-00000-of-00001.parquet", part)
        write_parquet(folder / name / "val-00000-of-00001.parquet", part[:1])


def written_out(folder: Path, rows: dict[str, list[Row]]) -> None:
    """`image` becomes `images`, a list of one."""
    folder.mkdir()
    lists = [
        {
            ("images" if name == "image" else name): [value] if name == "image" else value
            for name, value in row.items()
        }
        for part in rows.values()
        for row in part
    ]
    write_jsonl(folder / "vero_600k_train.verl.jsonl", lists)
    write_jsonl(folder / "vero_600k_val.verl.jsonl", lists[:1])


@pytest.mark.slow
def test_both_layouts_of_vero_make_one_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "stem-ai2d_merged": [vero(i, "ai2d_merged", "multiple_choice", "B") for i in range(4)],
        "chart_ocr-CoSyn_400k_chart": [vero(i, "CoSyn_400k_chart") for i in range(10, 13)],
        "counting-refcocog": [vero(i, "refcocog", "grounding", "[1, 2]") for i in range(20, 22)],
        "stem-tqa": [vero(30, "tqa", "ordering"), vero(31, "tqa", "exact_match", "a red fox")],
    }
    hub(tmp_path / "hub", rows)
    written_out(tmp_path / "jsonl", rows)
    other = tmp_path / "mmfinereason"
    (other / "data").mkdir(parents=True)
    theirs = [
        *(mmfinereason(i, "FineVision-ai2d_merged") for i in range(3)),
        *(mmfinereason(i, "FineVision-geometry3k(mathv360k)") for i in range(10, 14)),
        mmfinereason(20, "MMR1", rate=0.75),
        mmfinereason(21, "GameQA-140K"),
    ]
    write_parquet(other / "data" / "train-00000-of-00001.parquet", theirs)

    found = []
    for layout in ("hub", "jsonl"):
        out = tmp_path / f"out-{layout}"
        order = ["--vero", tmp_path / layout, "--mmfinereason", other, "--out", out]
        order += ["--recipe", "zppo77k", "--tokenizer", TOKENIZER, "--json"]
        assert main([str(part) for part in order]) == 0
        report = json.loads(capsys.readouterr().out)
        found.append((out / "train.jsonl").read_bytes())
    assert found[0] == found[1]
    kept = {(one["source"], one["sub_dataset"]): one["rows"] for one in report["sub_datasets"]}
    assert kept == {
        ("vero", "ai2d"): 4,
        ("vero", "cosyn_chart"): 3,
        ("vero", "tqa"): 1,
        ("mmfinereason", "geo3k"): 4,
    }
    dropped = {rule["rule"]: rule["rows"] for rule in report["dropped"]}
    assert dropped == {"not_listed": 3, "earlier_source": 3, "reward_type": 1, "pass_rate": 1}
    lines = [json.loads(line) for line in found[0].splitlines()]
    assert {(line["sub_dataset"], line["grader"]) for line in lines} == {
        ("ai2d", "choice"),
        ("cosyn_chart", "math"),
        ("tqa", "exact"),
        ("geo3k", "math"),
    }
    assert not any("<image>" in line["question"] for line in lines)
