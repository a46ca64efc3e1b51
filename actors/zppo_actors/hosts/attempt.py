"""What a further host holds of one attempt at a run: a runtime folder with the run's record and the
keys of its actors in it, and the processes that are wanted.

Invariant: when `close` returns none of them is left, and neither is the folder. They end as well
when this process ends in any other way: they hold the reading end of its pipe, as actors do of the
supervisor's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping

from zppo.errors import UserError
from zppo_actors import runtime
from zppo_actors.hosts.tails import Tails
from zppo_actors.supervisor import children
from zppo_actors.supervisor.children import Child
from zppo_actors.supervisor.vitals import Children, children_by_parent
from zppo_protocol.errors import AccessError
from zppo_protocol.messages import HostOrders, HostReport
from zppo_protocol.values import ActorOrder, ActorReport

RUN = "run"
"""The folder that plays the run directory here."""

LONGEST_NAME = 32
"""Characters of the host's name that are in that of the runtime folder."""
LAST_REPORTS = 32
"""So many at the most carry what is left of the logs when an attempt ends."""

log = logging.getLogger("zppo.host")


class HostAttempt:
    """One attempt, from the first orders that name it until others do. Raises UserError if the
    runtime folder cannot be made or written."""

    def __init__(self, host: str, orders: HostOrders) -> None:
        self.run_id = orders.attempt
        # The host's name is part of it: agents of several hosts may share a file system.
        self.folder, self._lock = runtime.create(f"{orders.attempt}-{host[:LONGEST_NAME]}")
        self._run_dir = self.folder / RUN
        self._tails = Tails(self._run_dir)
        self._parent_fd, self._pipe = os.pipe()
        self._children: dict[str, Child] = {}
        self._told: set[tuple[str, int]] = set()
        try:
            (self._run_dir / "logs").mkdir(parents=True)
            (self._run_dir / "run.json").write_bytes(orders.record)
            runtime.write_keys(self.folder, orders.secrets)
        except (OSError, AccessError) as error:
            self.close()
            # Not an AccessError: to the agent that is a line which does not let it in.
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"the runtime folder {str(self.folder)!r} cannot be written ({why}); "
                "expected room there, or ZPPO_RUNTIME_DIR on that host with a larger folder"
            ) from None
        except BaseException:
            self.close()
            raise

    def obey(self, orders: HostOrders) -> None:
        """End what is not wanted, and start what is wanted and was not started."""
        wanted = {(order.name, order.incarnation): order for order in orders.actors}
        for name, child in list(self._children.items()):
            if child.key not in wanted:
                child.kill()
                del self._children[name]
        for key, order in wanted.items():
            if order.name not in self._children:
                self._start(order)
            assert self._children[order.name].key == key

    def report(self, received: Mapping[str, tuple[int, int]], *, files: bool) -> HostReport:
        """All that is to be known; with the news of `files`, where that is asked for. They are read
        after the exit codes, so that they hold the last words of those who have ended."""
        table = children_by_parent()
        actors = [_report_of(child, table) for child in self._children.values()]
        for child in self._children.values():
            if child.ended and child.key not in self._told:
                self._told.add(child.key)
                child.kill()  # what the process itself had spawned
        parts = self._tails.parts(received) if files else []
        return HostReport(attempt=self.run_id, actors=actors, parts=parts)

    @property
    def has_news(self) -> bool:
        """Whether a process has ended that no report has told of."""
        return any(child.ended and child.key not in self._told for child in self._children.values())

    def last_reports(self, received: Mapping[str, tuple[int, int]]) -> Iterator[HostReport]:
        """End all processes; then what is left of the files."""
        for child in self._children.values():
            child.kill()
        ahead = dict(received)
        for _ in range(LAST_REPORTS):
            report = self.report(ahead, files=True)
            if not report.parts:
                return
            yield report
            ahead |= {p.path: (p.number, p.start + len(p.data)) for p in report.parts}

    def close(self) -> None:
        """End everything and take the folder away."""
        for child in self._children.values():
            child.kill()
        self._children.clear()
        self._tails.close()
        runtime.remove(self.folder)
        # The lock after the folder, so that no sweep meets it half removed.
        for descriptor in (self._parent_fd, self._pipe, self._lock):
            os.close(descriptor)

    def _start(self, order: ActorOrder) -> None:
        options = {
            "--run": self._run_dir,
            "--runtime": self.folder,
            "--actor": order.name,
            "--incarnation": order.incarnation,
            "--parent-fd": self._parent_fd,
        }
        command = [sys.executable, "-P", "-m", "zppo_actors", order.role]
        command += [str(part) for option in options.items() for part in option]
        child = children.spawn(
            command,
            name=order.name,
            role=order.role,
            incarnation=order.incarnation,
            log=self._run_dir / "logs" / f"{order.name}.log",
            env=order.env,
            inherited=(self._parent_fd,),
        )
        self._children[order.name] = child
        if child.process.reason:
            log.warning("%s, incarnation %d: %s", *child.key, child.process.reason)
            return
        log.info("started %s, incarnation %d, process %d", *child.key, child.process.pid)


def _report_of(child: Child, table: Children) -> ActorReport:
    seconds, moved = child.process.used(table)
    return ActorReport(
        name=child.name,
        incarnation=child.incarnation,
        pid=child.process.pid,
        exit_code=child.process.poll(),
        seconds=seconds,
        moved=moved,
    )
