"""The rollout store: every rollout of a trained window, one Parquet file a step, one row a rollout.

A file is written aside, synced and renamed, so `rollouts/step-NNNNNN.parquet` is whole or absent.
The teacher's answers are rows too (kind `teacher`): a reader can retell each visit from this folder
alone. Any Parquet tool opens the files; `read_step` gives rows back as Structs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from zppo.algorithm.window import TEACHER, Group, Visit, Window
from zppo.errors import UserError, first_line
from zppo.grading import shown_gold
from zppo.records.atomic_file import SUFFIX, written_whole
from zppo.records.metrics import prompt_length, response_lengths, version_ranges
from zppo_protocol.places import in_words
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Prompt

FILE_PATTERN = "step-[0-9]*.parquet"
ROWS_READ_AT_ONCE = 512
"""A row group of Parquet: who reads some questions of a large step need not unpack all texts."""
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
_LONG = {
    "question", "gold", "prompt", "response", "answer", "note", "candidates", "reward_parts",
    "media",
}  # fmt: skip
"""Columns of texts of any length. The others are a few hundred bytes of a row group, and what
makes ready to pack them takes longer than to write them."""
_WRITTEN = {
    "compression": dict.fromkeys(_LONG, "zstd"),
    "write_statistics": [name for name in RolloutRow.__struct_fields__ if name not in _LONG],
    "store_schema": False,  # with Arrow's own a column would read back as a dictionary
}


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

    parts = list(_parts(_graded_groups(window, step, outcome)))
    tables = [_to_table(part, trained) for part in parts or [[]]]
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    with (
        written_whole(path, synced=True) as file,
        parquet.ParquetWriter(file, tables[0].schema, **_WRITTEN) as writer,
    ):
        for table in tables:
            writer.write_table(table)
    return path


BASIC = {"question_id", "kind", "rollout"}
"""Columns that every version has written."""


def read_step(
    path: Path,
    columns: Sequence[str] | None = None,
    question_ids: Collection[str] | None = None,
    *,
    one_a_group: bool = False,
) -> list[dict[str, Any]]:
    """Rows of one file as dicts; `columns` and `question_ids` read only those, `one_a_group` only
    the first rollout of each group.

    `msgspec.convert(row, RolloutRow)` types a row that has all columns. Raises UserError for a file
    that no run has written whole.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    keys = ["question_id"] * (question_ids is not None) + ["rollout"] * one_a_group
    rows: list[dict[str, Any]] = []
    try:
        # The handle is ours, so nothing but this one file is ever opened.
        with path.open("rb") as file:
            stored = parquet.ParquetFile(file)
            if lacking := sorted(BASIC - set(stored.schema_arrow.names)):
                raise _unreadable(path, f"it has no column {lacking[0]!r}")
            for part in range(stored.num_row_groups):
                chosen = _chosen(stored.read_row_group(part, keys), question_ids) if keys else None
                if chosen is None:
                    rows += stored.read_row_group(part, columns).to_pylist()
                elif chosen.true_count:
                    rows += stored.read_row_group(part, columns).filter(chosen).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, first_line(error)) from None
    return rows


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be read ({reason}); remove it to go on without this step")


def _chosen(keys: Any, question_ids: Collection[str] | None) -> Any:
    """Which rows are of these questions and, where `rollout` is a key, the first of their group."""
    import pyarrow
    import pyarrow.compute as compute

    chosen = pyarrow.chunked_array([pyarrow.repeat(True, len(keys))])
    if question_ids is not None:
        wanted = pyarrow.array(sorted(question_ids), pyarrow.string())
        chosen = compute.is_in(keys["question_id"], value_set=wanted)
    if "rollout" in keys.column_names:
        chosen = compute.and_(chosen, compute.equal(keys["rollout"], 0))
    return chosen.combine_chunks()


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


Graded: TypeAlias = tuple[Group, dict[str, Any]]
"""A group that was sampled and graded, and the fields of `RolloutRow` that its rollouts share."""


def _parts(graded: Iterable[Graded]) -> Iterator[list[Graded]]:
    """Whole groups of so many rows as are read at once. Each part is a row group with dictionaries
    of its own: Parquet stores a table's whole dictionary in every row group cut out of it."""
    part: list[Graded] = []
    rows = 0
    for one in graded:
        size = len(one[0].the_grades)
        if part and rows + size > ROWS_READ_AT_ONCE:
            yield part
            part, rows = [], 0
        part.append(one)
        rows += size
    if part:
        yield part


