"""The rules: each a pure function from `Evidence` to what it finds, causes before effects.

A rule looks at the newest steps, so what has been mended stops being found. It names what to change
by the path of a setting; `docs/metrics.md` has the table of all ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from zppo.diagnosis.evidence import (
    Advisory,
    Evidence,
    Line,
    Severity,
    mean,
    measured,
    percent,
)
from zppo.diagnosis.thresholds import LIMITS
from zppo.records.metrics import KIND_TITLES, reformulated_kinds

Rule = Callable[[Evidence], Iterator[Advisory]]
USUAL_SILENCE = 3
"""Windows after which silence is severe where `run.silent_teacher_windows` is 0."""


def advisories(evidence: Evidence) -> list[Advisory]:
    """What the rules find, the severe first, causes before effects."""
    found = [advisory for rule in RULES.values() for advisory in rule(evidence)]
    return sorted(found, key=lambda advisory: advisory.severity != "severe")


# ---- responses -----------------------------------------------------------------------------------


def cut_off(evidence: Evidence) -> Iterator[Advisory]:
    """Responses that hit the length limit end before their answer."""
    share = evidence.mean("length/truncated", LIMITS.steps)
    if share is not None and share >= LIMITS.many:
        yield Advisory(
            rule="cut_off",
            severity=_severity(share >= LIMITS.most),
            found=f"{percent(share)} of the last responses were cut off at the length limit",
            change="raise student.sampling.max_new_tokens, or let the student think less",
            settings=["student.sampling.max_new_tokens", "student.chat_template_kwargs"],
            numbers={"length/truncated": share},
        )


def no_answer(evidence: Evidence) -> Iterator[Advisory]:
    """Responses without a box earn nothing, whatever they say."""
    share = evidence.mean("answers/missing", LIMITS.steps)
    if share is not None and share >= LIMITS.many:
        yield Advisory(
            rule="no_answer",
            severity=_severity(share >= LIMITS.most),
            found=f"{percent(share)} of the last responses have no boxed answer",
            change="ask for a box in data.templates or data.system_prompt, or give responses room",
            settings=["data.templates", "data.system_prompt", "student.sampling.max_new_tokens"],
            numbers={"answers/missing": share},
        )


def grading_timed_out(evidence: Evidence) -> Iterator[Advisory]:
    """What is not graded in time counts as wrong, right or not."""
    share = evidence.mean("answers/timed_out", LIMITS.long_steps)
    if share is not None and share >= LIMITS.grading_timeouts:
        yield Advisory(
            rule="grading_timed_out",
            severity=_severity(share >= LIMITS.most_grading_timeouts),
            found=f"the grading of {percent(share)} of the last responses ran out of time, "
            "and they count as wrong",
            change="raise actors.grader.timeout_seconds, or choose a simpler data.grader",
            settings=["actors.grader.timeout_seconds", "data.grader"],
            numbers={"answers/timed_out": share},
        )


def reward_failed(evidence: Evidence) -> Iterator[Advisory]:
    """A response whose reward raised or timed out is neither right nor wrong: it teaches
    nothing."""
    share = evidence.mean("answers/failed", LIMITS.long_steps)
    if share is not None and share >= LIMITS.rewards_failed:
        yield Advisory(
            rule="reward_failed",
            severity=_severity(share >= LIMITS.most_rewards_failed),
            found=f"the reward of {percent(share)} of the last responses raised or ran out of "
            "time, and they are left out",
            change="see the notes in rollouts/ and logs/grader-0.log, and mend data.reward",
            settings=["data.reward", "actors.grader.timeout_seconds"],
            numbers={"answers/failed": share},
        )


def sink_failed(evidence: Evidence) -> Iterator[Advisory]:
    """A tracker misses steps; the run's own files have them all."""
    newest = evidence.last(1)
    failed, dropped = (mean(measured(newest, f"sinks/{what}")) for what in ("failed", "dropped"))
    if failed or dropped:
        yield Advisory(
            rule="sink_failed",
            severity="warning",
            found=f"{failed or 0:.0f} sinks have failed, and {dropped or 0:.0f} calls did not "
            "reach a slow one",
            change="see logs/controller.log, mend sinks, and resume; metrics.jsonl has all steps",
            settings=["sinks.use"],
            numbers={"sinks/failed": failed or 0.0, "sinks/dropped": dropped or 0.0},
        )


