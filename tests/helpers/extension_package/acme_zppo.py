"""A package as a user would write it: one of each kind, announced by entry points."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from zppo.algorithm.composition import Composition, student_groups
from zppo.algorithm.methods import Method
from zppo.algorithm.window import Candidate, Visit
from zppo.grading import Reward, parse_answer
from zppo.prompting.prompts import PromptSet
from zppo_actors.engines import Engine, EngineSpec, create
from zppo_protocol.values import Prompt


def near(questions: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[Reward]:
    """1 for the gold answer, less the farther the boxed number is from it; a batch."""
    rewards = []
    for response, row in zip(responses, rows, strict=True):
        answer = parse_answer(response)
        number = int(answer) if answer and answer.isdigit() else None
        value = 0.0 if number is None else 1.0 / (1.0 + abs(number - int(row["gold"])))
        rewards.append(
            Reward(value=value, answer=answer, parts={"digits": float(number is not None)})
        )
    return rewards


class Again:
    """The question once more, as it is."""

    kind = "again"
    preparation = "none"

    def admits(self, visit: Visit) -> bool:
        return True

    def draw(self, visit: Visit, rng: random.Random) -> list[Candidate]:
        return []

    def prompt(self, visit: Visit, candidates: list[Candidate], prompts: PromptSet) -> Prompt:
        return msgspec.structs.replace(visit.plain.prompt)


def at_most_three(visit: Visit, rng: random.Random) -> list[Composition]:
    """The student's groups, three rollouts of each."""
    return [
        msgspec.structs.replace(group, members=group.members[:3])
        for group in student_groups(visit, rng)
    ]


AGAIN = Method(
    name="again",
    title="Again",
    summary="plain prompts twice where they are hard",
    reformulations=(Again(),),
    composer=at_most_three,
)


def rows() -> Iterator[dict[str, Any]]:
    for a in range(1, 7):
        for b in range(1, 5):
            yield {"question": f"{a} * {b} mod 23", "answer": str(a * b), "gold": a * b}


def counting(spec: EngineSpec) -> Engine:
    """The engine `transformers` behind one that counts groups in the file of its own argument."""
    actor = spec.served.actor
    file = actor.engine_args["file"]
    inner = msgspec.structs.replace(actor, engine="transformers", engine_args={"max_sequences": 16})
    served = msgspec.structs.replace(spec.served, actor=inner)
    engine = create(msgspec.structs.replace(spec, served=served))
    generate = engine.generate

    async def counted(task: Any, finished: Any = None) -> Any:
        with open(file, "a", encoding="utf-8") as out:
            out.write(f"{task.n}\n")
        return await generate(task, finished)

    engine.generate = counted  # type: ignore[method-assign]
    return engine


class Lines:
    """A line for each step."""

    def __init__(self, file: str) -> None:
        self.file = file

    def open(self, run: Any) -> None:
        pass

    def step(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(
                json.dumps({"step": step, "digits": metrics.get("reward_part/acme_near/digits")})
                + "\n"
            )

    def event(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass
