"""What a suite would take, row by row, and what is known of it beforehand: the rows that cannot be
had, and the settings that a result hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from zppo.errors import count_of
from zppo.suites.order import Served, SuiteOrder
from zppo.suites.pictures import server_options
from zppo.suites.results import Column, RowResult, read_column
from zppo.suites.table import OWN_JUDGE, Row, Suite, decoding_of, tasks_of

CAPACITY = (
    "cpu-offload-gb",
    "data-parallel-size",
    "enable-chunked-prefill",
    "enforce-eager",
    "gpu-memory-utilization",
    "max-num-batched-tokens",
    "max-num-seqs",
    "no-enable-chunked-prefill",
    "pipeline-parallel-size",
    "tensor-parallel-size",
)
"""Options of the server that say how much it works at once, and not what it answers."""
OF_MODEL = ("model", "server_args")
"""Settings in which the models of one folder differ."""
TOKEN_FILE = Path("~/.cache/huggingface/token")


def known_missing(suite: Suite, judged: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Row -> why it cannot be run here, as far as the table and the environment tell."""
    signed_in = bool(environment.get("HF_TOKEN")) or TOKEN_FILE.expanduser().is_file()
    reasons = {row.short: _reason(row, judged, signed_in) for row in suite.rows}
    return {short: reason for short, reason in reasons.items() if reason is not None}


def _reason(row: Row, judged: bool, signed_in: bool) -> str | None:
    if row.missing is not None:
        return row.missing
    if row.gated and not signed_in:
        return f"gated set: accept the terms of {row.data or 'its data set'}, then set HF_TOKEN"
    if row.scoring == OWN_JUDGE and not judged:
        return "has its own judge prompt, and no judge was given: --judge-server"
    return None


def settings_of(row: Row, model: Served, order: SuiteOrder, templates: str) -> dict[str, Any]:
    """What must be the same for a result of the row to count: what was asked of whom, how, and who
    judged. Where a server listens may change. `templates` is the digest of the user's, empty
    without any."""
    settings: dict[str, Any] = msgspec.to_builtins(row)
    for words in ("questions", "data", "note", "benchmark", "missing", "gated"):
        settings.pop(words)
    decoding: dict[str, Any] = msgspec.to_builtins(decoding_of(row, order.suite))
    args = server_options(model, order)
    return settings | {
        "decoding": decoding,
        "model": model.identity,
        "server_args": {name: args[name] for name in sorted(args) if name not in CAPACITY},
        "judge": order.judge.model if order.judge is not None else None,
        "limit": order.limit,
        "seed": order.seed,
        "templates": templates or None,
    }


def plan_lines(order: SuiteOrder, missing: Mapping[str, str], speed: float | None) -> list[str]:
    """The plan in words: for each row its questions and the most tokens it can take, for each model
    the time. `speed` is in tokens a second; where it is None that of the rows already done counts.
    """
    rows = order.suite.rows
    width = max(len(row.short) for row in rows)
    runnable = [row for row in rows if row.short not in missing]
    lines = [
        f"suite {order.suite.name}: {count_of(len(rows), 'benchmark')}, {len(runnable)} can be run"
    ]
    for row in rows:
        if row.short in missing:
            lines.append(f"  {row.short:<{width}}  missing: {missing[row.short]}")
            continue
        asked, tokens = questions_of(row, order), _most_tokens(row, order)
        many = "questions unknown" if asked is None else count_of(asked, "question")
        most = "" if tokens is None else f", at most {count_of(tokens, 'token')}"
        lines.append(f"  {row.short:<{width}}  {row.harness}, {many}{most}")
    return [
        *lines,
        *(line for one in order.models for line in _of_model(one, order, missing, speed)),
    ]


def questions_of(row: Row, order: SuiteOrder) -> int | None:
    """How many are asked; --limit holds for each task of the row."""
    if order.limit is None or row.questions is None:
        return row.questions
    tasks = len(row.source.names) or 1 if row.source is not None else len(row.task)
    return min(row.questions, order.limit * tasks)


def _most_tokens(row: Row, order: SuiteOrder) -> int | None:
    asked = questions_of(row, order)
    return None if asked is None else asked * decoding_of(row, order.suite).max_new_tokens


def _of_model(
    model: Served, order: SuiteOrder, missing: Mapping[str, str], speed: float | None
) -> list[str]:
    """One line for a model: what is done, what is left, and how long that takes."""
    column = read_column(Path(order.out), model.label, order.suite)
    unfinished = [row for row in order.suite.rows if row.short not in {*column.results, *missing}]
    # Rows of the same tasks are parts of one, which is asked once.
    left = [*{tuple(tasks_of(row)): row for row in unfinished}.values()]
    counted = [tokens for row in left if (tokens := _most_tokens(row, order)) is not None]
    length, measured = _measured(column)
    line = f"{model.label}: {len(column.results)} done, {len(unfinished)} to run"
    if not left:
        return [line]
    sizes = [f"at most {sum(counted):,} tokens"] if counted else []
    sizes += [f"{len(left) - len(counted)} of unknown size"] if len(counted) < len(left) else []
    line += f", {' and '.join(sizes)}"
    expected = sum(counted)
    if length is not None:
        expected = round(length * sum(questions_of(row, order) or 0 for row in left))
        line += f"; about {expected:,} at the {length:.0f} per answer so far"
    speed = speed or measured
    if speed is None or not expected:
        why = "the table counts no questions" if speed else "give --tokens-per-second"
        return [line, f"  how long that takes is not known: {why}"]
    bound = "about" if length is not None else "at most"
    return [line, f"  {bound} {expected / speed / 3600:.1f} hours at {speed:,.0f} tokens a second"]


def _measured(column: Column) -> tuple[float | None, float | None]:
    """Tokens per answer and per second of the rows that were done in one go."""
    whole = [one for one in column.results.values() if one.tokens and one.asked >= len(one.scores)]
    answers, tokens = sum(one.asked for one in whole), sum(one.tokens or 0 for one in whole)
    seconds = sum(one.seconds for one in whole)
    if not answers or not seconds:
        return None, None
    return tokens / answers, tokens / seconds


def told(result: RowResult) -> str:
    """What a result hangs on, in short, for the page."""
    parts = [result.harness, count_of(len(result.scores), "question")]
    parts += [f"{result.judged} judged"] if result.judged else []
    parts += [f"{result.cut_off} cut off"] if result.cut_off else []
    parts += [f"{result.refused} not taken by the server"] if result.refused else []
    return ", ".join(parts)
