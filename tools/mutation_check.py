"""Break one rule at a time and see whether a test notices.

    python tools/mutation_check.py

Copies the tree into a temporary folder, applies one change at a time to the rules of Algorithm 1, the buffer, pacing
and dispatch, and runs their tests. Prints one line per change; exits with 1 if one survives that is not known to
change nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ("scheduler", "buffer", "reformulations", "pacing")
TIMEOUT_SECONDS = 300.0


class Mutant(NamedTuple):
    """`changes_nothing` says why no test can notice, where that is so."""

    file: str
    old: str
    new: str
    changes_nothing: str = ""


MUTANTS = (
    Mutant(
        "zppo/algorithm.py",
        "return visit.accuracy < recipe.hard_threshold",
        "return visit.accuracy <= recipe.hard_threshold",
    ),
    Mutant("zppo/algorithm.py", "math.floor(rho * new_questions + 1e-9)", "math.ceil(rho * new_questions)"),
    Mutant(
        "zppo/algorithm.py",
        'recipe.method.teacher_draws == "hard" and is_hard(visit, recipe)',
        'recipe.method.teacher_draws == "hard"',
    ),
    Mutant(
        "zppo/algorithm.py", "key=lambda visit: visit.accuracy)[:limit]", "key=lambda visit: -visit.accuracy)[:limit]"
    ),
    Mutant(
        "zppo/algorithm.py",
        "key=lambda visit: visit.accuracy)[:limit]",
        "key=lambda visit: visit.accuracy)",
        "the post-cap keeps the same groups",
    ),
    Mutant("zppo/algorithm.py", "return walk[:limit]", "return walk"),
    Mutant("zppo/algorithm.py", "return walk[:limit]", "return walk[:limit + 1]"),
    Mutant(
        "zppo/algorithm.py",
        "limit = quota(recipe.rho_aug, window.new_count)",
        "limit = quota(recipe.rho_aug, len(window.visits))",
    ),
    Mutant(
        "zppo/algorithm.py",
        "count = quota(recipe.rho_replay, len(new)) if recipe.method.replay else 0",
        "count = quota(recipe.rho_replay, len(new))",
        "without replay the buffer stays empty",
    ),
    Mutant("zppo/algorithm.py", "    for entry in buffer.evict():", "    for entry in []:"),
    Mutant("zppo/algorithm.py", "if is_hard(v, recipe) and any(_admitted", "if any(_admitted"),
    Mutant(
        "zppo/algorithm.py", "    if not recipe.method.replay:\n        return []", "    if False:\n        return []"
    ),
    Mutant(
        "zppo/algorithm.py",
        "question, accuracy = visit.question, visit.accuracy",
        "question, accuracy = visit.question, max(g.accuracy for g in visit.trained_groups())",
    ),
    Mutant("zppo/reformulations.py", "rng.choice(_correct_teacher(visit))", "rng.randrange(len(visit.teacher.grades))"),
    Mutant(
        "zppo/reformulations.py",
        "rng.choice(visit.plain.indices(correct=False))",
        "rng.choice(range(len(visit.plain.grades)))",
    ),
    Mutant(
        "zppo/reformulations.py",
        "for index in visit.plain.indices(correct=False)]",
        "for index in visit.plain.indices(correct=False)[:2]]",
    ),
    Mutant("zppo/reformulations.py", "rng.shuffle(shown)", "pass"),
    Mutant("zppo/reformulations.py", "return bool(_correct_teacher(visit)) and", "return"),
    Mutant(
        "zppo/pacing.py", "return window <= horizon + self.lead", "return window <= horizon + self.max_staleness + 1"
    ),
    Mutant("zppo/pacing.py", "return max(0, window - self.max_staleness)", "return 0"),
    Mutant("zppo/scheduler.py", "return min(self.trained, self.published)", "return self.published"),
    Mutant(
        "zppo/dispatch.py",
        "and self._credits.available(worker.name) >= job.cost",
        "and self._credits.available(worker.name) >= 0",
    ),
    Mutant("zppo/dispatch.py", "and worker.version >= job.min_version", "and True"),
    Mutant("zppo/corpus.py", "if question_id in in_flight or question_id in taken:", "if question_id in taken:"),
    Mutant("zppo/corpus.py", "self._deferred = [*taken.values(), *self._deferred]\n            return []", "return []"),
    Mutant("zppo/scheduler.py", "cursor=self.cursor.state(),", "cursor=CursorState(),"),
    Mutant("zppo/scheduler.py", "windows=[self.windows[index] for index in sorted(self.windows)],", "windows=[],"),
    Mutant(
        "zppo/buffer.py",
        "for question_id in state.available:",
        "for question_id in [e.question.id for e in state.entries]:",
    ),
    Mutant("zppo/buffer.py", "self._remove(next(iter(self._entries)))", "self._remove(next(reversed(self._entries)))"),
    Mutant("zppo/dispatch.py", "        self._queue_again(expired)\n", ""),
    Mutant("zppo/dispatch.py", "return self._queue_again(old)", "return [lease.task_id for lease in old]"),
    Mutant("zppo/scheduler.py", "return self.evaluation.step if self.evaluation is not None else 0", "return 0"),
    Mutant("zppo/scheduler.py", "evaluated=list(self.evaluated),", "evaluated=[],"),
    Mutant("zppo/buffer.py", "available=list(self._available)", "available=sorted(self._available)"),
    Mutant("zppo/scheduler.py", "if job is not None and answers != job.answers", "if False"),
)


def survives(root: Path, mutant: Mutant) -> bool:
    """Whether all tests pass in the copy at `root` with the change applied; the copy is put right again."""
    path = root / mutant.file
    text = path.read_text()
    if mutant.old not in text:
        raise SystemExit(f"{mutant.file} no longer holds {mutant.old!r}: bring the mutant up to date")
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    packages = (root / "protocol", root / "kernels", root / "actors", root)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "OMP_NUM_THREADS": "1"}
    tests = [f"tests/zppo/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(text)


def main() -> int:
    unexpected = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "zppo"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        for mutant in MUTANTS:
            alive = survives(copy, mutant)
            verdict = (
                (f"changes nothing: {mutant.changes_nothing}" if mutant.changes_nothing else "SURVIVES")
                if alive
                else "caught"
            )
            unexpected += alive and not mutant.changes_nothing
            print(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}: {verdict}", flush=True)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
