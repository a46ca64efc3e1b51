"""Off-policy (Algorithm 2) and on-policy (Algorithm 3) distillation, naively."""

from __future__ import annotations

from reference.run import Oracle, Run, Step, ask_teacher, begin, refresh, train


def algorithm2(run: Run, t: int, oracle: Oracle, *, replay: bool) -> Step:
    """One step: the teacher answers every question, its correct responses are trained on, nothing
    else is."""
    step = begin(run, t, oracle, replay)
    for name, rewards in ask_teacher(run, step, oracle, step.x).values():
        correct = {(name, i): r for i, r in enumerate(rewards) if r >= 1}
        if correct:
            step.trained[name] = correct
    if replay:
        refresh(run, step)
    return step


def algorithm3(run: Run, t: int, oracle: Oracle, *, replay: bool) -> Step:
    """One step: the student's own rollouts are trained on; the teacher draws nothing."""
    step = begin(run, t, oracle, replay)
    for q in step.x:
        train(step, q, "plain", step.plain[q])
    if replay:
        refresh(run, step)
    return step
