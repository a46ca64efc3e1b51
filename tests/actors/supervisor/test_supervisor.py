"""The supervisor with real processes, signals and sockets; the actors are stubs with a script."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil
import pytest
from living import command_of, is_living
from msgspec.structs import replace
from stub_actor import LINGER_SECONDS
from supervisor_helpers import STUB, Lines, stub_command

from zppo.config.cluster import TransportConfig
from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    RunConfig,
    SchedulerConfig,
    StudentConfig,
    Topology,
)
from zppo.plan.processes import ProcessEntry
from zppo.records import checkpoint, run_directory
from zppo.signals import Interrupts
from zppo_actors import runtime
from zppo_actors.supervisor import children, run_attempt, watchdog
from zppo_actors.supervisor import supervisor as supervisor_module
from zppo_actors.supervisor.fleet import Fleet
from zppo_actors.supervisor.gathering import LIMITS, Interrupted, wait_for_all
from zppo_actors.supervisor.run_attempt import End, backoff_seconds
from zppo_actors.supervisor.supervisor import supervise
from zppo_protocol import keys
from zppo_protocol.addresses import tcp_endpoint
from zppo_protocol.messages import RunEnded, Status
from zppo_protocol.sockets import Router

PATIENCE_SECONDS = 300.0
pytestmark = pytest.mark.slow


def make_run(
    path: Path, script: dict[str, list[str]], kind: Literal["ipc", "tcp"] = "ipc", **limits: int
) -> Path:
    actors = ActorsConfig(
        rollout=ActorConfig(count=2),
        max_restarts=limits.get("actor", 2),
        start_seconds=limits.get("start", 300),
    )
    topology = Topology(
        data=DataConfig(train="train.jsonl"),
        student=StudentConfig(model="student"),
        run=RunConfig(
            max_restarts=limits.get("run", 0), no_progress_seconds=limits.get("no_progress", 600)
        ),
        actors=actors,
        scheduler=SchedulerConfig(lease_seconds=limits.get("lease", 300)),
        transport=TransportConfig(kind=kind),
    )
    run_directory.create(path, topology)
    (path / "script.json").write_text(json.dumps(script))
    return path


def live(
    path: Path, script: dict[str, list[str]], **limits: int
) -> tuple[End, list[str], list[str]]:
    """Supervise a scripted run to its end; returns the end, what the controller heard, and what the
    view said."""
    view = Lines()
    end = supervise(make_run(path, script, **limits), view, Interrupts(), stub_command)
    return end, (path / "heard.txt").read_text().splitlines(), view.lines


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_run_that_finishes(tmp_path: Path) -> None:
    end, heard, _ = live(tmp_path / "run", {"controller": ["finish when rollout-1 0"]})
    assert end == End(verdict="finished", exit_code=0)
    assert "hello supervisor 0" in heard


def test_dead_rollout_actor_is_restarted_and_reported(tmp_path: Path) -> None:
    script = {"controller": ["finish when rollout-0 1"], "rollout-0": ["die", "live"]}
    end, heard, said = live(tmp_path / "run", script)
    assert end.exit_code == 0
    assert "exited rollout-0 0 True: rollout-0 ended with exit code 3" in heard
    assert "hello rollout-0 1" in heard
    assert said == ["restarting rollout-0 in 0.5 s"]


def test_budget_of_restarts_ends_the_run_with_the_log(tmp_path: Path) -> None:
    end, heard, _ = live(tmp_path / "run", {"rollout-1": ["die"]}, actor=1)
    assert (end.verdict, end.exit_code) == ("rollout-1 ended with exit code 3 after 1 restart", 1)
    # Whoever starts slowly may greet after the last word.
    assert [line for line in heard if not line.startswith("hello")][-2:] == [
        "exited rollout-1 1 False: rollout-1 ended with exit code 3 after 1 restart",
        "stop: rollout-1 ended with exit code 3 after 1 restart",
    ]
    assert end.log is not None
    assert "the stub dies as its script says" in end.log.read_text()


def test_user_error_of_an_actor_is_not_retried(tmp_path: Path) -> None:
    end, heard, _ = live(tmp_path / "run", {"rollout-0": ["refuse"]})
    assert end.verdict == "rollout-0: student.model: the stub does not like it"
    assert end.exit_code == 2
    assert "hello rollout-0 1" not in heard


def test_broken_promise_ends_the_run_in_its_first_life(tmp_path: Path) -> None:
    end, heard, said = live(tmp_path / "run", {"trainer": ["break"]}, run=3)
    assert end == End(verdict="trainer: step 3: the stub is stale", exit_code=1)
    assert not any("begins again" in line for line in said)
    assert "hello supervisor 1" not in heard


def test_an_actor_that_freezes_while_it_starts_is_started_again(tmp_path: Path) -> None:
    script = {"controller": ["finish when rollout-0 1"], "rollout-0": ["freeze", "live"]}
    end, heard, _ = live(tmp_path / "run", script, start=8)
    assert end.exit_code == 0
    assert (
        "exited rollout-0 0 True: rollout-0 was killed by SIGKILL because it neither computed nor "
        "read for 8 s while it started"
    ) in heard


def test_a_frozen_controller_ends_its_attempt_and_the_run_begins_again(tmp_path: Path) -> None:
    run, view = make_run(tmp_path / "run", {"controller": ["freeze"]}, lease=4, run=1), Lines()
    end = supervise(run, view, Interrupts(), stub_command)
    heard = (run / "heard.txt").read_text().splitlines()
    verdict = "controller was killed by SIGKILL because it said and did nothing for 4 s"
    assert (end.verdict, end.exit_code) == (verdict, 1)
    assert f"{verdict}; the run begins again from step 0" in view.lines
    assert view.restarts == [0, 1]
    assert heard.count("hello supervisor 1") == 1


def test_ctrl_c_ends_a_run_whose_controller_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "STOPPING_SECONDS", 3.0)
    path = make_run(tmp_path / "run", {"controller": ["freeze"]}, run=3)
    view = Interrupting("controller")
    end = supervise(path, view, view.interrupts, stub_command)
    assert "said and did nothing for 3 s" in end.verdict
    assert (end.exit_code, end.renewable) == (130, False)


class Interrupting(Lines):
    """Presses Ctrl-C when the controller is heard and knows as many actors as are named."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.interrupts, self._names = Interrupts(), set(names) - {"controller"}

    def update(self, status: Status) -> None:
        if self._names <= {actor.actor for actor in status.actors}:
            self.interrupts.count = 1


