"""The rollout store: every rollout of a trained window, one Parquet file a step, one row a rollout.

A file is written aside, synced and renamed, so `rollouts/step-NNNNNN.parquet` is whole or absent.
The teacher's answers are rows too (kind `teacher`): a reader can retell each visit from this folder
alone. Any Parquet tool opens the files; `read_step` gives rows back as Structs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from zppo.algorithm.window import TEACHER, Candidate, Group, Visit, Window
from zppo.grading import shown_gold
from zppo.records.atomic_file import SUFFIX, written_whole
from zppo.records.metrics import prompt_length, response_lengths, version_ranges
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
    question_id: str
    question: str
    gold: str
    origin: str
    """`new` from the corpus or `replay` from the buffer."""
    outcome: str
    """What the buffer did with the question after this visit: `admitted`, `kept`, `graduated` or
    `none`."""
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

    rows = [
        row
        for visit in window.visits
        for row in _visit_rows(visit, step, window.index, outcome, trained)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    with written_whole(path, synced=True) as file:
        parquet.write_table(_to_table(rows), file, compression="zstd")
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


def _to_table(rows: Sequence[RolloutRow]) -> Any:
    import pyarrow

    names = RolloutRow.__struct_fields__
    types = {name: pyarrow.type_for_alias(_ARROW_TYPES.get(name, "string")) for name in names}
    # Texts are repeated down a group; dictionary pages of Parquet store each once.
    columns = {
        name: pyarrow.array([getattr(row, name) for row in rows], types[name]) for name in names
    }
    return pyarrow.table(columns)


def _visit_rows(
    visit: Visit, step: int, window: int, outcome: Mapping[str, str], trained: Members
) -> Iterator[RolloutRow]:
    question = visit.question
    shared = {
        "step": step,
        "window": window,
        "question_id": question.id,
        "question": question.text,
        "gold": shown_gold(question.answer, question.grader),
        "origin": visit.origin,
        "outcome": outcome.get(question.id, "none"),
        "question_accuracy": visit.accuracy,
    }
    yield from _group_rows(visit.plain, shared, trained, None)
    for group in visit.teacher_groups():
        yield from _group_rows(group, shared, trained, None)
    for reformulation in visit.reformulations:
        if reformulation.group is not None:
            yield from _group_rows(reformulation.group, shared, trained, reformulation.candidates)


def _group_rows(
    group: Group, shared: dict[str, Any], trained: Members, candidates: list[Candidate] | None
) -> Iterator[RolloutRow]:
    """One row per completion that was sampled and graded; a group still without either has none."""
    if group.samples is None or group.grades is None:
        return
    samples = group.samples
    shown = None if candidates is None else msgspec.json.encode(candidates).decode()
    prompt, ranges, lengths = (
        prompt_text(group.prompt),
        version_ranges(samples),
        response_lengths(samples),
    )
    for i, grade in enumerate(group.grades):
        start, end = int(samples.offsets[i]), int(samples.offsets[i + 1])
        low, high = (ranges[i] if group.kind != TEACHER else None) or (None, None)
        yield RolloutRow(
            **shared,
            group_id=group.id,
            kind=group.kind,
            trained=(group.id, i) in trained,
            rollout=i,
            prompt=prompt,
            response=samples.texts[i],
            answer=grade.answer,
            reward=grade.reward,
            note=grade.note,
            finish_reason=samples.finish_reasons[i],
            length=lengths[i],
            prompt_length=prompt_length(samples),
            version_min=low,
            version_max=high,
            log_prob_mean=float(np.mean(samples.log_probs[start:end])) if end > start else None,
            candidates=shown,
            correct=None if grade.failed else group.is_correct(grade),
            reward_parts=msgspec.json.encode(grade.parts).decode() if grade.parts else None,
        )


def prompt_text(prompt: Prompt) -> str:
    """The messages of a prompt as one text; the role is named where there is more than the user's
    message."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"[{message.role}]\n{message.content}" for message in prompt.messages)
