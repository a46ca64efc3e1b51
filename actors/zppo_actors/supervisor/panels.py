"""The parts of the live view: pure functions from a `Status` (and what was seen before it) to rich
renderables.

Each part knows how to get smaller: columns leave the actors' table on narrow terminals, rows and
events on short ones. Nothing is said by colour alone. Text that came over the wire is wrapped in
`Text`, so markup in it stays text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zppo.errors import count_of
from zppo.records.metrics import KIND_TITLES, SPENT_PREFIX
from zppo_protocol.messages import ActorStatus, Status

SPOILT = (
    ("answers_missing", "without a box"),
    ("truncated", "cut off"),
    ("answers_timed_out", "not graded in time"),
)
"""Gauges of the responses of the last step that could not earn anything, shown unless 0."""
ENTRY_PREFIX = "buffer_by_entry/"
SPARKS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {
    "dead": "bold red",
    "lost": "bold red",
    "stuck": "bold red",
    "starting": "yellow",
    "waiting": "dim",
}


class History:
    """What the view remembers between two statuses: one value per step of each accuracy."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self._step: int | None = None

    def record(self, status: Status) -> None:
        """Take in a status; each step counts once."""
        if status.step == self._step:
            return
        self._step = status.step
        for kind, _ in accuracies(status):
            if f"accuracy_{kind}" in status.gauges:
                self.values[kind].append(status.gauges[f"accuracy_{kind}"])


def kinds(status: Status) -> list[str]:
    """The reformulated kinds the run has had groups of; BCQ and NCQ until there are any."""
    counted = [
        name.removeprefix("groups_")
        for name, n in status.counters.items()
        if name.startswith("groups_") and n
    ]
    return counted or ["bcq", "ncq"]


def accuracies(status: Status) -> list[tuple[str, str]]:
    """(kind, title) of each kind of prompt, plain first."""
    return [("plain", "plain"), *((kind, KIND_TITLES.get(kind, kind)) for kind in kinds(status))]


