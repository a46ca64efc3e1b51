"""What the records of a large run take: the time and memory of writing them, their size on disk by
part, and the time and memory of `zppo report`.

    PYTHONPATH=tests/helpers python -P benches/run_records.py
        [--steps 50,200] [--rollouts 3072] [--words 1000] [--keep FOLDER]

Windows are made up, three fifths of their groups plain, two fifths in pairs of BCQ and NCQ, and
recorded by what the controller records with. Words of responses are drawn at random, from a pool so
large that compression finds no response twice. All times are processor time; what making the
windows up takes is not in them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from made_up_run import FakeRun, prompt
from msgspec import structs

from zppo.algorithm.replay_buffer import ReplayBuffer
from zppo.algorithm.window import Candidate, Group, Visit, Window
from zppo.config.options import at_least, positive, several
from zppo.errors import Parser, UserError, run_command
from zppo_actors.controller.journal import Journal
from zppo_actors.controller.sinks import MetricSinks

GROUP = 8
POOL = 4_000_000
"""Words to draw responses from, in a row."""
MOST_WORDS = POOL // 100
"""Of a response on the average; some are ten times as long."""
VOCABULARY = 30_000
REPORT = """
import sys, time
from zppo.report.cli import main
code = main(sys.argv[1:])
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(time.process_time(), lines["VmHWM"].split()[0], sep="\\n")  # KiB; ru_maxrss is the parent's
sys.exit(code)
"""
HEADER = (
    "| steps | rollouts | written, ms a step | peak, MiB | on disk, MB | rollouts | journal "
    "| the rest | report, s | peak, MiB | page, MB |\n|" + "---:|" * 11
)


class LargeRun(FakeRun):
    """`words`: of a response, on the average."""

    def __init__(self, run_dir: Path, rollouts: int, words: int) -> None:
        super().__init__(run_dir)
        groups = rollouts // GROUP
        self.hard = groups // 5
        self.replayed = groups // 8
        self.new = groups - 2 * self.hard - self.replayed
        self.buffer = ReplayBuffer(4 * groups)
        self.words, self.spent = words, 0.0
        draw = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        known = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(VOCABULARY)]
        # As often as words are: the n-th by one over n.
        shares = 1.0 / np.arange(1, VOCABULARY + 1)
        self.pool = [known[i] for i in draw.choice(VOCABULARY, POOL, p=shares / shares.sum())]

    def window(self, step: int) -> Window:
        window = super().window(step)
        for visit in window.visits:
            for group in [*visit.student_groups(), *visit.teacher_groups()]:
                self._lengthen(group)
            for made in visit.reformulations:
                made.candidates = [self._rewritten(visit, one) for one in made.candidates]
                assert made.group is not None
                shown = "\n".join(f"<candidate>{one.shown}</candidate>" for one in made.candidates)
                made.group.prompt = prompt(f"{visit.question.text}\n{shown}")
        return window

    def record(self, window: Window, sinks: MetricSinks, journal: Journal) -> None:
        begin = time.process_time()
        super().record(window, sinks, journal)
        self.spent += time.process_time() - begin

    def _rewritten(self, visit: Visit, one: Candidate) -> Candidate:
        """A candidate with the text that it has now, compressed to a fifth."""
        group = visit.plain if one.source == "student" else visit.teacher
        assert group is not None and group.samples is not None
        text = group.samples.texts[one.index]
        return structs.replace(one, text=text, shown=text[: len(text) // 5])

    def _lengthen(self, group: Group) -> None:
        samples = group.samples
        assert samples is not None
        lengths = [int(self.rng.lognormvariate(0.0, 0.5) * self.words) + 1 for _ in samples.texts]
        begins = [self.rng.randrange(POOL - length) for length in lengths]
        texts = [
            " ".join([*self.pool[begin : begin + length], text])
            for begin, length, text in zip(begins, lengths, samples.texts, strict=True)
        ]
        total, version = sum(lengths), int(samples.version_spans[-1][1])
        group.samples = structs.replace(
            samples,
            texts=texts,
            token_ids=np.ones(total, np.int32),
            log_probs=np.full(total, -0.7, np.float32),
            offsets=np.cumsum([0, *lengths]).astype(np.int32),
            version_spans=np.array([[length, version] for length in lengths], np.int32),
        )


def sizes(run: Path) -> tuple[int, int, int]:
    """Bytes of the rollout store, the journal and everything else."""
    every = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    store = sum(size for path, size in every.items() if path.parent.name == "rollouts")
    journal = sum(size for path, size in every.items() if path.name.startswith("journal."))
    return store, journal, sum(every.values()) - store - journal


def memory(name: str) -> int:
    """A line of what Linux says of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def report(run: Path, out: Path) -> tuple[float, float]:
    """(processor seconds, peak in MiB) of `zppo report`, a process of its own."""
    command = [sys.executable, "-P", "-c", REPORT, str(run), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = map(float, done.stdout.splitlines()[-2:])
    return seconds, peak / 1024


def row(folder: Path, steps: int, rollouts: int, words: int) -> str:
    made = LargeRun(folder / f"run-{steps}", rollouts, words)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run = made.write(steps)
    peak_of_writing = memory("VmHWM") / 1024
    parts, page = sizes(run), folder / f"page-{steps}.html"
    seconds, peak = report(run, page)
    cells = [
        f"{steps:,}",
        f"{steps * rollouts:,}",
        f"{1000 * made.spent / steps:,.0f}",
        f"{peak_of_writing:,.0f}",
        f"{sum(parts) / 1e6:,.1f}",
        *(f"{size / 1e6:,.1f}" for size in parts),
        f"{seconds:.1f}",
        f"{peak:,.0f}",
        f"{page.stat().st_size / 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=several(positive), default="50,200")
    parser.add_argument(
        "--rollouts", type=at_least(GROUP), default=3072, help="of the student, in a step"
    )
    parser.add_argument("--words", type=positive, default=1000, help="of a response")
    parser.add_argument("--keep", type=Path, help="make the runs here, and leave them")
    asked = parser.parse_args()
    if asked.words > MOST_WORDS:
        raise UserError(f"--words is {asked.words}; expected at most {MOST_WORDS}")
    folder = asked.keep or Path(tempfile.mkdtemp())
    try:
        print(HEADER)
        for steps in asked.steps:
            print(row(folder, steps, asked.rollouts, asked.words), flush=True)
    finally:
        if asked.keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
