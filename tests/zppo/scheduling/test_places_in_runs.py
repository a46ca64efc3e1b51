"""Whatever models write, in no prompt of a run does a picture move: not into a candidate, a hint or
a start, and not by a method of the user's that shows words as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from worlds import Fake, World, topology

from zppo.algorithm.methods import method_names
from zppo.data.question import Question
from zppo.prompting.content import messages_in_parts
from zppo.scheduling import events
from zppo_protocol.messages import GenerateTask
from zppo_protocol.places import PLACE
from zppo_protocol.values import ChatMessage, PictureReference, Prompt

OWN = str(Path(__file__).parents[3] / "examples/own/method.py:METHOD")
PICTURE = PictureReference(path="a.png", sha256="0" * 64, width=8, height=8)
FIRST = ChatMessage(role="user", content=f"Is {PLACE} red?")
YES = ChatMessage(role="assistant", content="Yes.")


class HostileWorld(World):
    """Models that write nothing without the character of places, one for each picture and more."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.asked: list[tuple[str, Prompt]] = []
        super().__init__(*args, **more)

    def answer(self, actor: Fake, message: Any, versions: list[int]) -> events.Answer:
        said = super().answer(actor, message, versions)
        if isinstance(message, GenerateTask):
            self.asked.append((message.task_id, message.prompt))
            assert isinstance(said, events.Sampled)
            texts = [
                f"{PLACE} {text.replace(' ', PLACE, i % 3)}"
                for i, text in enumerate(said.samples.texts)
            ]
            seen = [1] * len(message.prompt.media)
            drawn = structs.replace(said.samples, texts=texts, media_tokens=seen)
            return structs.replace(said, samples=drawn)
        return said


@pytest.mark.parametrize("method", [*method_names(), OWN])
def test_no_picture_moves(method: str) -> None:
    config = topology(
        run={"epochs": 2},
        method={"name": method, "group_size": 3},
        scheduler={"new_questions": 3, "rho_aug": 1.0},
    )
    shapes = [
        (f"in {PLACE} and {PLACE}: what is it?", 2, ()),
        ("before: what is it?", 1, ()),
        ("and now: what is it?", 1, (FIRST, YES)),
        ("none: what is it?", 0, ()),
    ]
    corpus = [
        Question(id=f"q{i}", text=text, answer="1", media=(PICTURE,) * count, earlier=earlier)
        for i, (text, count, earlier) in enumerate(shapes * 2)
    ]
    world = HostileWorld(config, corpus, seed=1).run()
    kinds = {task_id.split("/")[2] for task_id, _ in world.asked}
    assert kinds > {"plain"} or not world.method.reformulations
    for task_id, prompt in world.asked:
        question = corpus[int(task_id.split("/")[1][1:])]
        parts = [
            part.get("text", PLACE)
            for message in messages_in_parts(prompt, lambda one: {})
            for part in message["content"]
        ]
        text = "".join(parts)
        if not prompt.media:
            assert PLACE not in text
            continue
        said = "".join([*(turn.content for turn in question.earlier), question.text])
        assert text.count(PLACE) == len(question.media)
        if not question.has_places:
            assert text.startswith(PLACE * len(question.media))
        elif not question.earlier:
            assert said in text
        else:
            assert "Is \ufffc red?" in text
