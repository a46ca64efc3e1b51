"""The live view of a run: a full picture on a terminal, plain lines elsewhere.

Consumes `Status` messages; waits for nothing and never raises on an odd one. On a terminal the
picture is redrawn in place and fits the window, whatever its size. Elsewhere one line is printed
per trained step, per change of phase and per event, never the same thing twice. Either way the run
ends with the same closing block. A terminal that is lost (a closed pipe, a window that is gone, a
full disk behind a redirection) costs the view and never the run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from msgspec import structs
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zppo.errors import printable
from zppo_actors.supervisor import panels
from zppo_actors.supervisor.panels import History
from zppo_protocol.messages import Status

log = logging.getLogger("zppo.supervisor")

MAX_WIDTH = 120
"""Beyond this the eye loses the row; wider windows stay empty on the right."""

ADVICE_ROWS = 3
"""Findings that are shown at most, the severe first; the closing block has all."""

FEWEST_ROWS = 3
"""Actors that are shown even where that leaves no room for events."""


class LiveView:
    """Shows the run on `console` (standard output by default); `title` names the run and its
    method."""

    def __init__(self, console: Console | None = None, title: str = "") -> None:
        self._console = console or LastingConsole(highlight=False)
        self._title = title
        self._history = History()
        self._status: Status | None = None
        self._closed = False
        self._lost = False
        drawable = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if drawable else None

    def update(self, status: Status) -> None:
        """Show a newer status; its words may be a server's or a model's."""
        if self._closed:
            return
        status = _printable(status)
        previous, self._status = self._status, status
        self._history.record(status)
        if self._live is None:
            for line in changes(previous, status):
                self._print(line)
            return
        self._show(lambda: self._draw(status))

    def log(self, line: str) -> None:
        """Print a line that stays, above the picture."""
        self._print(line)

    def close(self, verdict: str = "") -> None:
        """Take the picture down and print the closing block with the verdict of the run; later
        calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None and self._live.is_started:
            self._show(self._live.stop)
        if self._status is not None:
            for line in panels.final_lines(self._status, verdict):
                self._print(line)
        elif verdict:
            self._print(verdict)

    def _draw(self, status: Status) -> None:
        assert self._live is not None
        if not self._live.is_started:
            self._live.start()
        self._live.update(
            render(status, self._history, self._title, *self._console.size), refresh=True
        )

    def _print(self, line: str) -> None:
        # A terminal would break words; in a file a line stays one.
        whole = not self._console.is_terminal
        self._show(lambda: self._console.print(Text(printable(line)), soft_wrap=whole))

    def _show(self, write: Callable[[], None]) -> None:
        """Write to the terminal; once it cannot be written to, never again."""
        if self._lost:
            return
        try:
            write()
        except Exception as error:  # whatever a terminal cannot show is not worth a run
            self._lost = True
            log.warning("the terminal is lost (%s); the run goes on without its view", error)
            let_go_of_terminal()


class LastingConsole(Console):
    """A console whose closed pipe is an error like any other; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise


def let_go_of_terminal() -> None:
    """Lead standard output and standard error to nowhere where they cannot be written to: what is
    left in their buffers would turn the exit code of the run into that of a failed flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def render(status: Status, history: History, title: str, width: int, height: int) -> RenderableType:
    """The picture for a window of `width` × `height` characters; it keeps within both."""
    width = min(width, MAX_WIDTH)
    parts: list[RenderableType] = [panels.header(status, title)]
    room = height - 3
    parts_below, used = _panels_below(status, history, width, room)
    room -= used
    # A crowd of actors must not push out who waits for whom and the latest events.
    reserve = 1 + sum(
        min(len(lines), most)
        for lines, most in ((status.advice, ADVICE_ROWS), (status.waiting, 2), (status.events, 3))
    )
    rows = min(len(status.actors), max(room - 3 - reserve, min(room - 4, FEWEST_ROWS)))
    if rows > 0:
        parts.append(panels.actors(status, width, rows))
        room -= rows + 3
    return Constrain(Group(*parts, *parts_below, *_tail(status, room)), width)


def _printable(status: Status) -> Status:
    words = {
        name: [printable(line) for line in getattr(status, name)]
        for name in ("waiting", "events", "advice")
    }
    return structs.replace(status, phase=printable(status.phase), **words)


def changes(previous: Status | None, status: Status) -> list[str]:
    """Plain lines for what is new since the previous status."""
    lines = list(status.events) if previous is None else new_events(previous.events, status.events)
    if previous is None or previous.phase != status.phase:
        lines.append(f"phase: {status.phase}")
    if status.step > (previous.step if previous is not None else 0):
        lines.append(step_line(status))
    return lines


def new_events(before: list[str], now: list[str]) -> list[str]:
    """Events appended since the last status, when `now` is the newest part of one growing list and
    so was `before`."""
    for start in range(len(before) + 1):
        shared = before[start:]
        if now[: len(shared)] == shared:
            return now[len(shared) :]
    return now


def step_line(status: Status) -> str:
    """`step 12/80 · plain 41 % · BCQ 33 % · … `: one trained step in one line."""
    counters, gauges = status.counters, status.gauges
    parts = [f"step {status.step}/{status.total_steps}"]
    parts += [
        f"{label} {panels.percent(gauges[f'accuracy_{kind}'])}"
        for kind, label in panels.accuracies(status)
        if f"accuracy_{kind}" in gauges
    ]
    parts.append(f"buffer {counters.get('buffer_size', 0)}/{counters.get('buffer_capacity', 0)}")
    parts.append(f"graduated {counters.get('graduated', 0)}")
    parts.append(f"staleness {gauges.get('staleness_mean', 0):.2f}")
    rate = sum(
        actor.stats.get("tokens_per_second", 0.0)
        for actor in status.actors
        if actor.role == "rollout"
    )
    parts.append(f"{panels.count(rate)} tok/s")
    if status.eta_seconds > 0:
        parts.append(f"{panels.duration(status.eta_seconds)} left")
    return " · ".join(parts)


def _panels_below(
    status: Status, history: History, width: int, room: int
) -> tuple[list[RenderableType], int]:
    """Learning and buffer panels, side by side where there is width for both, and how many lines
    they take."""
    if width < 72:
        learning = panels.learning(status, history, width)
        both = room >= 20
        return (
            ([learning, panels.buffer(status, width)], 12)
            if both
            else ([learning] if room >= 6 else [], 6)
        )
    if room < 8:
        return [], 0
    grid = Table.grid(expand=True)
    left = width // 2
    grid.add_column(width=left)
    grid.add_column(width=width - left)
    grid.add_row(panels.learning(status, history, left), panels.buffer(status, width - left))
    return [grid], 6


def _tail(status: Status, room: int) -> list[RenderableType]:
    """The pipeline line, advice, who waits for whom, and events, as far as the room goes."""
    if room <= 0:
        return []
    advice = min(len(status.advice), room - 1, ADVICE_ROWS)
    waiting = min(len(status.waiting), max(room - 2 - advice, 0), 3)
    candidates = (
        panels.pipeline(status),
        panels.advice(status, advice),
        panels.waiting(status, waiting),
        panels.events(status.events, room - 1 - advice - waiting),
    )
    return [part for part in candidates if part is not None]
