"""A comparison in sentences: what was run, what it shows, and what it cannot show."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from zppo.comparison.results import MethodResult, Results, graduation
from zppo.comparison.statistics import mean_interval, student_half_width
from zppo.comparison.tables import points_text, share_text
from zppo.errors import count_of

COVERAGE = {2: 50, 3: 75, 4: 81, 5: 85, 6: 87, 7: 87, 8: 89}
"""How often a 95 % percentile bootstrap of so many normal values covers their mean, in per cent."""


def sentences(results: Results) -> list[str]:
    """In the order in which a reader asks."""
    return [
        part
        for part in (_what(results), *_findings(results), *_graduates(results), *_limits(results))
        if part
    ]


def command(results: Results) -> str:
    """The command that gives this comparison."""
    record = results.record
    parts = [
        "python",
        "-m",
        "zppo.compare",
        "--topology",
        record.source,
        "--methods",
        ",".join(record.methods),
    ]
    parts += ["--seeds", ",".join(map(str, record.seeds)), "--baseline", record.baseline]
    parts += ["--metric-budget", record.budget] if record.budget != "steps" else []
    return " ".join(
        map(shlex.quote, [*parts, *(part for text in record.overrides for part in ("--set", text))])
    )


def _what(results: Results) -> str:
    record, done = results.record, sum(run.finished for run in results.runs)
    seeds = ", ".join(map(str, record.seeds))
    word = "seed" if len(record.seeds) == 1 else "seeds"
    return (
        f"{count_of(len(results.methods), 'method')}, each with {word} {seeds}; {done} of "
        f"{count_of(len(results.runs), 'run')} finished. All share every other setting, and runs "
        "of one seed see the questions in the same order."
    )


def _findings(results: Results) -> list[str]:
    """One sentence on each method but the baseline, at the budget that the user wants first."""
    of = results.headline
    if results.step is None:
        return ["No finished run has a held-out evaluation, so accuracies cannot be compared."]
    pairs = [
        (method, results.differences(method, of))
        for method in results.methods
        if method is not results.baseline
    ]
    return [
        finding(method, results.baseline, differences, results.headline_budget)
        for method, differences in pairs
        if differences
    ]


def finding(
    method: MethodResult, baseline: MethodResult, differences: Sequence[float], at: str
) -> str:
    """`ZPPO − GRPO† at 80 steps: +7.0 [+5.1, +8.8] points of held-out accuracy (3 seeds; by
    Student's t ±4.6).`

    A difference is called shown only where neither interval contains 0.
    """
    interval, half = mean_interval(differences), student_half_width(differences)
    assert interval is not None
    text = (
        f"{method.title} − {baseline.title} at {at}: {points_text(interval)} points of held-out "
        "accuracy"
    )
    if half is None:
        return f"{text} (one seed, no interval)."
    shown = interval.excludes_zero and abs(interval.value) > half
    verdict = "" if shown else "; an interval contains 0, so no difference is shown"
    return f"{text} ({interval.count} seeds; by Student's t ±{100 * half:.1f}{verdict})."


def _graduates(results: Results) -> list[str]:
    shares = [
        (method.title, share)
        for method in results.methods
        if (share := graduation(method)) is not None
    ]
    if not shares:
        return []
    parts = ", ".join(f"{title} {share_text(share)}" for title, share in shares)
    return [f"Graduated of the questions that entered the replay buffer: {parts}."]


def _limits(results: Results) -> list[str]:
    seeds, notes = len(results.record.seeds), []
    if seeds in COVERAGE:
        notes.append(
            f"Intervals in brackets come from {seeds} seeds. A bootstrap over so few values is too "
            "narrow (of normal "
            f"values it covers the mean in about {COVERAGE[seeds]} % of all cases, not 95 %), so "
            "read them as the least uncertainty there is."
        )
    if results.step is not None and results.cost is None:
        notes.append(
            "Compute is not compared: a run has no counts of tokens, or the size of a teacher that "
            "worked is not known (a server, or several teachers)."
        )
    failed = sorted(
        {run.method for run in results.runs if run.failure is not None and not run.finished}
    )
    if failed:
        notes.append(
            f"Some runs failed ({', '.join(failed)}); a method is judged by those of its runs that "
            "finished."
        )
    if len(results.methods) > 2:
        notes.append(
            "Several methods are compared with one baseline and the intervals are not widened for "
            "that."
        )
    return notes
