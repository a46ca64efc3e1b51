"""The run in plain sentences: what a reader should take away before the first figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zppo.errors import count_of
from zppo.records.metrics import KIND_TITLES
from zppo.report.load import RunData


def sentences(run: RunData) -> list[str]:
    """What happened, in whole sentences; those the run has no numbers for are left out."""
    summary = run.summary
    if summary["steps"] == 0:
        return ["No step has been trained yet.", *_evaluated(run)]
    parts = [
        _work(summary),
        _updates(summary),
        *_evaluated(run),
        _responses(summary),
        _failures(summary),
        *_buffer(summary),
        _staleness(run),
        _promise(summary),
    ]
    return [part for part in parts if part]


def duration(seconds: float) -> str:
    """`52 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _work(summary: Mapping[str, Any]) -> str:
    rewritten = {
        name.removeprefix("groups_"): n
        for name, n in summary.items()
        if name.startswith("groups_") and n
    }
    replayed = count_of(summary["questions_replayed"], "replayed question")
    text = (
        f"{count_of(summary['steps'], 'rollout step')} in {duration(summary['wall_seconds'])} "
        f"trained on {summary['questions_new']:,} new and {replayed}"
    )
    if rewritten:
        *others, last = [(n, KIND_TITLES.get(kind, kind)) for kind, n in rewritten.items()]
        counts = [*(f"{n:,} {kind}" for n, kind in others), count_of(last[0], f"{last[1]} group")]
        text += f", and on {' and '.join(counts)}"
    tokens = count_of(summary["tokens_generated"], "response token was", "response tokens were")
    return f"{text}; {tokens} sampled for it."


def _updates(summary: Mapping[str, Any]) -> str:
    """Sampling is no training: only updates change the student."""
    updates = summary["updates"]
    if updates is None:
        return ""
    if updates == 0:
        return "NOT ONE UPDATE WAS MADE: the student is what it was before."
    return f"The optimizer made {count_of(updates, 'update')}."


def _responses(summary: Mapping[str, Any]) -> str:
    parts = {
        "answers_missing": "had no boxed answer",
        "truncated": "were cut off at the length limit",
        "answers_timed_out": "could not be graded in time",
    }
    known = [f"{100 * summary[key]:.3g} % {what}" for key, what in parts.items() if summary[key]]
    return f"Of the student's responses, {', '.join(known)}." if known else ""


def _failures(summary: Mapping[str, Any]) -> str:
    """Tries that failed, by kind of task and by actor."""
    if not summary["failed_tasks"]:
        return ""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in summary["failed_tasks"].items())
    actors = ", ".join(f"{n:,} of {actor}" for actor, n in summary["failed_tasks_by_actor"].items())
    return f"Tasks that failed: {kinds} ({actors})."


def _evaluated(run: RunData) -> list[str]:
    before, after = run.summary["heldout_before"], run.summary["heldout_after"]
    if before is None:
        return []
    if after is None:
        return [f"The untrained student answers {100 * before:.1f} % of the held-out questions."]
    change = 100 * (after - before)
    direction = "up" if change >= 0 else "down"
    return [
        f"Held-out accuracy went {direction} by {abs(change):.1f} points, "
        f"from {100 * before:.1f} % to {100 * after:.1f} %{_intervals(run)}."
    ]


def _intervals(run: RunData) -> str:
    """The 95 % intervals of the first and the last evaluation, so that nobody reads noise as
    progress."""
    lines = sorted(run.heldout, key=lambda line: line["step"])
    ends = [line for line in (lines[0], lines[-1]) if "low" in line and "high" in line]
    if len(ends) < 2:
        return ""
    first, last = (f"{100 * line['low']:.0f}–{100 * line['high']:.0f} %" for line in ends)
    return f" (95 % intervals {first} and {last})"


def _buffer(summary: Mapping[str, Any]) -> list[str]:
    if not summary["admitted"]:
        return []
    share = 100 * summary["graduated"] / summary["admitted"]
    return [
        f"The replay buffer admitted {count_of(summary['admitted'], 'hard question')}; "
        f"{summary['graduated']:,} of them ({share:.0f} %) graduated and "
        f"{count_of(summary['evicted'], 'was', 'were')} evicted."
    ]


def _staleness(run: RunData) -> str:
    bound, seen = run.setting("scheduler", "max_staleness"), run.summary["max_staleness_seen"]
    if bound is None:
        return f"No token was older than {count_of(seen, 'policy version')} when it was trained on."
    verdict = "within" if seen <= bound else "ABOVE"
    return (
        f"The oldest token trained on was {count_of(seen, 'policy version')} behind, {verdict} the "
        f"bound of {bound}."
    )


def _promise(summary: Mapping[str, Any]) -> str:
    """What the journal vouches for, and from which step on."""
    if summary["journal_problem"] is not None:
        return (
            "Nothing vouches for it that every question was trained exactly once: the journal "
            f"{summary['journal_problem']}."
        )
    start = summary["journal_from_step"]
    since = f"From step {start} on, where the journal begins: " if start else ""
    if summary["trained_twice"] == 0 and summary["lost"] == 0:
        return (
            f"{since}Every new question was trained exactly once: none was lost, no group was "
            "trained twice."
        )
    return (
        f"{since}THE EXACTLY-ONCE PROMISE WAS BROKEN: {summary['trained_twice']:,} groups or "
        f"questions were trained twice and {summary['lost']:,} questions were lost."
    )
