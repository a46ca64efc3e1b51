"""Suites in tests: four questions with a known answer key, a server that answers them, the order,
and what is left behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
from openai_server import Answer, Request, Server, event, piece, raw
from stub_harness import make_environment

from zppo.suites.order import Served, SuiteOrder
from zppo.suites.table import Decoding, Row, Source, Suite
from zppo_actors.suites import process

QUESTIONS = {"What is 1+1?": "2", "What is 2+2?": "4", "What is 3+3?": "6", "What is 4+4?": "8"}
CLOSING = (
    "Reason step by step inside <think> and </think> tags, then write your final answer inside "
    "\\boxed{}."
)


def reply(text: str) -> bytes:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    pieces = piece(0, text) + piece(0, None, "stop") + event(usage) + b"data: [DONE]\n\n"
    return raw(pieces, Content_Type="text/event-stream")


def knows(answers: dict[str, str], verdict: str = "wrong") -> Answer:
    """A server whose model boxes the answer that it knows, and whose judge says `verdict`."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        content = request.body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if request.body["model"] == "judge":
            writer.write(reply(json.dumps({"verdict": verdict})))
        else:
            writer.write(reply(next(said for asked, said in answers.items() if asked in text)))

    return answer


def boxed(**wrong: str) -> dict[str, str]:
    return {asked: f"\\boxed{{{wrong.get(gold, gold)}}}" for asked, gold in QUESTIONS.items()}


def table(folder: Path, *shorts: str, **changes: Any) -> Suite:
    rows = []
    for short in shorts:
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS.items()]
        (folder / f"{short}.jsonl").write_text("".join(lines))
        source = Source(
            path="json", files=[f"{short}.jsonl"], question="{{question}}", answer="{{answer}}"
        )
        told: dict[str, Any] = {"family": "LLM", "harness": "lm-eval", "scoring": "E+J"}
        rows.append(Row(short=short, source=source, **{**told, **changes}))
    return Suite(name="mine", folder=str(folder), decoding=Decoding(max_new_tokens=9), rows=rows)


def order_of(folder: Path, server: Server, *shorts: str, version: str = "0.4.13") -> SuiteOrder:
    python = folder / "environment" / "python"
    if not python.exists():
        make_environment(folder / "environment", version)
    return SuiteOrder(
        suite=table(folder, *shorts),
        models=[Served(label="student", model="student", base_url=server.base_url)],
        judge=None,
        harness_pythons={"lm-eval": str(python)},
        out=str(folder / "out"),
        limit=None,
        concurrent=2,
        seed=0,
        timeout_seconds=20.0,
        retry_seconds=0.5,
        startup_seconds=0.5,
        server_args={},
        templates=None,
        baseline=None,
    )


def run(order: SuiteOrder) -> int:
    return process.main([msgspec.json.encode(order).decode()])


def result(order: SuiteOrder, short: str, label: str = "student") -> dict[str, Any]:
    return json.loads((Path(order.out) / label / "rows" / short / "result.json").read_text())  # type: ignore[no-any-return]


def summary(order: SuiteOrder) -> dict[str, Any]:
    return json.loads((Path(order.out) / "suite.json").read_text())  # type: ignore[no-any-return]
