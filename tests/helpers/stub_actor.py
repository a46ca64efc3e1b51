"""A small actor for the supervisor's tests: the real ties, signals and sockets of a process,
scripted behaviour.

`RUN_DIR/script.json` says what each incarnation of an actor does: "live" (until told to leave),
"die" (exit 3), "leave" (exit 0), "refuse" (a user error), "break" (a broken promise), "spawn"
(live, with a child of its own, whose process id stands in `RUN_DIR/spawned.txt`), "linger" (as
"live", but it leaves late), "freeze" (stops itself before it greets). The controller writes what it
hears to `RUN_DIR/heard.txt`, a line each, and obeys its words: "finish when NAME N" ends the run
when that incarnation has said hello and the end of the one before was heard of, "restart NAME" asks
for a restart of its first incarnation, "deaf" ignores stop requests, "fail" ends the run with exit
code 1 as soon as the supervisor is there, "freeze" sends one status and stops itself, "slow" does
not get so far, "hasty" waits for nobody when it is to stop. Otherwise it ends only after all peers
were heard: a router cannot reach those that are not connected yet.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from msgspec import structs

from zppo.errors import EXIT_FATAL, UserError
from zppo.plan.processes import processes
from zppo.records.run_directory import read
from zppo_actors import process, runtime
from zppo_protocol.messages import (
    ActorExited,
    ActorStatus,
    Hello,
    RestartActor,
    RunEnded,
    Shutdown,
    Status,
    StopRequested,
)
from zppo_protocol.sockets import Dealer, Router

LINGER_SECONDS = 2.0

STATUS = Status(
    phase="training",
    step=0,
    total_steps=1,
    eta_seconds=0.0,
    actors=[],
    counters={},
    gauges={},
    waiting=[],
    events=[],
)


def main(argv: list[str]) -> int:
    arguments = process._parser().parse_args(argv)
    folder, run_dir = Path(arguments.runtime), Path(arguments.run)
    process.tie_to_supervisor(
        arguments.parent_fd, folder, kernel_too=arguments.role != "controller"
    )
    process.set_signals()
    script = json.loads((run_dir / "script.json").read_text())
    words = script.get(arguments.actor, ["live"])
    word = words[min(arguments.incarnation, len(words) - 1)]
    if arguments.role == "controller":
        if "slow" in words:
            time.sleep(600.0)
        return Controller(folder, run_dir, words, arguments.ear).run()
    return process.guarded(lambda: act(word, arguments, folder))


def act(word: str, arguments: object, folder: Path) -> int:
    if word == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "spawn":  # before it greets: who has heard it finds the child
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        Path(arguments.run, "spawned.txt").write_text(str(child.pid))
    dealer = Dealer(runtime.credentials(folder, arguments.actor))
    dealer.send(hello(arguments))
    try:
        if word == "die":
            print("the stub dies as its script says", flush=True)
            return 3
        if word == "leave":
            return 0
        if word == "refuse":
            raise UserError("student.model: the stub does not like it")
        if word == "break":
            print("step 3: the stub is stale", file=sys.stderr, flush=True)
            return EXIT_FATAL
        while not isinstance(dealer.receive(60.0), Shutdown):
            pass
        if word == "linger":
            time.sleep(LINGER_SECONDS)
        return 0
    finally:
        dealer.close()


def hello(arguments: object) -> Hello:
    return Hello(
        protocol_version=1,
        run_id="stub",
        actor=arguments.actor,
        role=arguments.role,
        incarnation=arguments.incarnation,
        pid=1,
        capacity=1,
    )


class Controller:
    def __init__(self, folder: Path, run_dir: Path, words: list[str], ear: int | None) -> None:
        self.router = Router(runtime.access(folder), ear=ear)
        self.run_dir, self.words = run_dir, words
        self.peers: set[str] = set()
        self.greeted: dict[str, int] = {}
        self.exited: set[tuple[str, int]] = set()
        plans = processes(read(run_dir).topology, available_cores=1)
        self.expected = {"supervisor", *(plan.name for plan in plans if plan.role != "controller")}

    def run(self) -> int:
        end: RunEnded | None = None
        while True:
            received = self.router.receive(0.5)
            if "supervisor" in self.peers:
                self.router.send("supervisor", self.status())
            if received is None:
                continue
            peer, message = received
            self.peers.add(peer)
            end = self.heed(peer, message) or end
            if end is not None and end.exit_code == 1:
                self.router.send("supervisor", end)
                self.router.close()
                return 1
            if end is not None and "hasty" in self.words:
                self.finish(end)
                return end.exit_code
            if self.peers == self.expected:
                self.ask_for_restarts()
                if end is not None:
                    self.finish(end)
                    return 0

    def status(self) -> Status:
        """Who has greeted, as the real controller says twice a second."""
        greeted = [
            ActorStatus(
                actor=actor,
                role="rollout",
                state="working",
                incarnation=incarnation,
                credits=0,
                leases=0,
                policy_version=0,
                stats={},
            )
            for actor, incarnation in self.greeted.items()
        ]
        return structs.replace(STATUS, actors=greeted)

    def heed(self, peer: str, message: object) -> RunEnded | None:
        match message:
            case Hello(actor=actor, incarnation=incarnation):
                self.note(f"hello {actor} {incarnation}")
                self.greeted[actor] = incarnation
                if "die" in self.words and self.greeted.keys() >= {"supervisor", "trainer"}:
                    sys.exit(5)
                if "freeze" in self.words and actor == "supervisor":
                    self.router.send("supervisor", self.status())
                    time.sleep(1.0)  # let it leave
                    os.kill(os.getpid(), signal.SIGSTOP)
                if "fail" in self.words and actor == "supervisor":
                    return RunEnded(verdict="nothing moved for 3 s", exit_code=1)
                return self.finished(actor)
            case ActorExited(
                actor=actor, incarnation=incarnation, verdict=verdict, restarting=restarting
            ):
                self.note(f"exited {actor} {incarnation} {restarting}: {verdict}")
                self.exited.add((actor, incarnation))
                return self.finished(actor)
            case StopRequested(reason=reason):
                self.note(f"stop: {reason}")
                if "deaf" not in self.words:
                    return RunEnded(verdict="interrupted after step 3", exit_code=130)
        return None

    def finished(self, actor: str) -> RunEnded | None:
        """The end that is due to an actor. That it was started anew and that it had ended are heard
        on two lines, in any order."""
        now = self.greeted.get(actor)
        if now is None or f"finish when {actor} {now}" not in self.words:
            return None
        known = now == 0 or (actor, now - 1) in self.exited
        return RunEnded(verdict="finished", exit_code=0) if known else None

    def ask_for_restarts(self) -> None:
        for word in [word for word in self.words if word.startswith("restart ")]:
            self.words.remove(word)
            actor = word.removeprefix("restart ")
            self.router.send(
                "supervisor", RestartActor(actor=actor, incarnation=0, reason="it sampled nothing")
            )

    def finish(self, end: RunEnded) -> None:
        for peer in self.peers - {"supervisor"}:
            self.router.send(peer, Shutdown(reason="the run has ended"))
        self.router.send("supervisor", self.status())
        self.router.send("supervisor", end)
        self.router.close()

    def note(self, line: str) -> None:
        with (self.run_dir / "heard.txt").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