def accuracy_ends(status: Status, kind: str) -> tuple[float | None, float | None]:
    """Accuracy over the first and the last tenth of the steps, as the controller measured it."""
    gauges = status.gauges
    return gauges.get(f"accuracy_first_{kind}"), gauges.get(f"accuracy_last_{kind}")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def count(value: float) -> str:
    """1234 -> `1,234`; from a hundred thousand on `123k`, `1.2M`."""
    if abs(value) < 100_000:
        return f"{value:,.0f}"
    return f"{value / 1e6:.1f}M" if abs(value) >= 999_500 else f"{value / 1e3:.0f}k"


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `5:06:07`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values averaged into at most `width` bars, scaled to their own range."""
    width = min(width, len(values))
    if width < 2:
        return ""
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(max(means) - min(means), 1e-9)
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1))] for mean in means)


def header(status: Status, title: str) -> RenderableType:
    """Run, phase, step and ETA over a progress bar; two lines."""
    line = Table.grid(expand=True)
    line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    eta = f" · {duration(status.eta_seconds)} left" if status.eta_seconds > 0 else ""
    left = Text.assemble(("zppo ", "bold"), title, " · " if title else "", (status.phase, "cyan"))
    line.add_row(left, Text(f"step {status.step}/{status.total_steps}{eta}"))
    bar = Table.grid(expand=True)  # a bar of its own would not end its line
    bar.add_row(
        ProgressBar(total=max(status.total_steps, 1), completed=status.step, complete_style="green")
    )
    return Group(line, bar)


def actors(status: Status, width: int, rows: int) -> RenderableType:
    """One row per actor, at most `rows`; those left out are summed in the last row."""
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    columns = _actor_columns(width)
    for name in columns:
        if name == "state":
            table.add_column(name, ratio=1, no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(
                name,
                justify="left" if name == "actor" else "right",
                no_wrap=True,
                min_width=len(name),
            )
    shown = status.actors if len(status.actors) <= rows else status.actors[: max(rows - 1, 0)]
    for actor in shown:
        cells = _actor_cells(actor)
        table.add_row(*(cells[name] for name in columns))
    hidden = status.actors[len(shown) :]
    if hidden and rows > 0:
        rate = sum(actor.stats.get("tokens_per_second", 0.0) for actor in hidden)
        rest = {"actor": f"+ {len(hidden)} more", "tok/s": count(rate)}
        table.add_row(*(Text(rest.get(name, ""), "dim") for name in columns))
    return _panel(table, "actors", " · ".join(faults(status)))


def faults(status: Status) -> list[str]:
    """Restarts, tasks sent out again, and tries that failed, by kind."""
    counters = status.counters
    failed: Counter[str] = Counter()
    for name, tries in counters.items():
        if name.startswith("failed/"):
            failed[name.split("/")[1]] += tries
    return [
        count_of(counters.get("restarts", 0), "restart"),
        f"{count_of(counters.get('reissued', 0), 'task')} re-issued",
        *(f"{tries:,} {kind} failed" for kind, tries in failed.items()),
    ]


def advice(status: Status, rows: int) -> RenderableType | None:
    """The findings of `zppo.diagnosis`, the severe first; nothing if there are none."""
    lines = [
        Text(
            f" {line}",
            "bold red" if line.startswith("severe") else "yellow",
            no_wrap=True,
            overflow="ellipsis",
        )
        for line in status.advice[:rows]
    ]
    return Group(*lines) if lines else None


def waiting(status: Status, rows: int) -> RenderableType | None:
    """Who waits for whom, a line each; nothing if nobody waits."""
    lines = [
        Text(f" {line}", "yellow", no_wrap=True, overflow="ellipsis")
        for line in status.waiting[:rows]
    ]
    return Group(*lines) if lines else None


def learning(status: Status, history: History, width: int) -> RenderableType:
    """Accuracy of each kind of prompt, from the start to now with its trend, and on held-out
    questions; four lines."""
    grid = Table.grid(padding=(0, 1))
    for _ in range(5):
        grid.add_column(no_wrap=True, overflow="ellipsis")
    for kind, label in accuracies(status)[:3]:
        trend = sparkline(history.values[kind], width - 30)
        grid.add_row(label, *_change(*accuracy_ends(status, kind)), Text(trend, "cyan"))
    grid.add_row(
        "held-out",
        *_change(status.gauges.get("heldout_before"), status.gauges.get("heldout_last")),
        "",
    )
    return _panel(grid, "accuracy, first → now")


def buffer(status: Status, width: int) -> RenderableType:
    """Fill, entries by accuracy at admission, fates so far, and staleness against its bound; four
    lines."""
    counters, gauges = status.counters, status.gauges
    size, capacity = counters.get("buffer_size", 0), counters.get("buffer_capacity", 0)
    fill = Table.grid(padding=(0, 1))
    fill.add_column()
    fill.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(
        total=max(capacity, 1), completed=size, width=max(width - 24, 4), complete_style="magenta"
    )
    fill.add_row(bar, f"{count(size)} of {count(capacity)}")
    fates = (
        f"{count(counters.get('admitted', 0))} in · {count(counters.get('graduated', 0))} "
        "graduated · "
    )
    fates += f"{count(counters.get('evicted', 0))} evicted"
    stale = (
        f"staleness {gauges.get('staleness_mean', 0):.2f} · max "
        f"{gauges.get('staleness_max', 0):.0f}"
    )
    if "max_staleness" in gauges:
        stale += f" · bound {gauges['max_staleness']:.0f}"
    lines = [_line(text) for text in (_entries(counters), fates, stale)]
    return _panel(Group(fill, *lines), "replay buffer")


def pipeline(status: Status) -> RenderableType:
    """Windows on their way, the step time, and responses of no use; one line."""
    counters, gauges = status.counters, status.gauges
    parts = [
        f"windows {counters.get('windows_open', 0)} open, {counters.get('windows_ready', 0)} ready"
    ]
    if "lead" in gauges:
        parts.append(f"lead {gauges['lead']:.0f}")
    if gauges.get("step_seconds", 0) > 0:
        parts.append(f"{gauges['step_seconds']:.2f} s/step")
    if "trainer_wait_share" in gauges:
        parts.append(f"trainer waits {percent(gauges['trainer_wait_share'])}")
    parts += spending(counters)
    parts += [f"{percent(gauges[name])} {what}" for name, what in SPOILT if gauges.get(name)]
    return _line(" " + " · ".join(parts))


def spending(counters: Mapping[str, int]) -> list[str]:
    """What the teachers have cost, and the limits on it: `teacher 1,234 of 5,000 tokens`."""
    parts = []
    for name in ("tokens", "requests"):
        prefix = f"{SPENT_PREFIX}{name}/"
        spent = sum(n for counter, n in counters.items() if counter.startswith(prefix))
        limit = counters.get(f"budget_{name}")
        if spent or limit is not None:
            of = f" of {count(limit)}" if limit is not None else ""
            parts.append(f"teacher {count(spent)}{of} {name}")
    return parts


def events(lines: Sequence[str], rows: int) -> RenderableType | None:
    """The latest events, oldest first."""
    if rows <= 0 or not lines:
        return None
    return Group(
        *(Text(f" {line}", "dim", no_wrap=True, overflow="ellipsis") for line in lines[-rows:])
    )


def final_lines(status: Status, verdict: str) -> list[str]:
    """The closing block: what the run did, in plain text for both kinds of terminal."""
    counters, gauges = status.counters, status.gauges

    def counted(*pairs: tuple[str, str]) -> str:
        return " · ".join(f"{counters.get(name, 0):,} {label}" for name, label in pairs)

    accuracy = " · ".join(
        f"{label} {percent(first)} → {percent(last)}"
        for kind, label in accuracies(status)
        for first, last in [accuracy_ends(status, kind)]
        if last is not None
    )
    updates = f" · {count_of(counters['updates'], 'update')}" if "updates" in counters else ""
    before, after = gauges.get("heldout_before"), gauges.get("heldout_last")
    rows = {
        "steps": f"{status.step} of {status.total_steps} in "
        f"{duration(gauges.get('wall_seconds', 0.0))}",
        "accuracy": accuracy,
        "held-out": f"{percent(before)} → {percent(after)}" if before is not None else "",
        "questions": counted(("questions_new", "new"), ("questions_replayed", "replayed")),
        "groups": counted(
            *((f"groups_{kind}", KIND_TITLES.get(kind, kind)) for kind in kinds(status))
        ),
        "buffer": counted(
            ("buffer_size", "inside"),
            ("admitted", "admitted"),
            ("graduated", "graduated"),
            ("evicted", "evicted"),
        ),
        "staleness": f"at most {gauges.get('staleness_max', 0):.0f}"
        + (f" (bound {gauges['max_staleness']:.0f})" if "max_staleness" in gauges else ""),
        "tokens": counted(("tokens_generated", "sampled")) + updates,
        "teacher": " · ".join(spending(counters)),
        "faults": " · ".join(faults(status)),
    }
    return [
        verdict or status.phase,
        *(f"  {name:<10} {text}" for name, text in rows.items() if text),
        *(f"  {line}" for line in status.advice),
    ]


def _panel(content: RenderableType, title: str, subtitle: str | None = None) -> Panel:
    frame = Panel(
        content,
        title=title,
        title_align="left",
        box=box.ROUNDED,
        border_style="dim",
        padding=(0, 1),
    )
    frame.subtitle, frame.subtitle_align = subtitle, "right"
    return frame


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _change(first: float | None, now: float | None) -> tuple[Text, Text, Text]:
    style = "bold" if first is None or now is None or now <= first else "bold green"
    return Text(f"{percent(first):>5}"), Text("→"), Text(f"{percent(now):>5}", style)


def _entries(counters: dict[str, int]) -> str:
    bins = {
        name.removeprefix(ENTRY_PREFIX): n
        for name, n in counters.items()
        if name.startswith(ENTRY_PREFIX)
    }
    names = sorted(bins, key=float)
    return "entry " + " ".join(f"{name.removeprefix('0') or '0'}:{bins[name]}" for name in names)


def _actor_columns(width: int) -> list[str]:
    columns = ["actor", "state", "policy", "tok/s", "run/wait"]
    if width >= 76:
        columns += ["credits", "leases", "restarts"]
    return columns if width >= 50 else ["actor", "state", "tok/s"]


def _actor_cells(actor: ActorStatus) -> dict[str, Text]:
    stats = actor.stats
    busy = (
        f"{stats.get('running', 0):.0f}/{stats.get('waiting', 0):.0f}" if "running" in stats else ""
    )
    rate = count(stats["tokens_per_second"]) if "tokens_per_second" in stats else ""
    state_style = _STATE_STYLES.get(actor.state.split(" ")[0], "green")
    return {
        "actor": Text(actor.actor, "bold"),
        "state": Text(actor.state, state_style),
        "policy": Text(str(actor.policy_version) if actor.policy_version >= 0 else ""),
        "tok/s": Text(rate),
        "run/wait": Text(busy),
        "credits": Text(str(actor.credits)),
        "leases": Text(str(actor.leases)),
        "restarts": Text(str(actor.incarnation), "yellow" if actor.incarnation else "dim"),
    }