# ---- the teacher ---------------------------------------------------------------------------------


class Silence(NamedTuple):
    """A teacher's newest windows in a row without an answer, and the tasks it failed in them."""

    pool: str
    windows: int
    tasks: int


def silences(lines: Sequence[Line]) -> list[Silence]:
    """Teachers that failed every task of the newest window in which they had any.

    Windows without a task for a teacher neither break its silence nor count.
    """
    prefix = "tasks/given_up/"
    pools = dict.fromkeys(
        name.removeprefix(prefix)
        for line in lines
        for name in line
        if name.startswith(f"{prefix}teacher")
    )
    found = [_silence(pool, lines) for pool in pools]
    return [silence for silence in found if silence.windows]


def _silence(pool: str, lines: Sequence[Line]) -> Silence:
    windows = tasks = 0
    for line in reversed(lines):
        if line.get(f"tasks/answered/{pool}", 0):
            break
        failed = int(line.get(f"tasks/given_up/{pool}", 0))
        windows, tasks = windows + (failed > 0), tasks + failed
    return Silence(pool, windows, tasks)


def teacher_silent(evidence: Evidence) -> Iterator[Advisory]:
    """Without its teacher a run goes on, but as another method."""
    for pool, windows, tasks in silences(evidence.newest):
        yield Advisory(
            rule="teacher_silent",
            severity=_severity(windows >= (evidence.silent_windows or USUAL_SILENCE)),
            found=f"{pool} answered none of its {tasks} tasks in the last {_windows(windows)}",
            change=f"see logs/{pool}-0.log and mend actors.teacher or its server",
            settings=["actors.teacher.engine_args", "teacher.model", "run.silent_teacher_windows"],
            numbers={"windows": windows, f"tasks/given_up/{pool}": tasks},
        )


def teacher_never_right(evidence: Evidence) -> Iterator[Advisory]:
    """A teacher that solves nothing gives no right candidate, so no BCQ, hint or prefix."""
    # Questions of windows in which it did not answer at all say nothing of its answers.
    answered = [line for line in evidence.last(LIMITS.steps) if "accuracy/teacher" in line]
    hard = sum(measured(answered, "window/hard"))
    if hard >= LIMITS.fewest and not any(line["accuracy/teacher"] for line in answered):
        yield Advisory(
            rule="teacher_never_right",
            severity="severe",
            found=f"no answer of the teacher to the last {hard:.0f} hard questions was right, "
            "so no prompt can show a right candidate",
            change="give the teacher room in teacher.sampling.max_new_tokens, check data.grader "
            "against its answers, or take a stronger teacher.model",
            settings=["teacher.sampling.max_new_tokens", "data.grader", "teacher.model"],
            numbers={"accuracy/teacher": 0.0, "window/hard": hard},
        )


# ---- the signal ----------------------------------------------------------------------------------


def all_alike(evidence: Evidence) -> Iterator[Advisory]:
    """Groups that are all right or all wrong have no advantage."""
    live = evidence.mean("train/live_rollout_share", LIMITS.steps)
    if live is None or live >= LIMITS.live_rollouts:
        return
    accuracy = evidence.mean("accuracy/plain", LIMITS.steps) or 0.0
    start = mean(measured(evidence.first[: LIMITS.steps], "accuracy/plain")) or 0.0
    if start >= LIMITS.able and accuracy <= LIMITS.accuracy_left * start:
        # Of the same questions, so these are not too hard.
        why = f"the student has lost the {percent(start)} of its first steps: lower "
        why += "optimizer.learning_rate and begin anew"
    else:
        too = "hard" if accuracy < 0.5 else "easy"
        why = f"the questions of data.train are too {too}; or raise method.group_size"
    yield Advisory(
        rule="all_alike",
        severity=_severity(live == 0.0),
        found=f"{percent(live)} of the last rollouts have an advantage, because their groups are "
        f"all right or all wrong; plain accuracy is {percent(accuracy)}",
        change=why,
        settings=[
            "data.train",
            "method.group_size",
            "student.sampling.temperature",
            "optimizer.learning_rate",
        ],
        numbers={
            "train/live_rollout_share": live,
            "accuracy/plain": accuracy,
            "accuracy/plain at the start": start,
        },
    )


