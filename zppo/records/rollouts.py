"""The rollout store: every rollout of a trained window, one Parquet file a step, one row a rollout.

A file is written aside, synced and renamed, so `rollouts/step-NNNNNN.parquet` is whole or absent.
The teacher's answers are rows too (kind `teacher`): a reader can retell each visit from this folder
alone. Any Parquet tool opens the files; `read_step` gives rows back as Structs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from zppo.algorithm.window import TEACHER, Group, Visit, Window
from zppo.grading import shown_gold
from zppo.records.atomic_file import SUFFIX, written_whole
from zppo.records.metrics import prompt_length, response_lengths, version_ranges
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Prompt

FILE_PATTERN = "step-[0-9]*.parquet"
OUTCOMES = ("admitted", "kept", "graduated", "none")


class RolloutRow(Struct, kw_only=True):
    """One rollout. Versions are None where no policy sampled it (teacher), `log_prob_mean` where it
    has no token.

    Lengths are None where an engine that sees only text did not count them.
    """

    step: int
    window: int
    """That in which its question was visited; a filled batch holds groups of several, and what was
    made of a plain group may stand in a later step than that."""
    question_id: str
    question: str
    gold: str
    origin: str
    """`new` from the corpus or `replay` from the buffer."""
    outcome: str
    """What the buffer did with the question after this visit: `admitted`, `kept`, `graduated` or
    `none`; in the step that trained its plain group, `none` in a later one."""
    question_accuracy: float
    """r̄ of the plain group of this visit."""
    group_id: str
    kind: str
    trained: bool
    """Whether its tokens entered the loss."""
    rollout: int
    prompt: str
    """The messages as they were given to the engine, joined by newlines, before the chat
    template."""
    response: str
    answer: str | None
    reward: float
    """What it earns; 0 where the reward could not be had."""
    note: str
    finish_reason: str
    length: int | None
    """Response tokens."""
    prompt_length: int | None
    """Prompt tokens, chat template included."""
    version_min: int | None
    version_max: int | None
    log_prob_mean: float | None
    """Mean behaviour log-prob of the response tokens, natural logarithm."""
    candidates: str | None
    """JSON list of the `zppo.algorithm.window.Candidate`s shown in a reformulated prompt, in the
    order shown."""
    correct: bool | None = None
    """Whether it earns `method.correct_reward`; None where the reward could not be had, and in
    files of earlier versions."""
    reward_parts: str | None = None
    """JSON object of the parts of its reward, with `data.reward`."""
    media: str | None = None
    """JSON list of the references to the question's pictures and videos, if it has any."""


_ARROW_TYPES = {
    "step": "int32", "window": "int32", "rollout": "int32", "length": "int32",
    "prompt_length": "int32", "version_min": "int32", "version_max": "int32",
    "question_accuracy": "float32", "reward": "float32", "log_prob_mean": "float32",
    "trained": "bool", "correct": "bool",
}  # fmt: skip


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.parquet"


Members: TypeAlias = Collection[tuple[str, int]]
"""(group id, index) of rollouts."""


