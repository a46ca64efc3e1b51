"""The door of a comparison: what is refused before anything starts, what is run, and what is
said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from compare_worlds import MadeUpRun, record, write_comparison

from zppo import cli, compare
from zppo.comparison import record as records
from zppo.comparison import runs
from zppo.comparison.record import Pair
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.records import run_directory

Compare = Callable[..., tuple[int, str]]
TESTS = Path(__file__).parents[1] / "helpers"
METHODS = ("--topology", "topology.yaml", "--methods", "grpo,zppo", "--seeds", "0")


@pytest.fixture
def door(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Compare:
    """Call the door where no run may start; returns the exit code and what it said on stderr."""

    def refuse(*_: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(compare.Session, "run", refuse)

    def call(*arguments: str) -> tuple[int, str]:
        return compare.main(arguments), capsys.readouterr().err.replace(f"{small}/", "")

    return call


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    (
        (),
        "--topology is missing; expected a topology file (write one with: zppo init topology.yaml)",
    ),
    (
        ("--topology", "topology.yaml", "--seeds", "0"),
        (
            "--methods is missing; expected, for example, --methods grpo,grpo_replay,zppo --seeds "
            "0,1,2"
        ),
    ),
    (
        ("--topology", "topology.yaml", "--methods", "grpo"),
        "--seeds is missing; expected, for example, --methods grpo,grpo_replay,zppo --seeds 0,1,2",
    ),
    (
        (*METHODS, "--methods", "grpo,zpo"),
        "--methods: there is no method 'zpo' (did you mean 'zppo'?)",
    ),
    ((*METHODS, "--methods", "grpo,zppo,grpo"), "--methods names grpo twice; expected each once"),
    ((*METHODS, "--seeds", "0-2,1"), "--seeds names 1 twice; expected each once"),
    (
        (*METHODS, "--baseline", "zpo"),
        "--baseline is 'zpo'; expected a method of the comparison (did you mean 'zppo'?)",
    ),
    (
        (*METHODS, "--set", "run.seed=3"),
        "--set run.seed=3: this setting differs between the runs and is given by --seeds",
    ),
    (
        (*METHODS, "--set", "method.name=hint"),
        "--set method.name=hint: this setting differs between the runs and is given by --methods",
    ),
    (
        (*METHODS, "--out", "topology.yaml"),
        "--out 'topology.yaml': is a file; expected a folder, or a new name",
    ),
    (
        (*METHODS, "--out", "student"),
        "--out 'student': holds files but no comparison; expected one, or a new name",
    ),
    (("--report-only",), "--out is missing; expected the folder of a comparison"),
    (
        ("--report-only", "--out", "student"),
        "--out 'student': holds no comparison (it has no comparison.json)",
    ),
    (
        (*METHODS, "--metric-budget", "time"),
        "zppo compare: argument --metric-budget: invalid choice: 'time'",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES[:-1])
def test_a_mistake_is_one_sentence(
    door: Compare, arguments: tuple[str, ...], sentence: str
) -> None:
    assert door(*arguments) == (2, sentence + "\n")


@pytest.mark.parametrize(
    ("arguments", "begin"),
    [MISTAKES[-1], (("--topologie", "x"), "zppo compare: there is no option --topologie")],
)
def test_a_mistake_on_the_command_line(
    door: Compare, arguments: tuple[str, ...], begin: str
) -> None:
    code, said = door(*arguments)
    assert (
        code == 2
        and said.startswith(begin)
        and said.endswith("see zppo compare --help\n")
        and said.count("\n") == 1
    )


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_no_method_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(UserError, match=r"^--methods names none; expected some of grpo, .*zppo"):
        records.parse_methods(text)


@pytest.mark.parametrize("text", ["", "a", "0,", "1.5", "-1", "3-1", "0-5000", "0 1"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(UserError) as caught:
        records.parse_seeds(text)
    assert str(caught.value) == (
        f"--seeds is {text!r}; expected whole numbers with commas between, such as 0,1,2 or 0-7, "
        "at most 1000 of them"
    )


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0,1,2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), ("7, 1-2", [7, 1, 2]), ("5-5", [5])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert records.parse_seeds(text) == seeds


def test_every_method_passes_the_checks_of_a_launch(door: Compare, small: Path) -> None:
    """The last method needs a teacher; nothing is written before that is known."""
    code, said = door(*METHODS, "--set", "teacher=null")
    assert (code, said) == (
        2, "teacher: is missing; expected a section, because the method 'zppo' needs a teacher\n"
    )  # fmt: skip
    assert not (small / "runs").exists()
    code, said = door(*METHODS, "--set", "method.group_size=1")
    assert code == 2 and said.startswith("method.group_size is 1;")


def test_a_folder_of_another_comparison_is_refused(door: Compare, small: Path) -> None:
    started = record(["grpo"], [0])
    started.topology = records.shared_topology(Path("topology.yaml"), ["run.steps=3"])
    (small / "c").mkdir()
    records.write_record(small / "c", started)
    assert door(*METHODS, "--out", "c") == (
        2,
        "--out 'c': holds another comparison, whose run.steps is 3 and not 4; name another folder, "
        "or give the old setting\n",
    )
    assert door(*METHODS, "--out", "c", "--set", "run.steps=3") == (
        2,
        "--out 'c': holds a comparison on other questions; data.train has changed since\n",
    )


def test_a_run_that_has_not_ended_is_not_touched(door: Compare, small: Path) -> None:
    directory = records.run_folder(small / "c", Pair("zppo", 0))
    directory.mkdir(parents=True)
    records.write_record(small / "c", first_record(small))
    lock = run_directory.hold(directory)
    assert lock is not None
    sentence = "--out 'c': the run 'zppo-seed0' in it has not ended; wait for it\n"
    assert door(*METHODS, "--out", "c") == (2, sentence)
    os.close(lock)


def first_record(small: Path) -> records.Record:
    """The record that a first call writes."""
    arguments = compare._parser().parse_args([*METHODS, "--out", str(small / "c")])
    return compare._order(arguments)


# ---- the record ----------------------------------------------------------------------------------


def test_the_record_survives_the_disk(tmp_path: Path) -> None:
    comparison = record(["grpo", "zppo"], [3, 1], failures={"grpo-seed1": "no"})
    records.write_record(tmp_path, comparison)
    assert records.read_record(tmp_path) == comparison


def test_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / records.RECORD).write_text('{"source": 3}')
    with pytest.raises(UserError, match="is not the record of a comparison: "):
        records.read_record(tmp_path)


def test_methods_and_seeds_may_be_added(tmp_path: Path) -> None:
    old = record(["grpo", "zppo"], [0, 1], failures={"grpo-seed1": "no"}, budget="compute")
    new = record(["hint", "grpo"], [1, 2])
    merged = records.merge(old, new, tmp_path)
    assert (merged.methods, merged.seeds) == (["grpo", "zppo", "hint"], [0, 1, 2])
    assert (merged.baseline, merged.budget, merged.failures) == (
        "grpo",
        "compute",
        {"grpo-seed1": "no"},
    )


def test_runs_go_seed_by_seed() -> None:
    names = [pair.name for pair in record(["zppo", "grpo"], [1, 0]).pairs()]
    assert names == ["zppo-seed1", "grpo-seed1", "zppo-seed0", "grpo-seed0"]


def test_only_method_seed_and_place_differ_between_runs(small: Path) -> None:
    shared = records.shared_topology(Path("topology.yaml"), [])
    one, other = (
        records.of_pair(shared, pair, small) for pair in (Pair("grpo", 0), Pair("zppo", 7))
    )
    changed = set()
    before, after = flat(one), flat(other)
    for setting in before:
        if before[setting] != after[setting]:
            changed.add(setting)
    assert changed == set(records.OWN_SETTINGS)
    assert records.neutral(one) == records.neutral(other) == shared


def flat(topology: Topology) -> dict[str, object]:
    from zppo.report.frame import flatten

    return dict(flatten(msgspec.to_builtins(topology)))


def test_the_settings_of_a_run_are_what_its_topology_says(small: Path) -> None:
    """The command line of a child gives the very topology that was checked."""
    from zppo.config.load import load

    out, pair = small / 'a "b": c', Pair("zppo", 7)
    loaded = load(Path("topology.yaml"), pair.settings(out))
    assert loaded == records.of_pair(records.shared_topology(Path("topology.yaml"), []), pair, out)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ("a.b", 1, 2)),
        ({"a": 1}, {"a": 1, "c": 3}, ("c", None, 3)),
        ({"a": {"b": 1}}, {"a": None}, ("a", {"b": 1}, None)),
        ({"a": [1]}, {"a": [2]}, ("a", [1], [2])),
    ],
)
def test_the_first_difference(old: object, new: object, found: object) -> None:
    assert records.first_difference(old, new) == found


# ---- runs ----------------------------------------------------------------------------------------


def test_states_of_a_run(tmp_path: Path) -> None:
    def state(seed: int) -> tuple[str, int]:
        progress = runs.progress_of(records.run_folder(tmp_path, Pair("grpo", seed)))
        return progress.state, progress.steps

    assert state(0) == ("absent", 0)
    records.run_folder(tmp_path, Pair("grpo", 0)).mkdir(parents=True)
    assert state(0) == ("stranded", 0)
    MadeUpRun(tmp_path, Pair("grpo", 1)).write(steps=4)
    assert state(1) == ("stranded", 4)
    MadeUpRun(tmp_path, Pair("grpo", 2)).write(steps=4).checkpoint(4)
    assert state(2) == ("unfinished", 4)
    MadeUpRun(tmp_path, Pair("grpo", 3)).write()
    assert state(3) == ("finished", 10)


def test_a_run_whose_last_word_was_lost_is_finished_all_the_same(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, Pair("grpo", 0)).write(verdict="trainer was killed")
    assert runs.progress_of(run.directory).state == "finished"
    lines = (run.directory / "heldout.jsonl").read_bytes().splitlines(keepends=True)
    (run.directory / "heldout.jsonl").write_bytes(b"".join(lines[:-1]))
    assert runs.progress_of(run.directory).state == "stranded"


def test_a_run_is_begun_or_continued(tmp_path: Path) -> None:
    pair, directory = Pair("zppo", 2), tmp_path / "runs/zppo-seed2"
    begun = runs.command(pair, "absent", Path("t.yaml"), ["run.steps=5"], tmp_path)
    assert begun[1:6] == ["-P", "-m", "zppo.launch", "--topology", "t.yaml"]
    assert begun[6:10] == ["--set", "run.steps=5", "--set", "method.name=zppo"]
    assert f'run.directory="{directory}"' in begun
    assert runs.command(pair, "stranded", Path("t.yaml"), ["run.steps=5"], tmp_path) == begun
    continued = runs.command(pair, "unfinished", Path("t.yaml"), ["run.steps=5"], tmp_path)
    assert continued[4:] == ["--resume", str(directory)]


def test_what_cannot_be_continued_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/note").write_text(str(number))
        assert runs.set_aside(tmp_path / "run") == tmp_path / f"run.abandoned-{number}"
    assert (tmp_path / "run.abandoned-1/note").read_text() == "1"


def test_time_left_is_that_of_the_same_method() -> None:
    clock = runs.Clock(total=6)
    assert clock.left([Pair("grpo", 0)]) is None
    clock.seconds = {Pair("grpo", 0): 10.0, Pair("grpo", 1): 20.0, Pair("zppo", 0): 60.0}
    assert clock.left([Pair("grpo", 2), Pair("zppo", 1)]) == 15.0 + 60.0
    assert clock.left([Pair("hint", 0)]) == 30.0
    line = runs.begin_line(3, clock, Pair("zppo", 1), "unfinished", [Pair("zppo", 1)])
    assert line == "[3/6] zppo seed 1: goes on from its last checkpoint (about 1 min 0 s left)"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("", "it ended with exit code 1 and said nothing"),
        (
            (
                "step 1\nthe trainer died\nthe last lines of x.log:\n  Traceback\ncontinue: python "
                "-m x\n"
            ),
            "the trainer died",
        ),
    ],
)
def test_why_a_run_failed(tmp_path: Path, output: str, why: str) -> None:
    assert runs.reason(tmp_path / "none", output, 1) == why


def test_the_verdict_of_a_run_explains_its_failure(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, Pair("grpo", 0)).write(steps=2, verdict="nothing moved for 600 s")
    assert runs.reason(run.directory, "noise\n", 1) == "nothing moved for 600 s"
    assert runs.reason(run.directory, "noise\n", 2) == "noise"


# ---- a session with children ---------------------------------------------------------------------

CHILD = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from compare_worlds import MadeUpRun
from zppo.comparison.record import Pair
pair = Pair({method!r}, {seed})
if {behaviour!r} == "fails":
    raise SystemExit("the disk is full")
if {behaviour!r} == "waits":
    def stop(*_):
        MadeUpRun(Path({out!r}), pair).write(steps=4).checkpoint(4)
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    Path({out!r}, "waiting").touch()
    time.sleep(600)
if {behaviour!r} == "waits for two":
    told = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    Path({out!r}, "waiting").touch()
    while len(told) < 2:
        time.sleep(0.6)
    sys.exit(130)
MadeUpRun(Path({out!r}), pair).write()
"""