def test_an_interrupt_that_ends_the_trainer_as_well_is_one_all_the_same(
    tmp_path: Path, runtime_base: Path
) -> None:
    """As where all processes of all hosts are sent SIGTERM: agents leave, and with them ranks. The
    window that it was at work on is not to blame."""

    class Ending(Interrupting):
        def update(self, status: Status) -> None:
            before = self.interrupts.count
            super().update(status)
            if self.interrupts.count > before:
                [folder] = runtime_base.glob("zppo-*")
                runtime.mark_training(folder, 3)
                children = psutil.Process().children()
                [trainer] = [child for child in children if "trainer" in command_of(child)]
                trainer.kill()

    view = Ending("trainer")
    path = make_run(tmp_path / "run", {"controller": ["deaf"]}, run=3)
    end = supervise(path, view, view.interrupts, stub_command)
    assert (end.verdict, end.exit_code) == ("interrupted, and trainer was killed by SIGKILL", 130)
    assert run_directory.read(path).trainer_deaths == {}


def test_whoever_still_starts_when_the_run_ends_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not be told: the controller has left before it greets."""
    monkeypatch.setattr(run_attempt, "LEAVE_SECONDS", PATIENCE_SECONDS * 2)
    script = {"controller": ["hasty"], "rollout-0": ["freeze"], "rollout-1": ["linger"]}
    view = Interrupting("rollout-1", "trainer", "grader-0")
    began = time.monotonic()
    end = supervise(make_run(tmp_path / "run", script), view, view.interrupts, stub_command)
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert (end.verdict, end.exit_code) == ("interrupted after step 3", 130)


def test_a_controller_that_still_starts_is_not_waited_for(tmp_path: Path) -> None:
    interrupts = Interrupts()
    interrupts.count = 1
    path = make_run(tmp_path / "run", {"controller": ["slow"]}, run=3)
    end = supervise(path, Lines(), interrupts, stub_command)
    assert end == End(verdict="stopped while it started", exit_code=130)


def test_nothing_is_restarted_once_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Ctrl-C comes while the restart is due; the controller ends the attempt long after that."""
    monkeypatch.setattr(run_attempt, "backoff_seconds", lambda restarts: LINGER_SECONDS / 2)
    interrupts, started = Interrupts(), []

    class Impatient(Lines):
        def log(self, line: str) -> None:
            super().log(line)
            interrupts.count = 1 if line.startswith("restarting") else interrupts.count

    def command(entry: ProcessEntry) -> list[str]:
        started.append(entry.name)
        return stub_command(entry)

    path = make_run(tmp_path / "run", {"rollout-0": ["die", "live"], "rollout-1": ["linger"]})
    end = supervise(path, Impatient(), interrupts, command)
    assert end.exit_code == 130
    assert started.count("rollout-0") == 1


