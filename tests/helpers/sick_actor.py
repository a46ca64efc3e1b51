"""A real actor process with one sickness, for runs that must survive it.

`python sick_actor.py ROLE …` is `python -m zppo_actors ROLE …`, except that

- a trainer is killed by the very samples that window `POISONED` had in the first life of the run
  (it notes them in `RUN/poison.txt`), whenever it meets them;
- a rollout engine answers its first task with the token id 2^31-1, which no vocabulary has.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
from msgspec import structs

from zppo_actors import process

POISONED = 2
TOO_LARGE = 2**31 - 1


def main(argv: list[str]) -> int:
    run_dir = Path(argv[argv.index("--run") + 1])
    if argv[0] == "trainer":
        poison_trainer(run_dir / "poison.txt")
    if argv[0] == "rollout":
        forge_first_answer()
    return process.main(argv)


def poison_trainer(note: Path) -> None:
    from zppo_actors.trainer import actor

    healthy = actor.train_step

    def train_step(trainer: object, window: object) -> object:
        if window.step == POISONED:
            if not note.exists():
                note.write_text(digest(window))
            if note.read_text() == digest(window):
                os.kill(os.getpid(), signal.SIGKILL)
        return healthy(trainer, window)

    actor.train_step = train_step


def digest(window: object) -> str:
    sha = hashlib.sha256()
    for group in window.groups:
        sha.update(group.samples.token_ids.tobytes())
    return sha.hexdigest()


def forge_first_answer() -> None:
    from zppo_actors.engines.simulated import SimulatedEngine

    healthy, answered = SimulatedEngine.generate, []

    async def generate(self: object, *arguments: object) -> object:
        samples = await healthy(self, *arguments)
        if answered:
            return samples
        answered.append(True)
        return structs.replace(samples, token_ids=np.full_like(samples.token_ids, TOO_LARGE))

    SimulatedEngine.generate = generate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
