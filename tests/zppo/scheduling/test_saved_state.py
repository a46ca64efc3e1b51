"""States that were written before this code still load.

`saved_state.bin` was written in the middle of a run by the first version that saved states: four
windows in flight (4 to 7), some plain, some with rewritten prompts that lack their compressed
candidates, a response whose judge has not spoken, questions in the buffer, one evaluation behind.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from worlds import World, questions, scripted_rewards, topology

from zppo.data.question import Question
from zppo.scheduling.state import SchedulerState
from zppo_protocol import codec

SAVED = Path(__file__).with_name("saved_state.bin").read_bytes()
CONFIG = topology(
    method={"name": "zppo", "group_size": 4, "teacher_group_size": 2},
    scheduler={
        "new_questions": 3,
        "rho_replay": 1.0,
        "rho_aug": 1.0,
        "max_staleness": 3,
        "buffer_capacity": 8,
    },
    evaluation={"every": 2, "samples": 2},
    more_teachers=[{"model": "another"}],
)


def corpus() -> list[Question]:
    """Every fourth question is one for the judge."""
    return [
        msgspec.structs.replace(q, answer=f"gold {q.id}", grader="judge") if i % 4 == 0 else q
        for i, q in enumerate(questions(24))
    ]


def test_a_saved_state_goes_on_where_it_was() -> None:
    state = codec.loads(SAVED, SchedulerState)
    world = World(
        CONFIG,
        corpus(),
        seed=1,
        rewards=scripted_rewards(3, 0.7),
        heldout=questions(2, "h"),
    )
    world.saved = (SAVED, 0)
    world.restore()
    assert world.scheduler.trained == 4 and sorted(world.scheduler.windows) == [4, 5, 6, 7]
    assert codec.dumps(world.scheduler.state()) == codec.dumps(state)
    before = {v.question.id for w in state.windows for v in w.visits if v.origin == "new"}
    world.run()
    assert [trained.window.index for trained in world.steps] == [4, 5, 6, 7]
    trained = {v.question.id for t in world.steps for v in t.window.visits if v.origin == "new"}
    assert trained == before and len(trained) == 12
    assert world.evaluations[-1].step == 8


def test_a_fresh_state_is_that_of_a_scheduler_that_was_told_nothing() -> None:
    world = World(CONFIG, corpus(), seed=1)
    fresh = SchedulerState.fresh(CONFIG.scheduler)
    assert codec.dumps(world.build(None).state()) == codec.dumps(fresh)
    assert codec.loads(codec.dumps(fresh), SchedulerState) == fresh
