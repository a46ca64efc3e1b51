"""Break one rule at a time and see whether a test notices.

    python tools/mutation_check.py

Copies the tree into a temporary folder, applies one change at a time to the rules of Algorithms 1
to 6, the buffer, pacing and dispatch, and runs their tests. Prints one line per change; exits with
1 if one survives that is not known to change nothing. With words after the command, only the
changes whose file or text holds one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import MUTANTS, Mutant

from zppo.errors import Parser, UserError, run_command

ROOT = Path(__file__).parents[1]
TESTS = ("methods", "algorithms", "replay_buffer", "pacing", "scheduler")
"""Those that are quickest to notice come first."""
TESTS_OF = {
    "zppo/algorithm/composition.py": ("composition", "algorithms"),
    "zppo/algorithm/reformulations.py": ("reformulations", "algorithms"),
    "zppo/algorithm/replay_buffer.py": ("replay_buffer", "algorithms", "scheduler"),
    "zppo/scheduling/pacing.py": ("pacing", "scheduler"),
    "zppo/scheduling/dispatch.py": ("scheduler",),
    "zppo/scheduling/free_workers.py": ("dispatch", "scheduler"),
    "zppo/scheduling/scheduler.py": ("scheduler", "methods", "events"),
    "zppo/scheduling/stages.py": ("methods", "scheduler", "algorithms"),
    "zppo/data/cursor.py": ("scheduler",),
    "zppo/prompting/hints.py": ("hints",),
    "zppo/prompting/prompts.py": ("prompts",),
    "zppo/records/ledger.py": ("summary", "ledger"),
    "zppo/scheduling/admission.py": ("admission",),
    "actors/zppo_actors/controller/recorder.py": ("summary",),
}
"""Files with tests of their own."""
TIMEOUT_SECONDS = 1200.0


def survives(root: Path, mutant: Mutant) -> bool:
    """Whether all tests pass in the copy at `root` with the change applied; the copy is put right
    again."""
    path = root / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    try:
        return passes(root, TESTS_OF.get(mutant.file, TESTS))
    finally:
        path.write_text(text)


def passes(root: Path, names: Iterable[str]) -> bool:
    """Whether these tests pass in the copy at `root`, in time."""
    packages = (root / "protocol", root / "kernels", root / "actors", root)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "OMP_NUM_THREADS": "1",
    }
    rooms = root / "tests/zppo"
    tests = [str(next(rooms.rglob(f"test_{name}.py"))) for name in names]
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants with one of these in file or line")
    words, unexpected = parser.parse_args().words, 0
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.old}" for word in words)]
    if not chosen:
        raise UserError(f"no mutant has {' or '.join(map(repr, words))} in its file or its line")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "zppo"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(
                ".git", ".venv", "runs", "__pycache__", ".*_cache", "*.safetensors", "images"
            ),
        )
        if not passes(copy, {*TESTS, *(name for names in TESTS_OF.values() for name in names)}):
            raise UserError("the tests fail without any change; expected tests that pass")
        for mutant in chosen:
            alive = survives(copy, mutant)
            verdict = (
                (
                    f"changes nothing: {mutant.changes_nothing}"
                    if mutant.changes_nothing
                    else "SURVIVES"
                )
                if alive
                else "caught"
            )
            unexpected += alive and not mutant.changes_nothing
            print(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}: {verdict}", flush=True)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