@contextlib.contextmanager
def held_by(script: str, run: Path, folder: Path) -> Iterator[Fleet]:
    """No further hosts, and a process that would hold them."""
    sockets = folder / "sockets"
    sockets.mkdir(mode=0o700)
    access, _ = keys.issue(f"ipc://{sockets / 'hosts.sock'}", {})
    with contextlib.closing(Router(access, LIMITS)) as router:
        fleet = Fleet(router, {}, {}, run, 20.0)
        fleet.keeper = children.spawn(
            [sys.executable, "-c", script],
            name="ray",
            role="ray",
            incarnation=0,
            log=run / "logs" / "ray.log",
            env={},
            inherited=(),
        )
        try:
            yield fleet
        finally:
            fleet.keeper.kill()


def test_a_run_whose_hosts_cannot_come_back_saves_and_ends(tmp_path: Path) -> None:
    """The process by which Ray holds the hosts gives one up while all else is well."""
    path, view = make_run(tmp_path / "run", {}, run=3), Lines()
    sentence = "cluster.launcher ray: n1 is given up after 5 seats"
    with held_by(f"print({sentence!r}); exit(1)", path, tmp_path) as fleet:
        end = supervise(path, view, Interrupts(), stub_command, fleet)
    assert (end.verdict, end.exit_code) == (sentence, 1)
    assert f"{sentence}; ending the run" in view.lines
    assert f"stop: {sentence}" in (path / "heard.txt").read_text().splitlines()


def test_an_interrupt_that_ends_who_holds_the_hosts_is_one_all_the_same(tmp_path: Path) -> None:
    path, view = make_run(tmp_path / "run", {}, run=3), Interrupting("controller")
    with held_by("import time; time.sleep(600)", path, tmp_path) as fleet:
        assert fleet.keeper is not None
        keeper, heard = fleet.keeper, view.update

        def update(status: Status) -> None:
            heard(status)
            keeper.kill()

        view.update = update  # type: ignore[method-assign]
        end = supervise(path, view, view.interrupts, stub_command, fleet)
        view.interrupts.count, hosts = 1, Fleet(None, {"n1": {}}, {}, path, 20.0)  # type: ignore[arg-type]
        hosts.keeper = keeper
        with pytest.raises(Interrupted):
            wait_for_all(hosts, 600.0, view, view.interrupts)
    assert (end.verdict, end.exit_code) == ("interrupted after step 3", 130)


def test_an_interrupt_counts_from_the_moment_it_comes(tmp_path: Path) -> None:
    """Here between the look at interrupts and the look at hosts, with the end of who holds them."""
    path, interrupts = make_run(tmp_path / "run", {}, run=3), Interrupts()
    with held_by("import time; time.sleep(600)", path, tmp_path) as fleet:
        assert fleet.keeper is not None
        keeper, turn = fleet.keeper, fleet.turn

        def late() -> list[str]:
            interrupts.count = 1
            keeper.kill()
            wait_for(lambda: keeper.ended)
            return turn()

        fleet.turn = late  # type: ignore[method-assign]
        end = supervise(path, Lines(), interrupts, stub_command, fleet)
    assert end.exit_code == 130


def test_nothing_is_restarted_after_the_last_word(tmp_path: Path) -> None:
    started: list[str] = []
    path = make_run(tmp_path / "run", {})
    last = run_attempt.RunAttempt(
        path,
        run_directory.read(path),
        0,
        Lines(),
        Interrupts(),
        lambda entry: started.append(entry.name) or [],
    )
    last._restarts_due["rollout-0"] = (0.0, 1)
    last._on_message(RunEnded(verdict="finished", exit_code=0))
    last._start_due()
    assert started == []


@pytest.mark.parametrize(
    "end", [End(verdict="trainer: no", exit_code=2), End(verdict="finished", exit_code=0)]
)
def test_view_closes_with_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: End
) -> None:
    verdicts: list[str] = []

    class Closing(Lines):
        def close(self, verdict: str = "") -> None:
            verdicts.append(verdict)

    path = make_run(tmp_path / "run", {})
    monkeypatch.setattr(supervisor_module, "_live_view", lambda run: Closing())
    monkeypatch.setattr(supervisor_module, "supervise", lambda *arguments, **fleet: end)
    assert supervisor_module.main(["--run", str(path)]) == end.exit_code
    assert verdicts == [end.verdict]
    assert capsys.readouterr().err == ("trainer: no\n" if end.exit_code else "")


