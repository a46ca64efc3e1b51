"""Check every task of reasoning-gym for use here, and that `REFUSED` names those that fail and no
others.

    python tools/reasoning_gym_tasks.py

Each task is drawn in two processes with different hash seeds: the same questions must come. Then
its own reference answers must earn the reward after the entry went through JSON, and nonsense must
not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

from zppo.config.topology import REASONING_GYM
from zppo.errors import Parser, UserError, run_command
from zppo.grading import grade
from zppo.grading.procedural import gold_entry
from zppo.grading.reasoning_gym_tasks import REFUSED, quiet

QUESTIONS = 12
NONSENSE = "no idea"


def inspect_task(name: str) -> dict[str, Any]:
    """What one process sees of a task: a digest of its questions, and the first problem with its
    scorer, if any."""
    import reasoning_gym

    with quiet():
        dataset = reasoning_gym.create_dataset(name, size=QUESTIONS, seed=1_234_567)
        entries = [dataset[index] for index in range(QUESTIONS)]
    text = "\0".join(f"{entry['question']}\0{entry['answer']}" for entry in entries)
    problems = (scorer_problem(name, entry) for entry in entries)
    problem = next((found for found in problems if found), None)
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), "problem": problem}


def scorer_problem(name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with the score of one entry, or None."""
    gold = gold_entry(entry)
    answer = entry["answer"]
    if (
        answer is not None
        and grade(rf"\boxed{{{answer}}}", gold, f"{REASONING_GYM}:{name}").reward < 1.0
    ):
        return f"the reference answer {str(answer)[:40]!r} is not right"
    if grade(rf"\boxed{{{NONSENSE}}}", gold, f"{REASONING_GYM}:{name}").reward > 0.0:
        return "nonsense is right"
    return None


def report() -> dict[str, Any]:
    """All tasks, as this process sees them."""
    from reasoning_gym.factory import DATASETS

    found: dict[str, Any] = {}
    REFUSED_BEFORE = dict(REFUSED)
    REFUSED.clear()  # judge them afresh
    for name in sorted(set(DATASETS) - {"composite"}):
        try:
            found[name] = inspect_task(name)
        except (UserError, ValueError, TypeError, IndexError) as error:
            found[name] = {"digest": "", "problem": f"{type(error).__name__}: {error}"[:80]}
    REFUSED.update(REFUSED_BEFORE)
    return found


def main() -> int:
    """Returns 1 if the list in the package does not fit what was found."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().child:
        with contextlib.redirect_stdout(sys.stderr):
            found = report()
        print(json.dumps(found))
        return 0
    one, other = (run_child(seed) for seed in ("1", "2"))
    verdicts = {name: verdict(one[name], other[name]) for name in one}
    for name, problem in verdicts.items():
        known = "refused" if name in REFUSED else ""
        print(f"{name:28} {problem or 'usable':60} {known}".rstrip())
    wrong = {name for name, problem in verdicts.items() if bool(problem) != (name in REFUSED)} - {
        "composite"
    }
    print(
        f"{sum(not problem for problem in verdicts.values())} of {len(verdicts)} tasks are usable"
    )
    print(f"REFUSED is wrong about: {', '.join(sorted(wrong))}" if wrong else "REFUSED agrees")
    return 1 if wrong else 0


def run_child(hash_seed: str) -> dict[str, Any]:
    """The report of a process with this hash seed."""
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def verdict(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What is wrong with a task, or None."""
    if one["digest"] != other["digest"]:
        return "questions differ from process to process"
    problem: str | None = one["problem"] or other["problem"]
    return problem


if __name__ == "__main__":
    sys.exit(run_command(main))
