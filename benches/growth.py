"""How the parts around the models grow with the size of the work: calls, memory and processor time
at three or four sizes each, and the power of the size by which calls and memory grow.

    PYTHONPATH=tests/helpers python benches/growth.py    all sizes; writes docs/growth.md
    … benches/growth.py --small --check                  the two smallest, against the baseline
    … benches/growth.py --small --write                  makes them the baseline

Calls are those of functions in this repository, and those that these make to C, counted by
`sys.setprofile`: the same on every machine. Memory is the peak of what Python and numpy allocate.
The check fails where a count or a peak is 30 % above the baseline. The power is that of the size
between the two largest: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch
from made_up_run import FakeRun
from worlds import Fake, World, questions, topology

from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.data.cursor import CorpusCursor, CursorState
from zppo.data.question import Question
from zppo.errors import Parser, run_command
from zppo.report.browser import browser_data
from zppo.report.load import load_run
from zppo.scheduling import events
from zppo.suites.intervals import paired
from zppo.training.batch import assemble
from zppo.training.layout import deal_passes
from zppo_protocol.codec import decode, encode
from zppo_protocol.messages import GenerateResult, TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benches/results/growth.json"
PAGE = ROOT / "docs/growth.md"
ALLOWED = 1.3
"""A count or a peak may be so many times its baseline."""
OURS = tuple(str(ROOT / name) for name in ("zppo", "protocol", "kernels", "actors"))
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`prepare(size)` returns the work to be measured; the first two sizes are the small form."""

    name: str
    axis: str
    sizes: Sequence[int]
    prepare: Callable[[int], Work]


@dataclass(frozen=True)
class Measured:
    calls: int
    peak_bytes: int
    seconds: float


# ---- the work ------------------------------------------------------------------------------------


def group_samples(responses: int, tokens: int) -> GroupSamples:
    total = responses * tokens
    return GroupSamples(
        prompt_ids=np.arange(512, dtype=np.int32),
        token_ids=np.arange(total, dtype=np.int32) % 150_000,
        log_probs=np.full(total, -0.5, np.float32),
        offsets=np.arange(0, total + 1, tokens, dtype=np.int32),
        version_spans=np.array([[tokens, 3]] * responses, np.int32),
        texts=["abcd" * tokens] * responses,
        finish_reasons=["stop"] * responses,
    )


def codec(responses: int, tokens: int) -> Work:
    result = GenerateResult(task_id="12/q-17/bcq", samples=group_samples(responses, tokens))
    return lambda: decode(encode(result))


def batch(groups: int, tokens: int) -> Work:
    rewards = np.ones(8, np.float32)
    one = TrainGroup("g", "q", "plain", group_samples(8, tokens), rewards)
    window = TrainWindow(step=3, groups=[one] * groups)

    def work() -> object:
        rollouts = assemble(window, max_staleness=2, device=torch.device("cpu"))
        return deal_passes(rollouts, np.arange(rollouts.sequences), 16_384, share=True).batches

    return work


class Quiet(World):
    """Nobody crashes or is asked whether it lives: what is counted is the course of the run."""

    engines = 4

    def watch(self) -> None: ...

    def join_all(self) -> None:
        self.actors = {}
        for role, count in (("rollout", self.engines), ("teacher", 2), ("grader", 2)):
            for i in range(count):
                self.join(Fake(f"{role}-{i}", role, role, 8))
        self.feed(events.TrainerFree(now=self.now))


def scheduler(engines: int, steps: int) -> Work:
    settings = topology(run={"steps": steps}, scheduler={"new_questions": 8, "max_staleness": 2})
    kind = type("Sized", (Quiet,), {"engines": engines})
    return lambda: kind(settings, questions(8 * steps), seed=1).run()


def buffer(entries: int) -> Work:
    """A hundred windows of 32 questions from a buffer that is full; then its state is saved."""
    full = ReplayBuffer(entries)
    for question in questions(entries):
        full.admit(question, 0.1, 0)

    def work() -> None:
        rng = random.Random(0)
        for step in range(100):
            for question in full.draw(32, rng):
                full.put_back(question.id)
            full.admit(Question(id=f"new-{step}", text="?", answer="1"), 0.1, step)
            full.evict()

    return work


def saved_buffer(entries: int) -> Work:
    full = ReplayBuffer(entries)
    for question in questions(entries):
        full.admit(question, 0.1, 0)
    return lambda: msgspec.msgpack.encode(full.state())


def corpus(rows: int) -> Work:
    folder = Path(tempfile.mkdtemp())
    lines = (
        f'{{"id": "q{i}", "question": "What is {i} + 1?", "answer": "{i + 1}"}}\n'
        for i in range(rows)
    )
    (folder / "train.jsonl").write_text("".join(lines))

    def work() -> None:
        load_questions("train.jsonl", DataConfig(train="train.jsonl"), folder)
        shutil.rmtree(folder)

    return work


def cursor(rows: int) -> Work:
    """A hundred windows of 32 new questions."""
    asked = questions(rows)

    def work() -> None:
        taken = CorpusCursor(asked, 0, 2, CursorState())
        for _ in range(100):
            taken.take(32, set())

    return work


def records(steps: int) -> Work:
    folder = Path(tempfile.mkdtemp())

    def work() -> None:
        FakeRun(folder / "run").write(steps)
        shutil.rmtree(folder)

    return work


def report(steps: int) -> Work:
    folder = Path(tempfile.mkdtemp())
    FakeRun(folder / "run").write(steps)

    def work() -> None:
        load_run(folder / "run")
        shutil.rmtree(folder)

    return work