def _graded_groups(window: Window, step: int, outcome: Mapping[str, str]) -> Iterator[Graded]:
    for visit in window.visits:
        question = visit.question
        of_visit = {
            "step": step,
            "window": visit.window,
            "question_id": question.id,
            "question": question.words,
            "gold": shown_gold(question.answer, question.grader),
            "origin": visit.origin,
            "outcome": "none" if visit.late else outcome.get(question.id, "none"),
            "question_accuracy": visit.accuracy,
            "media": msgspec.json.encode(question.media).decode() if question.media else None,
        }
        for group, candidates in _groups(visit):
            if group.samples is not None and group.grades is not None:
                yield (
                    group,
                    {
                        **of_visit,
                        "group_id": group.id,
                        "kind": group.kind,
                        "prompt": prompt_text(group.prompt),
                        "prompt_length": prompt_length(group.samples),
                        "candidates": candidates,
                    },
                )


def _groups(visit: Visit) -> Iterator[tuple[Group, str | None]]:
    """The groups of a visit, and the candidates that a reformulated one shows, as JSON."""
    if not visit.late:
        yield visit.plain, None
    for group in visit.teacher_groups():
        yield group, None
    for reformulation in visit.reformulations:
        if reformulation.group is not None:
            yield reformulation.group, msgspec.json.encode(reformulation.candidates).decode()


def _to_table(graded: Sequence[Graded], trained: Members) -> Any:
    """One row per rollout. What the rollouts of a group share is looked at once a group, and its
    texts travel to Parquet as a dictionary."""
    import pyarrow

    groups = [group for group, _ in graded]
    group_of_row = np.repeat(np.arange(len(groups)), [len(group.the_grades) for group in groups])
    own = _rollout_columns(groups, trained)

    def column(name: str) -> Any:
        kind = pyarrow.type_for_alias(_ARROW_TYPES.get(name, "string"))
        if name in own:
            return pyarrow.array(own[name], kind)
        of_groups = [shared[name] for _, shared in graded]
        if name in _ARROW_TYPES:
            return pyarrow.array(np.array(of_groups, object)[group_of_row], kind)
        places, codes = _numbered(of_groups)
        indices = pyarrow.array(codes[group_of_row], mask=codes[group_of_row] < 0)
        return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(places, kind))

    return pyarrow.table({name: column(name) for name in RolloutRow.__struct_fields__})


def _numbered(texts: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """The distinct texts, and the place of each text among them, -1 for None. Arrow can do this as
    well, but only after it has made all of its functions, which takes longer than a step's file."""
    places: dict[str, int] = {}
    codes = [-1 if text is None else places.setdefault(text, len(places)) for text in texts]
    return list(places), np.array(codes, np.int32)


def _rollout_columns(groups: Sequence[Group], trained: Members) -> dict[str, Sequence[Any]]:
    """The other fields of `RolloutRow`, of all rollouts of graded groups."""
    samples = [group.the_samples for group in groups]
    grades = [grade for group in groups for grade in group.the_grades]
    members = [(group.id, i) for group in groups for i in range(len(group.the_grades))]
    ranges = [found for group in groups for found in _version_ranges(group)]
    return {
        "trained": [member in trained for member in members],
        "rollout": [i for _, i in members],
        "response": [text for one in samples for text in one.texts],
        "answer": [grade.answer for grade in grades],
        "reward": [grade.reward for grade in grades],
        "note": [grade.note for grade in grades],
        "finish_reason": [reason for one in samples for reason in one.finish_reasons],
        "length": [length for one in samples for length in response_lengths(one)],
        "version_min": [found[0] if found else None for found in ranges],
        "version_max": [found[1] if found else None for found in ranges],
        "log_prob_mean": [mean for one in samples for mean in _log_prob_means(one)],
        "correct": [
            None if grade.failed else group.is_correct(grade)
            for group in groups
            for grade in group.the_grades
        ],
        "reward_parts": [
            msgspec.json.encode(grade.parts).decode() if grade.parts else None for grade in grades
        ],
    }


def _version_ranges(group: Group) -> Sequence[tuple[int, int] | None]:
    """As `version_ranges`; no policy has a version of what a teacher wrote."""
    if group.kind == TEACHER:
        return [None] * len(group.the_grades)
    return version_ranges(group.the_samples)


def _log_prob_means(samples: GroupSamples) -> list[float | None]:
    """Of each of the N completions; None for one without tokens. numpy adds in pairs, so float32
    keeps what the column holds."""
    parts = list(pairwise(samples.offsets.tolist()))
    filled = [start for start, end in parts if start < end]
    sums = np.add.reduceat(samples.log_probs, filled) if filled else np.zeros(0)
    left = iter(sums.tolist())
    return [next(left) / (end - start) if start < end else None for start, end in parts]


def prompt_text(prompt: Prompt) -> str:
    """The messages of a prompt as one text; the role is named where there is more than the user's
    message. Places of pictures are words."""
    texts = [f"[{message.role}]\n{message.content}" for message in prompt.messages]
    text = prompt.messages[0].content if len(texts) == 1 else "\n".join(texts)
    return in_words(text, prompt.media)