def kind_without_signal(evidence: Evidence) -> Iterator[Advisory]:
    """Only groups with right and wrong replies have a gradient; accuracy does not tell."""
    kinds = dict.fromkeys(kind for line in evidence.newest for kind in reformulated_kinds(line))
    for kind in kinds:
        name, count = f"audit/{kind}/mixed", f"window/{kind}"
        share = evidence.weighted(name, count, LIMITS.long_steps)
        groups = evidence.total(count, LIMITS.long_steps)
        if share is not None and groups >= LIMITS.fewest and share < LIMITS.signal:
            yield Advisory(
                rule="kind_without_signal",
                severity="warning",
                found=f"{percent(share)} of the last {groups:.0f} {KIND_TITLES.get(kind, kind)} "
                "groups have right and wrong replies; the others have no gradient",
                change="lower scheduler.rho_aug, or choose a method.name without this kind",
                settings=["scheduler.rho_aug", "method.name"],
                numbers={name: share, count: groups},
            )


def picks_by_slot(evidence: Evidence) -> Iterator[Advisory]:
    """A student that picks by place is right as often as a coin, however its accuracy rose."""
    for kind in evidence.families("audit/", "/picked_first"):
        name, count = f"audit/{kind}/picked_first", f"window/{kind}"
        parts = {
            part: evidence.weighted(f"{name}_{part}", count, LIMITS.long_steps)
            for part in ("short", "long", "right_first", "right_second")
        }
        by_length = [p for part in ("short", "long") if (p := parts[part]) is not None]
        habit = mean([abs(2 * p - 1) for p in by_length])
        first, second = parts["right_first"], parts["right_second"]
        groups = evidence.total(count, LIMITS.long_steps)
        if habit is None or first is None or second is None or groups < LIMITS.fewest:
            continue
        if habit >= LIMITS.habit and first - second < LIMITS.judgement:
            known = {part: p for part, p in parts.items() if p is not None}
            shares = ", ".join(f"{percent(p)} where {_where(part)}" for part, p in known.items())
            yield Advisory(
                rule="picks_by_slot",
                severity="warning",
                found=f"{KIND_TITLES.get(kind, kind)} replies pick a candidate by its place, so "
                f"they are right as often as a coin: the first one in {shares}",
                change="lower scheduler.rho_aug, or choose a method.name without this kind",
                settings=["scheduler.rho_aug", "method.name"],
                numbers={f"{name}_{part}": p for part, p in known.items()},
            )


def _where(part: str) -> str:
    return {
        "short": "the question is short",
        "long": "it is long",
        "right_first": "that one is right",
        "right_second": "it is wrong",
    }[part]


# ---- the optimizer -------------------------------------------------------------------------------


def not_finite(evidence: Evidence) -> Iterator[Advisory]:
    """An update whose loss or gradient is not finite is skipped."""
    skipped = evidence.total("train/updates_skipped", LIMITS.steps)
    made = evidence.total("train/updates", LIMITS.steps)
    if skipped:
        share = skipped / (skipped + made)
        yield Advisory(
            rule="not_finite",
            severity=_severity(share >= LIMITS.many),
            found=f"{skipped:.0f} of the last {skipped + made:.0f} updates were skipped, because "
            "loss or gradient was not finite",
            change="lower optimizer.learning_rate, and begin anew where all updates are skipped",
            settings=["optimizer.learning_rate"],
            numbers={"train/updates_skipped": skipped, "train/updates": made},
        )


def no_gradient(evidence: Evidence) -> Iterator[Advisory]:
    """Steps without an update change nothing in the student."""
    updates = evidence.values("train/updates", LIMITS.steps)
    if updates and not any(updates):
        yield Advisory(
            rule="no_gradient",
            severity="severe",
            found=f"no optimizer update was made in the last {_steps(len(updates))}",
            change="the student does not change; look at the other advice, data.train and "
            "method.group_size",
            settings=["data.train", "method.group_size"],
            numbers={"train/updates": 0.0, "steps": len(updates)},
        )


def entropy_gone(evidence: Evidence) -> Iterator[Advisory]:
    """A policy without entropy samples one answer, and groups become alike."""
    now = evidence.mean("train/entropy", LIMITS.steps)
    start = mean(measured(evidence.first[: LIMITS.steps], "train/entropy"))
    if now is None or start is None or now > LIMITS.entropy_left * start:
        return
    if now < LIMITS.entropy_low:
        yield Advisory(
            rule="entropy_gone",
            severity=_severity(now < LIMITS.entropy_gone),
            found=f"the policy's entropy fell from {start:.2g} to {now:.2g} nats a token",
            change="lower optimizer.learning_rate, raise method.clip_high or "
            "student.sampling.temperature",
            settings=[
                "optimizer.learning_rate",
                "method.clip_high",
                "student.sampling.temperature",
            ],
            numbers={"train/entropy": now, "train/entropy at the start": start},
        )