def test_dead_trainer_begins_another_life_from_the_checkpoint(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {"trainer": ["die"]}, run=1)
    checkpoint.write_file(checkpoint.begin(path, 4) / "weights", b"1234")
    checkpoint.commit(path, 4)
    first, view = run_directory.read(path), Lines()
    end = supervise(path, view, Interrupts(), stub_command)
    second = run_directory.read(path)
    assert (end.verdict, end.exit_code) == ("trainer ended with exit code 3", 1)
    assert view.lines == ["trainer ended with exit code 3; the run begins again from step 4"]
    assert (path / "logs/trainer.log").read_text().count("the stub dies") == 2
    assert second.run_id != first.run_id
    assert second.start_step == 4


def test_dead_controller_ends_the_run(tmp_path: Path) -> None:
    end, _, _ = live(tmp_path / "run", {"controller": ["die"]})
    assert (end.verdict, end.exit_code) == ("controller ended with exit code 5", 1)


def test_verdict_of_a_controller_that_leaves_at_once_is_heard(tmp_path: Path) -> None:
    end, heard, _ = live(tmp_path / "run", {"controller": ["fail"]}, run=3)
    assert end == End(verdict="nothing moved for 3 s", exit_code=1)
    assert "hello supervisor 1" not in heard


def test_stuck_actor_is_restarted_on_request(tmp_path: Path) -> None:
    script = {"controller": ["restart rollout-0", "finish when rollout-0 1"]}
    end, heard, _ = live(tmp_path / "run", script)
    assert end.exit_code == 0
    verdict = "rollout-0 was killed by SIGKILL because it sampled nothing"
    assert f"exited rollout-0 0 True: {verdict}" in heard


def test_actor_that_leaves_unasked_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_attempt, "LEAVE_SECONDS", 0.2)
    script = {"controller": ["finish when rollout-0 1"], "rollout-0": ["leave", "live"]}
    end, heard, _ = live(tmp_path / "run", script)
    assert end.exit_code == 0
    assert "exited rollout-0 0 True: rollout-0 left without being told to" in heard


def test_log_says_of_nobody_that_it_was_not_told_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log is written before it is known who was."""
    caplog.set_level(logging.INFO, "zppo.supervisor")
    monkeypatch.setattr(run_attempt, "LEAVE_SECONDS", PATIENCE_SECONDS)
    end, _, _ = live(tmp_path / "run", {"controller": ["finish when rollout-0 0"]})
    assert end.exit_code == 0
    said = [record.getMessage() for record in caplog.records]
    assert "rollout-0 left (incarnation 0, exit code 0)" in said
    assert not any("without being told to" in line for line in said)


def is_gone(pid: int) -> bool:
    try:
        return not is_living(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def test_children_of_a_killed_actor_die_with_it(tmp_path: Path) -> None:
    script = {
        "controller": ["restart rollout-0", "finish when rollout-0 1"],
        "rollout-0": ["spawn"],
    }
    end, _, _ = live(tmp_path / "run", script)
    assert end.exit_code == 0
    pid = int((tmp_path / "run/spawned.txt").read_text())
    wait_for(lambda: is_gone(pid))


# ---- ports ---------------------------------------------------------------------------------------


def test_nobody_can_take_the_port_of_the_controller(tmp_path: Path, runtime_base: Path) -> None:
    """Somebody wants it at the worst moments: when it is chosen and the controller, of the first
    attempt and of the second, is about to be started; and between the two."""
    run, view = make_run(tmp_path / "run", {"controller": ["die"]}, run=1, kind="tcp"), Lines()
    wanted: list[tuple[str, int]] = []
    left: list[socket.socket] = []

    def taken_first(entry: ProcessEntry) -> list[str]:
        if entry.role == "controller":
            [file] = runtime_base.glob("zppo-*/keys/controller.key")
            wanted.append(tcp_endpoint(keys.read_access(file).address))
            assert_taken(wanted[0])
        here = entry.role in ("controller", "trainer")
        return stub_command(entry) if here else ["sh", "-c", "exec sleep 600", "sh"]

    def between(line: str) -> None:
        assert_taken(wanted[0])
        left.append(socket.create_connection(wanted[0]))
        Lines.log(view, line)

    view.log = between  # type: ignore[method-assign]
    end = supervise(run, view, Interrupts(), taken_first)
    assert end.verdict == "controller ended with exit code 5"
    assert view.lines == [f"{end.verdict}; the run begins again from step 0"]
    assert wanted == 2 * [wanted[0]]
    heard = (run / "heard.txt").read_text().splitlines()
    assert heard.count("hello trainer 0") == 2
    assert "hello supervisor 0" in heard and "hello supervisor 1" in heard
    assert left[0].recv(1) == b"", "it is for no controller of another attempt"
    left[0].close()
    socket.create_server(wanted[0]).close()  # it is let go in the end


def assert_taken(address: tuple[str, int]) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(address)


# ---- signals: the supervisor as a process of its own ---------------------------------------------

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from supervisor_helpers import Lines, stub_command
from zppo.signals import Interrupts
from zppo_actors import own_time
from zppo_actors.supervisor.supervisor import supervise
own_time.MOST_SECONDS = 0.5
class Seen(Lines):
    def update(self, status):
        Path(sys.argv[1], "seen").touch()
interrupts, view = Interrupts(), Seen()
with interrupts.listening():
    end = supervise(Path(sys.argv[1]), view, interrupts, stub_command)
print(end.verdict)
sys.exit(end.exit_code)
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    def start(script: dict[str, list[str]], **limits: int) -> tuple[subprocess.Popen[str], Path]:
        path = make_run(tmp_path / "run", script, **limits)
        command = [sys.executable, "-P", "-c", DRIVER, str(path), str(STUB.parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        heard = path / "heard.txt"
        names = ("trainer 0", "rollout-0 0", "rollout-1 0", "grader-0 0")
        wait_for(
            lambda: heard.exists() and all(f"hello {name}" in heard.read_text() for name in names)
        )
        wait_for((path / "seen").exists)
        return process, path

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_ends_in_order(supervisor: Callable, number: signal.Signals) -> None:
    process, path = supervisor({})
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert output == "interrupted after step 3\n"
    assert "stop: interrupted" in (path / "heard.txt").read_text()


def test_a_supervisor_that_was_stopped_for_long_goes_on(supervisor: Callable) -> None:
    """Ctrl-Z and fg, or a job that was suspended: that it has heard nobody is nobody's fault."""
    process, path = supervisor({}, no_progress=3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    (path / "seen").unlink()
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: process.poll() is not None or (path / "seen").exists())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (130, "interrupted after step 3\n")


def test_two_interrupts_end_at_once(supervisor: Callable) -> None:
    process, path = supervisor({"controller": ["deaf"]})
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stop: interrupted" in (path / "heard.txt").read_text())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (130, "stopped at once\n")


def test_sigkill_of_the_supervisor_leaves_nothing(supervisor: Callable, runtime_base: Path) -> None:
    process, _ = supervisor({"rollout-0": ["spawn"]})
    family = psutil.Process(process.pid).children()
    assert len(family) == 5
    folders = list(runtime_base.glob(f"zppo-{os.getuid()}-*"))
    assert len(folders) == 1
    for grandchild in psutil.Process(process.pid).children(recursive=True):
        if grandchild not in family:
            grandchild.kill()  # a stub's own child has no tie; a real one ends with its stdin
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    wait_for(lambda: not folders[0].exists())


# ---- small parts ---------------------------------------------------------------------------------


def test_backoff_doubles_up_to_ten_seconds() -> None:
    assert [backoff_seconds(n) for n in (0, 1, 2, 10)] == [0.5, 1.0, 2.0, 10.0]


def test_sweep_removes_only_what_nobody_holds(tmp_path: Path) -> None:
    held, lock = runtime.create("aaaa", tmp_path)
    dead, dead_lock = runtime.create("bbbb", tmp_path)
    os.close(dead_lock)
    (tmp_path / f"zppo-{os.getuid()}-file").write_text("not a folder")
    assert runtime.sweep(tmp_path) == [dead]
    assert held.exists()
    os.close(lock)


def test_runtime_folder_is_private(tmp_path: Path) -> None:
    folder, lock = runtime.create("aaaa", tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    os.close(lock)


def test_a_run_is_held_once(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {})
    first = run_directory.hold(path)
    assert first is not None
    assert run_directory.hold(path) is None
    os.close(first)
    again = run_directory.hold(path)
    assert again is not None
    os.close(again)


def test_renewed_run_has_another_id(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {})
    before = run_directory.read(path)
    after = run_directory.renew(path, 7)
    assert after.run_id != before.run_id
    assert replace(after, run_id=before.run_id, start_step=0) == before
