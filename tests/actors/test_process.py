"""The shared beginning of every actor: context, ties, signals, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zppo.config.topology import DataConfig, StudentConfig, Topology
from zppo.errors import UserError
from zppo.records import run_directory
from zppo_actors import runtime
from zppo_actors.process import ActorContext, guarded

pytestmark = pytest.mark.slow
TIMEOUT_SECONDS = 600

TIED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from zppo_actors import process
process.tie_to_supervisor(int(sys.argv[1]), Path(sys.argv[2]), kernel_too=False)
process.set_signals()
print("ready", flush=True)
if not sys.stdin.readline():
    time.sleep(600)
executed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
forked = os.fork()
if not forked:
    time.sleep(600)
for child in executed, forked:
    os.kill(child, signal.SIGTERM)
    print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(600)
"""


def make_context(tmp_path: Path, actor: str) -> ActorContext:
    topology = Topology(
        data=DataConfig(train="train.jsonl"), student=StudentConfig(model="student")
    )
    return ActorContext(
        tmp_path, tmp_path / "rt", actor, actor.partition("-")[0], 0, topology, "ab", 0
    )


def start_tied(tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    read_end, write_end = os.pipe()
    (tmp_path / "rt").mkdir()
    command = [sys.executable, "-P", "-c", TIED, str(read_end), str(tmp_path / "rt")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(read_end,)
    )
    os.close(read_end)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process, write_end


def test_the_log_is_safe_to_show() -> None:
    script = "import logging; from zppo_actors.process import start_log; start_log(); " + (
        r"logging.warning('a request failed: %s', '\x1b]0;mine\x07'); logging.info('one\ntwo')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert r"WARNING root: a request failed: \x1b]0;mine\x07" in done.stderr
    assert done.stderr.endswith("INFO root: one\ntwo\n")


def test_context_knows_its_number_and_its_key(tmp_path: Path) -> None:
    context = make_context(tmp_path, "rollout-3")
    assert context.index == 3
    (tmp_path / "rt").mkdir(mode=0o700)
    access = runtime.issue_keys(tmp_path / "rt", {"rollout-3": "rollout"})
    assert access.address == f"ipc://{tmp_path}/rt/controller.sock"
    assert access.names[context.credentials.secret.public] == "rollout-3"
    assert make_context(tmp_path, "trainer").index == 0


def test_end_of_the_parent_pipe_ends_the_process_and_its_folder(tmp_path: Path) -> None:
    process, write_end = start_tied(tmp_path)
    os.close(write_end)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert not (tmp_path / "rt").exists()


def test_what_all_processes_of_a_run_are_sent_ends_no_actor_but_what_it_has_started(
    tmp_path: Path,
) -> None:
    process, write_end = start_tied(tmp_path)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == ["15\n", "15\n"]
    os.close(write_end)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1


def test_user_error_is_one_sentence_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise UserError("student.model: no such folder")

    assert guarded(body) == 2
    assert capsys.readouterr().err == "student.model: no such folder\n"


def test_other_errors_exit_1(caplog: pytest.LogCaptureFixture) -> None:
    assert guarded(lambda: 1 // 0) == 1
    assert "ZeroDivisionError" in caplog.text


def test_actor_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    options = ["--run", str(tmp_path), "--runtime", str(tmp_path / "rt"), "--actor", "grader-0"]
    command = [sys.executable, "-P", "-m", "zppo_actors", "grader", *options]
    command += ["--incarnation", "0", "--parent-fd", str(read_end)]
    done = subprocess.run(
        command, capture_output=True, text=True, pass_fds=(read_end,), timeout=TIMEOUT_SECONDS
    )
    os.close(read_end)
    os.close(write_end)
    assert done.returncode == 2
    assert done.stderr == f"'{tmp_path}' is not a run directory: it has no run.json\n"


def test_run_record_survives_and_damage_is_named(tmp_path: Path) -> None:
    topology = Topology(
        data=DataConfig(train="train.jsonl"), student=StudentConfig(model="student")
    )
    record = run_directory.create(tmp_path / "run", topology)
    assert run_directory.read(tmp_path / "run") == record
    (tmp_path / "run/run.json").write_text('{"run_id": 3}')
    with pytest.raises(
        UserError, match=r"is not the record of a run: Expected `str`, got `int` - at `\$.run_id`"
    ):
        run_directory.read(tmp_path / "run")


INTERRUPTED = """\
import os, signal, sys
from zppo_actors.__main__ import main

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "zppo_actors.suites":
            os.kill(os.getpid(), int(sys.argv.pop()))

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.exit(main(["suite", "{}"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_modules_are_imported_is_one_line(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number))],
        capture_output=True,
        text=True,
        # Under nohup the hang-up would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
