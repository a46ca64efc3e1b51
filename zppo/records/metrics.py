"""Every number a run writes down: its name, its unit, what it means, and how it is computed from a
trained window.

Names are flat with slashes. One trained step is one line of `metrics.jsonl` and one TensorBoard
step. A name that holds `<kind>`, `<entry>`, `<pool>` or `<actor>` stands for a family: kinds are
those of `zppo.algorithm.window`, entries are accuracies at admission as `entry_name` writes them.
The functions are pure: values in, a flat dict out. `docs/metrics.md` is held to this table.

Shape legend: T response tokens of a group laid end to end, N completions of a group.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from zppo.algorithm.steps import Fate
from zppo.algorithm.window import HINT, Group, Visit, Window
from zppo.grading import NO_BOX
from zppo.records.candidate_audit import AUDIT_METRICS, audit
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import TIMED_OUT

Scalars: TypeAlias = dict[str, float | int]
LASTING_FATES = ("admitted", "graduated", "evicted")
"""Fates that change the buffer; `kept` and `none` do not."""


class Metric(NamedTuple):
    name: str
    unit: str
    meaning: str


STEP_METRICS: tuple[Metric, ...] = (
    Metric("step", "index", "Rollout step this line belongs to, from 0; the policy has version step + 1 after it."),
    Metric("wall_seconds", "s", "Time in training since the run began; time between a stop and a resume is left out."),
    Metric("time/step", "s", "From the end of the previous step to the end of this one."),
    Metric("time/trainer_wait", "s", "Part of the step in which the trainer had no window to train on."),
    Metric("time/rollout_idle", "share", "Share of room and time of the rollout actors that sampled nothing, by the heartbeats of the step."),
    Metric("time/grader_busy", "share",
           "Share of the step in which every grader had work, looked at twice a second."),
    Metric("accuracy/plain", "share", "Share of correct plain rollouts, new and replayed questions."),
    Metric("accuracy/new", "share", "Share of correct plain rollouts of new questions, a fair sample of the corpus."),
    Metric("accuracy/replay", "share", "Share of correct plain rollouts of replayed questions."),
    Metric("accuracy/<kind>", "share", "Share of correct rollouts of the reformulated groups of this kind (bcq, ncq, hint, prefix)."),
    Metric("accuracy/teacher", "share", "Share of correct rollouts of the teacher on the questions it was asked about."),
    Metric("reward/<kind>", "", "With data.reward: mean of what the rollouts that accuracy/<kind> counts earn."),
    Metric("reward_part/<part>", "", "With data.reward: mean of this part over the plain rollouts, before its weight."),
    Metric("window/new", "questions", "Fresh questions of the window, |X_new|."),
    Metric("window/replayed", "questions", "Questions of the window drawn from the buffer, |X_replay|."),
    Metric("window/hard", "questions", "Questions with plain accuracy below the hard threshold τ."),
    Metric("window/<kind>", "groups", "Reformulated groups of this kind (bcq, ncq, hint, prefix)."),
    Metric("compression/by_rule", "share", "Candidates or hints of which the teacher wrote nothing usable."),
    Metric("staleness/mean", "versions", "Step minus sampling version, mean over the tokens that the student sampled."),
    Metric("staleness/max", "versions", "The same, worst token. Never above scheduler.max_staleness."),
    Metric("staleness/in_flight", "versions", "Versions published while a rollout was sampled, mean over rollouts."),
    Metric("staleness/in_queue", "versions", "Versions published after its last token, mean over rollouts."),
    Metric("length/mean", "tokens", "Mean length of the student's responses, trained on or not."),
    Metric("length/truncated", "share", "Share of the student's responses that hit the length limit."),
    Metric("answers/missing", "share",
           "Student's responses in which the grader found no final answer (no box)."),
    Metric("answers/timed_out", "share",
           "Student's responses whose grading was cut off by the time limit."),
    Metric("answers/failed", "share",
           "With data.reward: student's responses left out because their reward raised or timed out."),
    Metric("tasks/answered/<pool>", "tasks",
           "Tasks of the window that a pool (rollout, teacher, grader) answered."),
    Metric("tasks/given_up/<pool>", "tasks", "Tasks of the window that a pool failed for good."),
    Metric("tasks/failed/<kind>/<actor>", "tries",
           "Tries of this kind that an actor reported as failed."),
    *(Metric(name, "share", meaning) for name, meaning in AUDIT_METRICS.items()),
    Metric("tokens/generated", "tokens", "Response tokens that the student sampled, trained on or not."),
    Metric("tokens/teacher", "tokens", "Response tokens of the teacher's answers, as far as its engine counts them."),
    Metric("compute/student_read", "tokens", "Prompt tokens of what the student sampled, once for each group."),
    Metric("compute/student_written", "tokens", "Response tokens that the student sampled, trained on or not."),
    Metric("compute/teacher_draws_read", "tokens", "Prompt tokens of the teacher's answers, once for each group."),
    Metric("compute/teacher_draws_written", "tokens", "Response tokens of the teacher's answers."),
    Metric("compute/teacher_other_read", "tokens", "Prompt tokens of compressions, hints and the judge's verdicts."),
    Metric("compute/teacher_other_written", "tokens", "What the teacher wrote for them."),
    Metric("compute/teacher_scored", "tokens", "Tokens that the teacher read to give its distribution (distillation)."),
    Metric("compute/proximal", "tokens", "Tokens of a proximal pass over the groups in the loss, as compute/trained; 0 for distillation."),
    Metric("compute/trained", "tokens", "Tokens of the groups in the loss, prompts once for each group."),
    Metric("compute/reference", "tokens", "With method.kl_coefficient: tokens that the frozen reference reads."),
    Metric("spent/requests/<kind>", "requests",
           "Requests to teachers so far, lost attempts included (draw, compress, hint, judge, score)."),
    Metric("spent/tokens/<kind>", "tokens", "Tokens that they read and wrote, as far as reported."),
    Metric("sinks/failed", "sinks", "Sinks that this attempt goes on without, if any."),
    Metric("sinks/dropped", "calls", "Steps and events that a slow sink was not given in this attempt, if any."),
    Metric("buffer/size", "questions", "Questions in the replay buffer after this step."),
    Metric("buffer/fill", "share", "Size over capacity."),
    Metric("buffer/admitted", "questions", "Questions admitted at this step."),
    Metric("buffer/graduated", "questions", "Questions that left mastered (r̄ ≥ τ) at this step."),
    Metric("buffer/evicted", "questions", "Oldest questions pushed out by a full buffer at this step."),
    Metric("buffer/by_entry_accuracy/<entry>", "questions", "Part of the size that was admitted at this accuracy."),
    Metric("graduated/by_entry/<entry>", "questions", "Part of buffer/graduated that was admitted at this accuracy."),
    Metric("heldout/accuracy", "share", "Share of correct rollouts on the held-out questions, on steps that evaluated."),
    Metric("train/<name>", "", "What the trainer measured: `zppo.training.metrics.TRAINER_METRICS`."),
)  # fmt: skip

FATE_FIELDS: tuple[Metric, ...] = (
    Metric("step", "index", "Step at whose end it happened."),
    Metric("question_id", "", "Which question."),
    Metric("fate", "", "admitted, graduated or evicted."),
    Metric("entry_accuracy", "share", "r̄ of its plain group when it was admitted."),
    Metric(
        "visits",
        "visits",
        "Plain visits from its admission to this step, the admitting one included.",
    ),
)

HELDOUT_FIELDS: tuple[Metric, ...] = (
    Metric(
        "step",
        "steps",
        "Trained steps of the policy that was evaluated; 0 is the untrained student.",
    ),
    Metric(
        "newest_version",
        "version",
        "Latest policy that sampled a token; above step only in the middle of a run.",
    ),
    Metric("accuracy", "share", "Share of correct rollouts."),
    Metric("samples", "rollouts", "Answers whose reward could be had."),
    Metric("questions", "questions", "Questions they belong to; without any, no line is written."),
    Metric("low", "share", "Lower end of the 95 % interval."),
    Metric("high", "share", "Upper end of the 95 % interval."),
    Metric("by_question", "share", "Share of correct rollouts of each question, by its id."),
)

STATUS_COUNTERS: tuple[Metric, ...] = (
    Metric("windows_open", "windows", "Windows being generated."),
    Metric("windows_ready", "windows", "Finished windows that wait for the trainer."),
    Metric("questions_new", "questions", "New questions trained so far."),
    Metric("questions_replayed", "questions", "Replayed questions trained so far."),
    Metric(
        "groups_<kind>",
        "groups",
        "Reformulated groups of this kind so far (bcq, ncq, hint, prefix).",
    ),
    Metric("admitted", "questions", "Admissions to the buffer so far."),
    Metric("graduated", "questions", "Graduations so far."),
    Metric("evicted", "questions", "Evictions so far."),
    Metric("buffer_size", "questions", "Questions in the buffer now."),
    Metric("buffer_capacity", "questions", "scheduler.buffer_capacity."),
    Metric(
        "buffer_by_entry/<entry>",
        "questions",
        "Part of buffer_size that was admitted at this accuracy.",
    ),
    Metric("tokens_generated", "tokens", "Response tokens of the trained steps so far."),
    Metric("updates", "updates", "Optimizer updates made so far."),
    Metric("failed/<kind>/<actor>", "tries", "Tries of this kind that the actor failed so far."),
    Metric("restarts", "processes", "Actors restarted so far."),
    Metric(
        "reissued", "tasks", "Tasks sent out again because their actor died or made no progress."
    ),
    Metric("answers_refused", "answers", "Answers of actors that were not let in so far."),
    Metric(
        "spent/requests/<kind>", "requests", "Requests to teachers so far, as in metrics.jsonl."
    ),
    Metric("spent/tokens/<kind>", "tokens", "Tokens that they read and wrote."),
    Metric("budget_requests", "requests", "The limit, teacher.budget.requests, if there is one."),
    Metric("budget_tokens", "tokens", "The limit, teacher.budget.tokens, if there is one."),
    Metric("sinks_failed", "sinks", "Sinks that this attempt goes on without."),
    Metric("sinks_dropped", "calls", "Steps and events that a slow sink was not given."),
)

STATUS_GAUGES: tuple[Metric, ...] = (
    Metric(
        "accuracy_plain",
        "share",
        "accuracy/new of the last step (replayed questions are hard by selection).",
    ),
    Metric(
        "accuracy_<kind>", "share", "accuracy/<kind> of the last step that had groups of this kind."
    ),
    Metric(
        "accuracy_first_<kind>", "share", "Mean of that accuracy over the first tenth of its steps."
    ),
    Metric("accuracy_last_<kind>", "share", "The same over the last tenth."),
    Metric("answers_missing", "share", "answers/missing of the last step."),
    Metric("answers_timed_out", "share", "answers/timed_out of the last step."),
    Metric("truncated", "share", "length/truncated of the last step."),
    Metric("wall_seconds", "s", "Time in training so far, as in metrics.jsonl."),
    Metric("heldout_before", "share", "Held-out accuracy before the first step."),
    Metric("heldout_last", "share", "Latest held-out accuracy."),
    Metric("staleness_mean", "versions", "staleness/mean of the last step."),
    Metric("staleness_max", "versions", "Largest staleness/max so far."),
    Metric("max_staleness", "versions", "The bound, scheduler.max_staleness."),
    Metric("step_seconds", "s", "Duration of a step, recent mean."),
    Metric(
        "trainer_wait_share",
        "share",
        "Share of recent time in which the trainer waited for a window.",
    ),
    Metric(
        "lead",
        "windows",
        "How many windows ahead of the trainer the scheduler dispatches at present.",
    ),
)


def entry_name(accuracy: float) -> str:
    """Name of the bin of an accuracy at admission: 0.375 -> `0.375`, 0.0 -> `0`. Bins are the
    multiples of 1/G_S."""
    return f"{accuracy:.4g}"


def version_ranges(samples: GroupSamples) -> list[tuple[int, int] | None]:
    """Lowest and highest version within each of the N completions; None for a completion without
    tokens."""
    versions = samples.version_spans[:, 1].tolist()
    if len(versions) == 1:  # no update came while the group was sampled
        one = (versions[0], versions[0])
        return [one if start < end else None for start, end in pairwise(samples.offsets.tolist())]
    ends = np.cumsum(samples.version_spans[:, 0]).tolist()
    parts = [
        versions[bisect_right(ends, start) : bisect_left(ends, end) + 1] if start < end else []
        for start, end in pairwise(samples.offsets.tolist())
    ]
    return [(min(part), max(part)) if part else None for part in parts]


def response_lengths(samples: GroupSamples) -> list[int | None]:
    """Response tokens of each of the N completions; None where only a server counted them, and
    several together."""
    if not samples.text_only:
        return [end - start for start, end in pairwise(samples.offsets.tolist())]
    lengths = [
        use.completion_tokens if use.completions == 1 else None
        for use in samples.usage
        for _ in range(use.completions)
    ]
    return lengths or [None] * len(samples.texts)


def prompt_length(samples: GroupSamples) -> int | None:
    """Prompt tokens, chat template included; None where nobody counted them."""
    if not samples.text_only:
        return int(samples.prompt_ids.size)
    return next((use.prompt_tokens for use in samples.usage if use.prompt_tokens is not None), None)


def mean_accuracy(groups: Iterable[Group]) -> float | None:
    """Share of correct rollouts of the groups (each group counts by its size); None without
    rollouts."""
    correct = [group.correctness() for group in groups]
    count = sum(map(len, correct))
    return sum(map(sum, correct)) / count if count else None


def mean_reward(groups: Iterable[Group]) -> float | None:
    """Mean of what the rollouts of the groups earn; None without rollouts."""
    rewards = [grade.reward for group in groups for grade in group.grades or () if not grade.failed]
    return sum(rewards) / len(rewards) if rewards else None


def window_metrics(window: Window, step: int) -> Scalars:
    """What a trained window itself tells: accuracy/, window/, staleness/, length/, answers/,
    tasks/, audit/ and tokens/ of `STEP_METRICS`."""
    sampled = window.student_groups()
    return {
        **_composition(window),
        **_accuracies(window.visits),
        **_rewards(window.visits, sampled),
        **staleness_metrics(sampled, step),
        **_compression(window.visits),
        **_lengths(sampled),
        **_answers(sampled),
        **{f"tasks/{outcome}": n for outcome, n in sorted(window.tasks.items())},
        **audit(window),
        "tokens/teacher": sum(
            _tokens(group) for visit in window.visits for group in visit.teacher_groups()
        ),
    }


def staleness_metrics(groups: Iterable[Group], step: int) -> Scalars:
    """staleness/: step − version over tokens, split per rollout into versions missed while sampled
    and while queued."""
    samples = [group.samples for group in groups if group.samples is not None]
    ranges = Counter(filter(None, chain.from_iterable(map(version_ranges, samples))))
    if not ranges:
        return {}
    tokens, versions = np.concatenate([s.version_spans for s in samples]).astype(np.int64).T
    counts, total = ranges.items(), ranges.total()
    return {
        "staleness/mean": float((step - versions) @ tokens / tokens.sum()),
        "staleness/max": step - int(versions.min()),
        "staleness/in_flight": sum(n * (high - low) for (low, high), n in counts) / total,
        "staleness/in_queue": sum(n * (step - high) for (_, high), n in counts) / total,
    }


def buffer_metrics(
    size: int, capacity: int, by_entry: Mapping[float, int], fates: Sequence[Fate]
) -> Scalars:
    """buffer/ and graduated/: the buffer after the step, and what the step's fates were.

    `by_entry` counts the entries now in the buffer by their accuracy at admission.
    """
    counts: Counter[str] = Counter(fate.fate for fate in fates)
    graduated = Counter(
        entry_name(fate.entry_accuracy) for fate in fates if fate.fate == "graduated"
    )
    return {
        "buffer/size": size,
        "buffer/fill": size / capacity if capacity else 0.0,
        **{f"buffer/{fate}": counts[fate] for fate in LASTING_FATES},
        **{
            f"buffer/by_entry_accuracy/{entry_name(entry)}": n
            for entry, n in sorted(by_entry.items())
        },
        **{f"graduated/by_entry/{entry}": n for entry, n in sorted(graduated.items())},
    }


def outcomes(fates: Iterable[Fate]) -> dict[str, str]:
    """What became of each visited question, for the rollout store; an eviction is not the outcome
    of a visit."""
    return {fate.question_id: fate.fate for fate in fates if fate.fate != "evicted"}


def trainer_metrics(metrics: Mapping[str, float]) -> Scalars:
    """`StepTrained.metrics` under the prefix `train/`."""
    return {f"train/{name}": value for name, value in metrics.items()}


def _composition(window: Window) -> Scalars:
    origins = Counter(visit.origin for visit in window.plain_visits)
    kinds = Counter(g.kind for visit in window.visits for g in visit.reformulated_groups())
    return {
        "window/new": origins["new"],
        "window/replayed": origins["replay"],
        "window/hard": window.hard_questions,
        **{f"window/{kind}": kinds[kind] for kind in sorted({"bcq", "ncq", *kinds})},
    }


def _accuracies(visits: Sequence[Visit]) -> Scalars:
    """Shares of correct rollouts by kind and origin; a family without rollouts has no key, so that no zero is
    made up."""
    families = _families(visits)
    means = {f"accuracy/{family}": mean_accuracy(groups) for family, groups in families.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def _rewards(visits: Sequence[Visit], sampled: Sequence[Group]) -> Scalars:
    """What rollouts earn, whole and by part, and the share whose reward could not be had; nothing
    where a grader alone says what is right, since there reward and correctness are the same."""
    grades = [grade for group in sampled for grade in group.grades or ()]
    if not any(grade.parts or grade.failed for grade in grades):
        return {}
    families = _families(visits)
    means = {f"reward/{f}": mean_reward(groups) for f, groups in families.items()}
    plain = [grade for group in families["plain"] for grade in group.grades or ()]
    known = [grade.parts for grade in plain if not grade.failed]
    names = dict.fromkeys(name for parts in known for name in parts)
    return {
        **{name: mean for name, mean in means.items() if mean is not None},
        **{f"reward_part/{name}": _mean_part(known, name) for name in names},
        "answers/failed": sum(grade.failed for grade in grades) / len(grades),
    }


def _mean_part(known: Sequence[Mapping[str, float]], name: str) -> float:
    values = [parts[name] for parts in known if name in parts]
    return sum(values) / len(values)


def _families(visits: Sequence[Visit]) -> dict[str, list[Group]]:
    """Groups by kind, the plain ones by origin as well."""
    plain = [visit for visit in visits if not visit.late]
    families = {
        "plain": [visit.plain for visit in plain],
        "new": [visit.plain for visit in plain if visit.origin == "new"],
        "replay": [visit.plain for visit in plain if visit.origin == "replay"],
        "teacher": [group for visit in visits for group in visit.teacher_groups()],
    }
    for group in (group for visit in visits for group in visit.reformulated_groups()):
        families.setdefault(group.kind, []).append(group)
    return families


def _compression(visits: Sequence[Visit]) -> Scalars:
    """Over what the teacher was asked to write; a response that several prompts show counts
    once."""
    writers = {
        (number, reformulation.kind == HINT, candidate.source, candidate.index): candidate.writer
        for number, visit in enumerate(visits)
        for reformulation in visit.reformulations
        for candidate in reformulation.candidates
        if candidate.writer is not None
    }
    return (
        {"compression/by_rule": list(writers.values()).count("rule") / len(writers)}
        if writers
        else {}
    )


def _lengths(groups: Sequence[Group]) -> Scalars:
    reasons = [
        reason for group in groups if group.samples for reason in group.samples.finish_reasons
    ]
    tokens = sum(_tokens(group) for group in groups)
    shares: Scalars = {
        "length/mean": tokens / len(reasons),
        "length/truncated": reasons.count("length") / len(reasons),
    } if reasons else {}  # fmt: skip
    return {"tokens/generated": tokens, **shares}


def _answers(groups: Sequence[Group]) -> Scalars:
    notes = [grade.note for group in groups for grade in group.grades or ()]
    names = {"answers/missing": NO_BOX, "answers/timed_out": TIMED_OUT}
    return {name: notes.count(note) / len(notes) for name, note in names.items() if notes}


def _tokens(group: Group) -> int:
    return group.samples.written_tokens if group.samples is not None else 0


KIND_TITLES = {"bcq": "BCQ", "ncq": "NCQ", "hint": "hint", "prefix": "prefix"}
"""Reformulated kinds as they are shown; others go by their own name."""
FAILED_PREFIX = "tasks/failed/"
SPENT_PREFIX = "spent/"
_NOT_KINDS = ("new", "replayed", "hard")


def reformulated_kinds(line: Mapping[str, object]) -> list[str]:
    """The reformulated kinds that a line of `metrics.jsonl` counts."""
    names = [name.removeprefix("window/") for name in line if name.startswith("window/")]
    return [name for name in names if name not in _NOT_KINDS]


def failed_tries(line: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(kind, actor, tries) of what a line of `metrics.jsonl` counts as failed."""
    for name, tries in line.items():
        if name.startswith(FAILED_PREFIX):
            kind, actor = name.removeprefix(FAILED_PREFIX).split("/")
            yield kind, actor, int(tries)


def spent_costs(line: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(kind, requests, tokens) of what teachers had cost at a line of `metrics.jsonl`."""
    prefix = f"{SPENT_PREFIX}requests/"
    for name, requests in line.items():
        if name.startswith(prefix):
            kind = name.removeprefix(prefix)
            yield kind, int(requests), int(line.get(f"{SPENT_PREFIX}tokens/{kind}", 0))


def table_row(metric: Metric) -> str:
    """One line of the tables in `docs/metrics.md`."""
    return f"| `{metric.name}` | {metric.unit or '–'} | {metric.meaning} |"
