"""The real harnesses, in the environments that `make harnesses` makes (or those in the folder
`ZPPO_TEST_HARNESSES`), on local tasks with a known answer key."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from openai_server import Server, running
from suite_helpers import CLOSING, QUESTIONS, knows, order_of, result, run, summary

from zppo.suites.order import SuiteOrder
from zppo.suites.table import Decoding, Row, Suite

FOLDER = Path(os.environ.get("ZPPO_TEST_HARNESSES", Path(sys.prefix) / "harnesses"))
ENVIRONMENTS = {name: FOLDER / name / "bin" / "python" for name in ("lm-eval", "lmms-eval")}
TASK = """\
task: seen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function seen.picture
doc_to_text: !function seen.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16}}
process_results: !function seen.score
metric_list: [{{metric: acc, aggregation: !function seen.mean, higher_is_better: true}}]
"""
CODE = """\
from PIL import Image

def picture(doc):
    return [Image.new("RGB", (32, 32), "red")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + "\\nAnswer with one number."

def score(doc, results):
    return {"acc": {"score": float(results[0].strip() == doc["answer"])}}

def mean(scores):
    return sum(one["score"] for one in scores) / len(scores)
"""

pytestmark = [pytest.mark.harnesses, pytest.mark.slow]


@pytest.fixture
def server() -> Iterator[Server]:
    """Right, right, wrong, and right without a box."""
    with running(Server(models=("student", "judge"))) as served:
        answers = {"1+1": "\\boxed{2}", "2+2": "<think>\n3?\n</think>\n\\boxed{4}"}
        served.default = knows({**answers, "3+3": "\\boxed{7}", "4+4": "8"})
        yield served


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def real(order: SuiteOrder, *harnesses: str, **changes: Any) -> SuiteOrder:
    for name in harnesses:
        if not ENVIRONMENTS[name].exists():
            pytest.skip(f"{name} is not installed: make harnesses")
    pythons = {name: str(python) for name, python in ENVIRONMENTS.items()}
    return replace(order, harness_pythons=pythons, **changes)


def test_lm_eval(tmp_path: Path, server: Server) -> None:
    order = real(order_of(tmp_path, server, "Sums"), "lm-eval")
    assert run(order) == 0
    assert [*result(order, "Sums")["scores"].values()] == [1.0, 1.0, 0.0, 0.0]
    assert result(order, "Sums")["harness"] == "lm-eval 0.4.13"
    asked = {request.body["messages"][-1]["content"] for request in server.requests}
    assert asked == {f"{question}\n\n{CLOSING}" for question in QUESTIONS}
    assert all("stop" not in request.body for request in server.requests)


def test_lmms_eval(tmp_path: Path, server: Server) -> None:
    """By the harness's own metric, which sees the content of the box, and by ours, which sees the
    whole; both from one set of answers."""
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS.items())
    )
    (tmp_path / "seen.yaml").write_text(TASK.format(file=tmp_path / "q.jsonl"))
    (tmp_path / "seen.py").write_text(CODE)
    told: dict[str, Any] = {
        "family": "VLM", "harness": "lmms-eval", "task": ["seen"], "include": ".",
        "directives": ["Answer with one number\\."],
    }  # fmt: skip
    rows = [
        Row(short="Det", scoring="Det", metric="acc.score", **told),
        Row(short="Rule", scoring="E+J", **told),
    ]
    suite = Suite(name="seen", folder=str(tmp_path), decoding=Decoding(), rows=rows)
    order = real(order_of(tmp_path, server), "lmms-eval", suite=suite)
    assert run(order) == 0
    assert [*result(order, "Det")["scores"].values()] == [1.0, 1.0, 0.0, 1.0]
    assert [*result(order, "Rule")["scores"].values()] == [1.0, 1.0, 0.0, 0.0]
    asked = [result(order, short)["asked"] for short in ("Det", "Rule")]
    assert (asked, len(server.requests)) == ([4, 0], 4)
    body = server.requests[0].body
    picture, words = body["messages"][-1]["content"]
    assert picture["type"] == "image_url"
    assert words["text"].endswith(f"\n\n{CLOSING}") and "one number" not in words["text"]
    assert (body["max_tokens"], body["top_k"], body["presence_penalty"]) == (12_288, 20, 1.5)
    average = summary(order)["models"][0]["averages"]["VLM"]
    assert (average["value"], average["have"]) == (0.625, 2)