def mismatch(evidence: Evidence) -> Iterator[Advisory]:
    """Engine and trainer disagree about what was sampled."""
    now = evidence.mean("train/mismatch_kl", LIMITS.steps)
    start = mean(measured(evidence.first[: LIMITS.steps], "train/mismatch_kl")) or 0.0
    if now is None or now < LIMITS.mismatch:
        return
    if now >= LIMITS.much_mismatch or now >= 2 * start:
        yield Advisory(
            rule="mismatch",
            severity=_severity(now >= LIMITS.much_mismatch),
            found=f"engine and trainer are {now:.2g} nats a token apart, {start:.2g} at the start",
            change="lower scheduler.max_staleness or optimizer.learning_rate, or set "
            "student.dtype: float32",
            settings=["scheduler.max_staleness", "optimizer.learning_rate", "student.dtype"],
            numbers={"train/mismatch_kl": now, "train/mismatch_kl at the start": start},
        )


# ---- the machine ---------------------------------------------------------------------------------


def grader_slow(evidence: Evidence) -> Iterator[Advisory]:
    """The graders never rest while the trainer waits."""
    busy, waits = evidence.mean("time/grader_busy", LIMITS.long_steps), _waits(evidence)
    if busy is not None and busy >= LIMITS.busy and waits >= LIMITS.many:
        yield Advisory(
            rule="grader_slow",
            severity="warning",
            found=f"all graders had work {percent(busy)} of the time, and the trainer waited "
            f"{percent(waits)} of it",
            change="raise actors.grader.count",
            settings=["actors.grader.count"],
            numbers={"time/grader_busy": busy, "trainer waits": waits},
        )


def trainer_idle(evidence: Evidence) -> Iterator[Advisory]:
    """The trainer waits for windows."""
    waits = _waits(evidence)
    if waits >= LIMITS.idle:
        yield Advisory(
            rule="trainer_idle",
            severity="warning",
            found=f"the trainer waited for a window {percent(waits)} of the time",
            change="raise scheduler.max_staleness or actors.rollout.count",
            settings=["scheduler.max_staleness", "actors.rollout.count"],
            numbers={"trainer waits": waits},
        )


def engines_idle(evidence: Evidence) -> Iterator[Advisory]:
    """The engines have room that nobody uses."""
    idle = evidence.mean("time/rollout_idle", LIMITS.long_steps)
    if idle is not None and idle >= LIMITS.idle and evidence.full(LIMITS.long_steps):
        yield Advisory(
            rule="engines_idle",
            severity="warning",
            found=f"{percent(idle)} of the rollout engines' room sampled nothing",
            change="raise scheduler.new_questions or scheduler.max_staleness, or lower "
            "actors.rollout.count",
            settings=[
                "scheduler.new_questions",
                "scheduler.max_staleness",
                "actors.rollout.count",
            ],
            numbers={"time/rollout_idle": idle},
        )


def _waits(evidence: Evidence) -> float:
    """Share of the last steps that the trainer waited; 0 where they are too few to say so."""
    if not evidence.full(LIMITS.long_steps):
        return 0.0
    steps = evidence.total("time/step", LIMITS.long_steps)
    return evidence.total("time/trainer_wait", LIMITS.long_steps) / steps if steps else 0.0


def _severity(severe: bool) -> Severity:
    return "severe" if severe else "warning"


def _steps(number: int) -> str:
    return f"{number} steps" if number != 1 else "step"


def _windows(number: int) -> str:
    return f"{number} windows" if number != 1 else "window"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        teacher_silent,
        teacher_never_right,
        cut_off,
        grading_timed_out,
        reward_failed,
        sink_failed,
        no_answer,
        not_finite,
        all_alike,
        no_gradient,
        entropy_gone,
        mismatch,
        kind_without_signal,
        picks_by_slot,
        grader_slow,
        trainer_idle,
        engines_idle,
    )
}
"""By id, causes before effects: the first severe one is the verdict of a run that it ends."""
