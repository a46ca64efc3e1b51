"""The page: figures, numbers, sentences and the question browser put into one self-contained HTML
file.

Nothing is fetched from anywhere, and the page's own content security policy forbids it: the only
script and the only style sheet that run are those whose digests are in the policy. All text of the
run is escaped by the template or goes through `textContent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from markupsafe import Markup

from zppo.errors import count_of
from zppo.report.audit_table import audit_table
from zppo.report.browser import BrowserData, browser_data, embed
from zppo.report.figures import draw_all
from zppo.report.frame import ASSETS, digest, environment, flatten
from zppo.report.load import RunData
from zppo.report.sentences import duration, sentences


def render_page(run: RunData) -> str:
    """The whole page as text."""
    browser = browser_data(run)
    drawings = draw_all(run)
    script, style = (
        (ASSETS / "browser.js").read_text("utf-8"),
        (ASSETS / "page.css").read_text("utf-8"),
    )
    return environment(ASSETS).get_template("page.html.j2").render(
        title=run.setting("run", "name", default=run.run_dir.name),
        method=run.summary["method"],
        run=run.run,
        folder=run.run_dir.name,
        verdict=run.summary["verdict"] or "no verdict recorded",
        tiles=tiles(run.summary),
        sentences=sentences(run),
        advice=run.summary["advice"],
        audit=audit_table(run),
        sections=[
            (name, list(group))
            for name, group in groupby(drawings, key=lambda drawing: drawing.section)
        ],
        summary={key: value for key, value in run.summary.items() if key != "advice"},
        settings=list(flatten(run.run.get("topology", {}))),
        browser_note=browser_note(browser),
        has_questions=bool(browser.questions),
        data=Markup(embed(browser)),
        script=Markup(script),
        style=Markup(style),
        script_digest=digest(script),
        style_digest=digest(style),
    )  # fmt: skip


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline numbers: (value, what it is, a detail)."""

    def change(before: float | None, after: float | None) -> str:
        return " → ".join(
            "–" if value is None else f"{100 * value:.0f} %" for value in (before, after)
        )

    return [
        _tile(summary["steps"], "rollout step", duration(summary["wall_seconds"])),
        (
            change(summary["heldout_before"], summary["heldout_after"]),
            "held-out accuracy",
            "before → after",
        ),
        (
            change(summary["accuracy_first"], summary["accuracy_last"]),
            "on new questions",
            "first → last tenth",
        ),
        (f"{summary['graduated']:,}", "graduated", f"of {summary['admitted']:,} admitted"),
        _tile(summary["max_staleness_seen"], "version", "greatest staleness"),
        _promise(summary),
    ]


def _tile(number: float, noun: str, detail: str) -> tuple[str, str, str]:
    value, _, what = count_of(number, noun).partition(" ")
    return value, what, detail


def _promise(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """The tile of the exactly-once promise: what the journal vouches for."""
    name = "exactly-once"
    if summary["journal_problem"] is not None:
        return "unknown", name, f"the journal {summary['journal_problem']}"
    since = summary["journal_from_step"]
    detail = f"{summary['trained_twice']} trained twice, {summary['lost']} lost"
    kept = summary["trained_twice"] == 0 and summary["lost"] == 0
    return (
        "kept" if kept else "broken",
        name,
        f"{detail}, from step {since} on" if since else detail,
    )


def browser_note(browser: BrowserData) -> str:
    """How much of the run the browser shows."""
    shown = len(browser.questions)
    if shown == browser.total:
        return (
            "The question that was hard at some visit."
            if shown == 1
            else f"All {shown:,} questions that were hard at some visit."
        )
    return (
        f"{shown:,} of {browser.total:,} questions that were hard at some visit: those with the "
        "most reformulated "
        "prompts and visits, each fate in turn, as many as one page can carry. The rollout store "
        "holds them all."
    )