def report_questions(steps: int) -> Work:
    """The part of the page that reads the rollout store."""
    folder = Path(tempfile.mkdtemp())
    run = load_run(FakeRun(folder / "run").write(steps))

    def work() -> None:
        browser_data(run)
        shutil.rmtree(folder)

    return work


def differences(count: int) -> Work:
    """Two models compared on questions whose scores are all different."""
    values = np.random.default_rng(0).uniform(-1, 1, count).tolist()
    return lambda: paired([values])


CASES = (
    Case("codec: one group of 8", "tokens a response", (1024, 4096, 12288), lambda n: codec(8, n)),
    Case("codec: one group", "responses of 4,096 tokens", (8, 16, 64), lambda n: codec(n, 4096)),
    Case("trainer: a window laid out", "tokens a response", (1024, 4096, 12288),
         lambda n: batch(8, n)),
    Case("trainer: a window laid out", "groups of 8 × 1,024", (8, 16, 64),
         lambda n: batch(n, 1024)),
    Case("scheduler: 4 steps of a run", "engines", (4, 28, 256), lambda n: scheduler(n, 4)),
    Case("scheduler: a whole run", "steps", (4, 8, 64), lambda n: scheduler(4, n)),
    Case("replay buffer: 100 windows", "entries", (10**3, 10**4, 10**5, 10**6), buffer),
    Case("replay buffer: its state saved", "entries", (10**3, 10**4, 10**5), saved_buffer),
    Case("corpus: read and checked", "rows", (10**3, 4 * 10**3, 4 * 10**4), corpus),
    Case("cursor: 100 windows", "rows", (10**4, 10**5, 10**6), cursor),
    Case("journal, metrics, rollout store", "steps", (8, 16, 128), records),
    Case("report: a run read", "steps", (8, 16, 128), report),
    Case("report: the questions of the page", "steps", (8, 16, 128), report_questions),
    Case("suites: a paired difference", "questions", (500, 2000, 20_000), differences),
)  # fmt: skip


# ---- the measurement -----------------------------------------------------------------------------


def count_calls(work: Work) -> int:
    """Calls of functions of ours, and from these to C."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(OURS):
            count += 1

    gc.collect()
    gc.disable()  # a finaliser of what came before is no call of ours
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def peak_of(work: Work) -> int:
    """Bytes above what was there before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def seconds_of(work: Work) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(case: Case, size: int, timed: bool) -> Measured:
    seconds = seconds_of(case.prepare(size)) if timed else math.nan
    return Measured(count_calls(case.prepare(size)), peak_of(case.prepare(size)), seconds)


def measure_all(small: bool) -> dict[str, dict[int, Measured]]:
    """Every case by name and axis; each is run once beforehand, so that nothing is imported or
    cached while it is counted."""
    found: dict[str, dict[int, Measured]] = {}
    for case in CASES:
        case.prepare(case.sizes[0])()
        sizes = case.sizes[:2] if small else case.sizes
        found[f"{case.name}, by {case.axis}"] = {
            size: measure(case, size, timed=not small) for size in sizes
        }
    return found


# ---- the baseline and the page -------------------------------------------------------------------


def grown(found: dict[str, dict[int, Measured]], baseline: dict[str, Any]) -> list[str]:
    """What is 30 % above its baseline or has none, a sentence each."""
    sentences = []
    for name, sizes in found.items():
        for size, now in sizes.items():
            for what in ("calls", "peak_bytes"):
                before = baseline.get(name, {}).get(str(size), {}).get(what)
                if before is None:
                    sentences.append(f"{name} {size:,}: {what} has no baseline")
                elif (value := getattr(now, what)) > ALLOWED * before:
                    sentences.append(
                        f"{name} {size:,}: {what} {value:,}, the baseline is {before:,}"
                    )
    return sentences


def power(sizes: dict[int, Measured], what: str) -> str:
    """The exponent of the growth between the two largest sizes."""
    (low, before), (high, after) = sorted(sizes.items())[-2:]
    ratio = max(getattr(after, what), 1) / max(getattr(before, what), 1)
    return f"{math.log(ratio) / math.log(high / low):.2f}"


def page(found: dict[str, dict[int, Measured]]) -> str:
    lines = [
        "# Growth", "",
        "Generated by `benches/growth.py`; do not edit by hand.", "",
        *(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].splitlines(), "",
        "| | sizes | calls | power | peak, MiB | power | processor ms |",
        "|---|---|---|---:|---|---:|---|",
    ]  # fmt: skip
    for name, sizes in found.items():
        rows = sizes.values()
        cells = [
            name,
            " · ".join(f"{size:,}" for size in sizes),
            " · ".join(f"{row.calls:,}" for row in rows),
            power(sizes, "calls"),
            " · ".join(f"{row.peak_bytes / 2**20:,.1f}" for row in rows),
            power(sizes, "peak_bytes"),
            " · ".join(f"{1000 * row.seconds:,.0f}" for row in rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = Parser(description="How the parts around the models grow.")
    parser.add_argument("--small", action="store_true", help="the two smallest sizes alone")
    parser.add_argument("--check", action="store_true", help="fail above the baseline by 30 %%")
    parser.add_argument("--write", action="store_true", help="make a new baseline")
    arguments = parser.parse_args()
    found = measure_all(arguments.small)
    print(page(found))
    if arguments.write:
        plain = {
            name: {
                size: {"calls": row.calls, "peak_bytes": row.peak_bytes}
                for size, row in sizes.items()
            }
            for name, sizes in found.items()
        }
        BASELINE.write_text(json.dumps(plain, indent=1) + "\n")
    if not arguments.small:
        PAGE.write_text(page(found))
    above = grown(found, json.loads(BASELINE.read_text())) if arguments.check else []
    print("\n".join(above), file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