def write_step(
    folder: Path, step: int, window: Window, outcome: Mapping[str, str], trained: Members
) -> Path:
    """Write all rollouts of a trained window and return the file's path; the folder is made if need
    be.

    `outcome` maps question ids to one of `OUTCOMES`; those left out have `none`. `trained` are the
    rollouts that entered the loss. A file of the same step is replaced.
    """
    import pyarrow.parquet as parquet

    parts = [
        part for visit in window.visits for part in _visit_columns(visit, step, outcome, trained)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    with written_whole(path, synced=True) as file:
        parquet.write_table(_to_table(parts), file, compression="zstd")
    return path


def read_step(
    path: Path, columns: Sequence[str] | None = None, question_ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of one file as dicts; `columns` and `question_ids` read only those.

    `msgspec.convert(row, RolloutRow)` types a row that has all columns.
    """
    import pyarrow.parquet as parquet

    filters = None if question_ids is None else [("question_id", "in", set(question_ids))]
    # The handle is ours, so nothing but this one file is ever opened.
    with path.open("rb") as file:
        return parquet.read_table(
            file, columns=list(columns) if columns else None, filters=filters
        ).to_pylist()


def step_files(folder: Path) -> Iterator[Path]:
    """Whole files of the store in step order."""
    yield from sorted(folder.glob(FILE_PATTERN))


def roll_back(folder: Path, step: int) -> None:
    """On resume: remove the files of steps >= `step` and whatever a crash left half written."""
    for path in folder.glob(f".step-*{SUFFIX}"):
        path.unlink()
    for path in step_files(folder):
        if int(path.stem.removeprefix("step-")) >= step:
            path.unlink()


Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Fields of `RolloutRow` by name, of equally many rows."""


def _to_table(parts: Sequence[Columns]) -> Any:
    import pyarrow

    names = RolloutRow.__struct_fields__
    types = {name: pyarrow.type_for_alias(_ARROW_TYPES.get(name, "string")) for name in names}
    # Texts are repeated down a group; dictionary pages of Parquet store each once.
    columns = {
        name: pyarrow.array(list(chain.from_iterable(part[name] for part in parts)), types[name])
        for name in names
    }
    return pyarrow.table(columns)


def _visit_columns(
    visit: Visit, step: int, outcome: Mapping[str, str], trained: Members
) -> Iterator[Columns]:
    question = visit.question
    shared = {
        "step": step,
        "window": visit.window,
        "question_id": question.id,
        "question": question.text,
        "gold": shown_gold(question.answer, question.grader),
        "origin": visit.origin,
        "outcome": "none" if visit.late else outcome.get(question.id, "none"),
        "question_accuracy": visit.accuracy,
        "media": msgspec.json.encode(question.media).decode() if question.media else None,
    }
    if not visit.late:
        yield from _group_columns(visit.plain, shared, trained, None)
    for group in visit.teacher_groups():
        yield from _group_columns(group, shared, trained, None)
    for reformulation in visit.reformulations:
        if reformulation.group is not None:
            shown = msgspec.json.encode(reformulation.candidates).decode()
            yield from _group_columns(reformulation.group, shared, trained, shown)


def _group_columns(
    group: Group, shared: Mapping[str, Any], trained: Members, candidates: str | None
) -> Iterator[Columns]:
    """One row per completion that was sampled and graded; a group still without either has none."""
    if group.samples is None or group.grades is None:
        return
    samples, grades, count = group.samples, group.grades, len(group.grades)
    ranges = version_ranges(samples) if group.kind != TEACHER else [None] * count
    of_group = {
        **shared,
        "group_id": group.id,
        "kind": group.kind,
        "prompt": prompt_text(group.prompt),
        "prompt_length": prompt_length(samples),
        "candidates": candidates,
    }
    yield {
        **{name: [value] * count for name, value in of_group.items()},
        "trained": [(group.id, i) in trained for i in range(count)],
        "rollout": range(count),
        "response": samples.texts,
        "answer": [grade.answer for grade in grades],
        "reward": [grade.reward for grade in grades],
        "note": [grade.note for grade in grades],
        "finish_reason": samples.finish_reasons,
        "length": response_lengths(samples),
        "version_min": [found[0] if found else None for found in ranges],
        "version_max": [found[1] if found else None for found in ranges],
        "log_prob_mean": _log_prob_means(samples),
        "correct": [None if grade.failed else group.is_correct(grade) for grade in grades],
        "reward_parts": [
            msgspec.json.encode(grade.parts).decode() if grade.parts else None for grade in grades
        ],
    }


def _log_prob_means(samples: GroupSamples) -> list[float | None]:
    """Of each of the N completions; None for one without tokens."""
    lengths = np.diff(samples.offsets)
    filled = lengths > 0
    means = np.full(len(lengths), np.nan)
    if filled.any():
        sums = np.add.reduceat(samples.log_probs, samples.offsets[:-1][filled], dtype=np.float64)
        means[filled] = sums / lengths[filled]
    return [mean if there else None for mean, there in zip(means.tolist(), filled, strict=True)]


def prompt_text(prompt: Prompt) -> str:
    """The messages of a prompt as one text; the role is named where there is more than the user's
    message."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"[{message.role}]\n{message.content}" for message in prompt.messages)
