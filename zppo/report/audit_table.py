"""The candidate audit as a table: one row per kind of prompt, first and last tenth of the steps."""

from __future__ import annotations

from typing import NamedTuple

from zppo.records.metrics import KIND_TITLES, reformulated_kinds
from zppo.records.summary import ends
from zppo.report.load import RunData

COLUMNS = {
    "accuracy/{}": "accuracy",
    "audit/{}/mixed": "mixed groups",
    "audit/{}/unanimous": "groups that agree",
    "audit/{}/right_repeats": "right replies that repeat the right candidate",
    "audit/{}/wrong_repeats": "wrong replies that repeat a wrong one",
    "audit/{}/listed_repeats": "replies that repeat a listed wrong answer",
    "audit/{}/picked_first": "picks of the first slot",
    "audit/{}/accuracy_right_first": "accuracy, right one first",
    "audit/{}/accuracy_right_second": "accuracy, right one second",
}


class AuditTable(NamedTuple):
    titles: list[str]
    rows: list[tuple[str, list[str]]]


def audit_table(run: RunData) -> AuditTable | None:
    """The table, without columns that no kind has; None for a run without rewritten prompts."""
    counted = dict.fromkeys(kind for line in run.steps for kind in reformulated_kinds(line))
    kinds = [kind for kind in counted if len(run.series(f"audit/{kind}/mixed").steps)]
    if not kinds:
        return None
    rows = [
        (title, [_change(run, name.format(kind)) for name in COLUMNS])
        for kind, title in (("plain", "plain (all)"), *_titled(kinds))
    ]
    used = [i for i in range(len(COLUMNS)) if any(cells[i] for _, cells in rows)]
    titles = list(COLUMNS.values())
    return AuditTable(
        titles=[titles[i] for i in used],
        rows=[(kind, [cells[i] or "–" for i in used]) for kind, cells in rows],
    )


def _titled(kinds: list[str]) -> list[tuple[str, str]]:
    return [(kind, KIND_TITLES.get(kind, kind)) for kind in kinds]


def _change(run: RunData, name: str) -> str:
    """`42 → 84 %`; empty where the metric was never measured."""
    first, last = ends(run.series(name).values.tolist())
    return "" if first is None or last is None else f"{100 * first:.0f} → {100 * last:.0f} %"
