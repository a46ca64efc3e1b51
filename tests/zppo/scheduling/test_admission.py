"""The door: every way in which an answer can be wrong, one at a time, and scripted worlds whose
actors forge some of their answers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from random_worlds import random_topology, random_world
from worlds import Fake, World, questions, topology

from zppo.algorithm.methods import method_names
from zppo.scheduling import admission, events
from zppo.scheduling.admission import Bounds
from zppo.scheduling.scheduler import RunFailure
from zppo_protocol.messages import GenerateTask, GradeTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.support import Support, support_of
from zppo_protocol.values import ChatMessage, Grade, Prompt, Sampling

BOUNDS = Bounds(vocabulary=100, context=9, trained=True)
PUBLISHED = 7
Change = dict[str, Any]


def task(min_version: int = 5) -> GenerateTask:
    return GenerateTask(
        task_id="7/q/plain",
        kind="plain",
        prompt=Prompt(messages=[ChatMessage(role="user", content="?")]),
        n=2,
        sampling=Sampling(max_new_tokens=4),
        seed=1,
        min_version=min_version,
    )


def answer(**changes: Any) -> GroupSamples:
    """Two responses of 4 and 1 tokens to a prompt of 5, as a student wrote them."""
    fields: dict[str, Any] = {
        "prompt_ids": np.arange(5, dtype=np.int32),
        "token_ids": np.array([1, 99, 3, 4, 0], np.int32),
        "log_probs": np.full(5, -0.5, np.float32),
        "offsets": np.array([0, 4, 5], np.int32),
        "version_spans": np.array([[2, 5], [3, 7]], np.int32),
        "texts": ["a", "b"],
        "finish_reasons": ["length", "stop"],
    }
    return GroupSamples(**{**fields, **changes})


def problem(
    asked: GenerateTask | ScoreTask | GradeTask,
    given: GroupSamples | TokenScores | list[Grade],
    published: int,
    bounds: Bounds,
) -> str | None:
    """As an event of an actor."""
    reply: Any = {"task_id": asked.task_id, "actor": "a", "incarnation": 0, "now": 0.0}
    match given:
        case GroupSamples():
            event: events.Answer = events.Sampled(samples=given, **reply)
        case TokenScores():
            event = events.Scored(scores=given, **reply)
        case _:
            event = events.Graded(grades=given, **reply)
    return admission.problem(asked, event, published, bounds)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


FIVE = {"token_ids": ids(1, 2, 3, 4, 5), "log_probs": np.full(5, -1.0, np.float32)}
ONE = {
    "token_ids": ids(1), "log_probs": np.full(1, -1.0, np.float32), "offsets": ids(0, 1),
    "version_spans": np.array([[1, 6]], np.int32), "texts": ["a"], "finish_reasons": ["stop"],
}  # fmt: skip
NOTHING = {
    "prompt_ids": ids(), "token_ids": ids(), "log_probs": np.zeros(0, np.float32),
    "offsets": ids(0, 0, 0), "version_spans": np.zeros((0, 2), np.int32),
}  # fmt: skip
WRONG: list[tuple[Change, str]] = [
    (
        {"token_ids": ids(1, 2, 2**31 - 1, 4, 5)},
        "the token id 2147483647; expected ids below 100, the vocabulary",
    ),
    (
        {"prompt_ids": ids(0, 100, 2, 3, 4)},
        "the token id 100; expected ids below 100, the vocabulary",
    ),
    (
        {"version_spans": np.array([[1, 4], [4, 7]], np.int32)},
        "tokens of policy version 4; expected 5 to 7",
    ),
    (
        {"version_spans": np.array([[4, 7], [1, 8]], np.int32)},
        "tokens of policy version 8; expected 5 to 7",
    ),
    (
        {"version_spans": np.array([[5, -1]], np.int32)},
        "tokens of policy version -1; expected 5 to 7",
    ),
    (FIVE | {"offsets": ids(0, 5, 5)}, "a response of 5 tokens; expected at most 4"),
    (
        {"prompt_ids": np.zeros(6, np.int32)},
        "10 tokens of prompt and response; expected at most 9",
    ),
    (ONE, "1 completions; expected 2"),
    (NOTHING, "no token ids, although they are trained on"),
    ({"media_tokens": [2]}, "1 counts of the tokens of pictures; expected 0"),
]


def test_what_fits_is_let_in() -> None:
    assert problem(task(), answer(), PUBLISHED, BOUNDS) is None


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_each_thing_that_does_not_fit_is_named(changes: Change, sentence: str) -> None:
    assert problem(task(), answer(**changes), PUBLISHED, BOUNDS) == sentence


SUPPORTS = support_of([ids(1, 7), ids(99), ids(3), ids(2, 4, 9), ids(0, 1, 5)])
CUT = structs.replace(task().sampling, top_k=3)


@pytest.mark.parametrize(
    ("top_k", "support", "sentence"),
    [
        (3, SUPPORTS, None),
        (2, SUPPORTS, "a support of 3 ids; expected at most 2"),
        (3, None, "no supports, although the sampling of trained tokens is truncated"),
        (0, SUPPORTS, "supports of tokens that nobody asked for"),
        (
            3,
            support_of([ids(1, 100), ids(99), ids(3), ids(4), ids(0)]),
            "the token id 100; expected ids below 100, the vocabulary",
        ),
    ],
)
def test_supports_come_exactly_where_they_are_asked_for(
    top_k: int, support: Support | None, sentence: str | None
) -> None:
    asked = structs.replace(
        task(), sampling=structs.replace(CUT, top_k=top_k), with_support=top_k > 0
    )
    assert problem(asked, answer(support=support), PUBLISHED, BOUNDS) == sentence
    # What nobody trains on may be truncated without a word of it.
    assert problem(structs.replace(task(), sampling=CUT), answer(), PUBLISHED, BOUNDS) is None


def test_a_frozen_model_writes_version_minus_one_alone() -> None:
    frozen = answer(version_spans=np.array([[5, -1]], np.int32))
    assert problem(task(-1), frozen, PUBLISHED, BOUNDS) is None
    sentence = "tokens of policy version 5; expected -1, a frozen model"
    assert problem(task(-1), answer(), PUBLISHED, BOUNDS) == sentence


def test_a_server_may_send_text_alone_where_nothing_is_trained_on_it() -> None:
    text = answer(**NOTHING)
    assert problem(task(-1), text, PUBLISHED, Bounds()) is None
    one = answer(**NOTHING | {"offsets": ids(0, 0), "texts": ["a"], "finish_reasons": ["stop"]})
    assert problem(task(-1), one, PUBLISHED, Bounds()) == "1 completions; expected 2"


def test_scores_and_grades() -> None:
    score = ScoreTask(
        task_id="s", prompt_ids=ids(1), token_ids=ids(1, 2), offsets=ids(0, 2), top_k=2
    )

    def scores(*rows: list[int]) -> TokenScores:
        token_ids = np.array(rows, np.int32)
        return TokenScores(
            token_ids=token_ids, log_probs=np.full(token_ids.shape, -2.0, np.float32)
        )

    grade = GradeTask(task_id="g", gold="1", responses=["1", "2"], grader="math")
    assert problem(score, scores([1, -1], [2, 99]), 0, BOUNDS) is None
    assert problem(score, scores([1, 2]), 0, BOUNDS) == "1 scored tokens; expected 2"
    wide = scores([1, 2, 3], [1, 2, 3])
    assert problem(score, wide, 0, BOUNDS) == "3 scores of a token; expected at most 2"
    beyond = "the token id 100; expected ids below 100, the vocabulary"
    assert problem(score, scores([1, 2], [1, 100]), 0, BOUNDS) == beyond
    assert problem(grade, [Grade(reward=1.0)] * 2, 0, BOUNDS) is None
    assert problem(grade, [Grade(reward=1.0)], 0, BOUNDS) == "1 grades; expected 2"
    assert problem(grade, answer(), 0, BOUNDS) == "Sampled to a GradeTask"


# ---- in a run ------------------------------------------------------------------------------------


def forge(world: World, rate: float) -> list[str]:
    """Some answers of engines come from a version that nobody published; returns their tasks."""
    forged: list[str] = []
    original, rng = world.finish, random.Random(world.rng.random())

    def finish(actor: Fake, task_id: str) -> None:
        job = actor.held[task_id].job
        if not isinstance(job.message, GenerateTask) or rng.random() >= rate:
            return original(actor, task_id)
        del actor.held[task_id], actor.began[task_id]
        later = world.scheduler.published + 1
        outcomes = world.feed(world.answer(actor, job.message, [later, later]))
        if not (actor.role == "teacher" and world.text_only_teachers):
            sentence = f"tokens of policy version {later}; expected "
            (refused,) = [one for one in outcomes if not isinstance(one, events.Cost)]
            assert isinstance(refused, events.Refused) and refused.task_id == task_id
            assert refused.actor == actor.name and refused.reason.startswith(sentence)
            forged.append(task_id)
        actor.granted += job.cost
        return world.grant(actor.name, job.cost)

    world.finish = finish  # type: ignore[method-assign]
    return forged


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 10**9), method=st.sampled_from(method_names()))
def test_forged_answers_change_no_invariant_of_a_run(seed: int, method: str) -> None:
    rng = random.Random(seed)
    config = random_topology(rng, method, rng.randint(0, 2))
    world = random_world(rng, config, most_questions=10, seed=seed, crash_rate=0.02)
    forge(world, 0.2)
    world.run()  # it asserts the bound, the order and the caps at every turn
    new = [v.question.id for t in world.steps for v in t.window.visits if v.origin == "new"]
    assert sorted(new) == sorted(question.id for question in world.corpus)


def test_a_task_that_nobody_answers_right_ends_the_run_with_the_reason() -> None:
    config = topology(
        method={"name": "grpo", "group_size": 2},
        scheduler={"new_questions": 1, "max_attempts": 2},
    )
    world = World(config, questions(1), seed=4)
    forge(world, 1.0)
    sentence = r"task 0/q0/plain cannot be done: rollout-\d sent tokens of policy version 1; "
    with pytest.raises(RunFailure, match=sentence):
        world.run()
