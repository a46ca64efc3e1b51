"""GRPO† + teacher response, and GRPO† with a hint (Algorithm 5) or a prefix (Algorithm 6),
naively."""

from __future__ import annotations

from reference.run import (
    Oracle,
    Run,
    Step,
    ask_teacher,
    begin,
    cap,
    drop_trivial,
    hardest_first,
    refresh,
    train,
)


def teacher_response(run: Run, t: int, oracle: Oracle) -> Step:
    """One step: on a hard question a correct teacher response stands in for one wrong rollout."""
    step = begin(run, t, oracle, replay=True)
    taught = ask_teacher(run, step, oracle, step.hard)
    for q in step.x:
        train(step, q, "plain", step.plain[q])
        if q in taught and any(r >= 1 for r in taught[q][1]):
            replace_one(step, oracle, q, *taught[q])
    drop_trivial(run, step)
    refresh(run, step)
    return step


def replace_one(step: Step, oracle: Oracle, q: str, teacher: str, taught: list[float]) -> None:
    """Take out the rollout that chance took out and put in what it put in, if it was lawful.

    Chance says nothing of a group that is dropped; whether it is does not depend on the choice, so
    any will do.
    """
    name = f"{step.t}/{q}/plain"
    group = step.trained[name]
    wrong = [rollout for rollout, r in group.items() if r < 1]
    right = [(teacher, i) for i, r in enumerate(taught) if r >= 1]
    drawn = oracle["members"].get(name, {*group, right[0]} - {wrong[0]})
    [gone], [come] = set(group) - set(drawn), set(drawn) - set(group)
    assert gone in wrong, "a wrong rollout goes"
    assert come in right, "a correct teacher response comes"
    del group[gone]
    group[come] = 1.0


def algorithm5or6(run: Run, t: int, oracle: Oracle, *, kind: str) -> Step:
    """One step: the hardest questions are chosen, the teacher answers these, a correct answer makes
    one more group."""
    step = begin(run, t, oracle, replay=True)
    x_aug = hardest_first(step, step.hard)[: cap(run, step)]
    taught = ask_teacher(run, step, oracle, x_aug)
    for q in step.x:
        train(step, q, "plain", step.plain[q])
    for q in x_aug:
        if any(r >= 1 for r in taught[q][1]):
            [(source, index, count)] = oracle["candidates"][q, kind]
            assert source == "teacher" and taught[q][1][index] >= 1 and count == 1
            step.instances.append((q, kind))
            train(step, q, kind, run.rewards(f"{t}/{q}/{kind}", run.g_s))
    drop_trivial(run, step)
    refresh(run, step)
    return step