@pytest.fixture
def behave(small: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Children that only make up a run. The dict says how some of them behave."""

    def set_behaviour(behaviours: dict[str, str]) -> None:
        def command(
            pair: Pair, state: str, topology: Path, overrides: list[str], out: Path
        ) -> list[str]:
            text = CHILD.format(
                tests=str(TESTS),
                method=pair.method,
                seed=pair.seed,
                out=str(out),
                behaviour=behaviours.get(pair.name),
            )
            return [sys.executable, "-P", "-c", text]

        monkeypatch.setattr(runs, "command", command)
        monkeypatch.setattr(compare, "_report", lambda out, record: print("reported"))

    return set_behaviour


@pytest.mark.slow
def test_a_failed_run_is_reported_and_tried_again(
    small: Path, behave: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    behave({"zppo-seed0": "fails"})
    arguments = [*METHODS, "--set", "run.steps=10", "--out", "c"]
    assert compare.main(arguments) == 1
    said = capsys.readouterr().out
    assert "[1/2] grpo seed 0: 10 steps in " in said and "held-out 30.0 % → 50.0 %" in said
    assert "[2/2] zppo seed 0: FAILED: the disk is full" in said
    assert said.endswith("reported\n")
    assert records.read_record(small / "c").failures == {"zppo-seed0": "the disk is full"}
    behave({})
    assert compare.main(arguments) == 0
    said = capsys.readouterr().out
    assert "[1/2] grpo seed 0: finished before, 10 steps" in said
    assert "[2/2] zppo seed 0: 10 steps in " in said
    assert records.read_record(small / "c").failures == {}


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew(
    small: Path, behave: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    behave({})
    records.run_folder(small / "c", Pair("grpo", 0)).mkdir(parents=True)
    records.write_record(small / "c", first_record(small))
    assert compare.main([*METHODS, "--out", "c"]) == 0
    assert (
        "grpo-seed0 has no checkpoint and begins anew; kept as grpo-seed0.abandoned-1"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_an_interrupt_reaches_the_run_and_says_how_to_go_on(
    small: Path, behave: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    behave({"grpo-seed0": "waits"})

    def interrupt() -> None:
        while not (small / "c/waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert compare.main([*METHODS, "--out", "c"]) == 130
    thread.join()
    said = capsys.readouterr().out
    assert (
        "stopping: the run finishes its step and writes a checkpoint; Ctrl-C again stops it at once"
        in said
    )
    assert (
        "interrupted; continue with the same command: zppo compare --topology "
        "topology.yaml --methods grpo,zppo --seeds 0 --out c\n"
    ) in said
    assert "reported" not in said
    assert runs.progress_of(records.run_folder(small / "c", Pair("grpo", 0))).state == "unfinished"
    assert not records.run_folder(small / "c", Pair("zppo", 0)).exists()
    assert records.read_record(small / "c").failures == {}


@pytest.mark.slow
def test_two_interrupts_at_once_reach_the_run_as_two(
    small: Path, behave: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    behave({"grpo-seed0": "waits for two"})

    def interrupt() -> None:
        wait_for(small / "c/waiting")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert compare.main([*METHODS, "--out", "c"]) == 130
    thread.join()
    assert capsys.readouterr().out.count("stopping: the run finishes its step") == 1


KILLED = """
import sys
from pathlib import Path
from zppo.compare import Session
from zppo.comparison.record import Pair
child = "import signal, sys, time\\nfrom pathlib import Path\\n" \
    "signal.signal(signal.SIGTERM, lambda *_: (Path('ended').touch(), sys.exit()))\\n" \
    "Path('waiting').touch()\\ntime.sleep(600)"
Session(Path("."), None, Path("t.yaml"), [])._launch([sys.executable, "-c", child], Path("log"), Pair("grpo", 0))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux only"
)
def test_a_killed_comparison_leaves_no_run_behind(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", KILLED], cwd=tmp_path)
    wait_for(tmp_path / "waiting", process)
    process.kill()
    process.wait()
    wait_for(tmp_path / "ended")


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.slow
def test_a_comparison_in_use_is_refused(
    small: Path, behave: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    behave({})
    (small / "c").mkdir()
    records.write_record(small / "c", first_record(small))
    lock = run_directory.hold(small / "c")
    assert lock is not None
    assert compare.main([*METHODS, "--out", "c"]) == 2
    assert "is in use by a comparison that has not ended" in capsys.readouterr().err
    os.close(lock)


@pytest.mark.slow
def test_report_only_rebuilds_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path / "c", {"grpo": 0.01, "zppo": 0.02}, [0], steps=2)
    arguments = [
        "--report-only",
        "--out",
        str(tmp_path / "c"),
        "--baseline",
        "zppo",
        "--metric-budget",
        "compute",
    ]
    assert cli.main(["compare", *arguments]) == 0
    assert f"wrote {tmp_path / 'c' / 'comparison.html'}\n" in capsys.readouterr().out
    text = (tmp_path / "c/results.md").read_text("utf-8")
    assert "GRPO − ZPPO at equal compute" in text
