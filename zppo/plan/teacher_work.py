"""The most that the teachers can be asked for in one step, by kind of work: what `--dry-run` shows,
and what `teacher.budget` is compared with.

Upper bounds, from group sizes, caps and lengths: every question is hard, every response is wrong
and has full length. No task is tried twice, and held-out questions are left out. A prompt has at
most `data.max_prompt_tokens` and what it shows of a response; the wording of a request about one is
taken as `WORDING_TOKENS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from zppo.algorithm.methods import Method
from zppo.config.served import ServedModel, teachers
from zppo.config.topology import JUDGE, JUDGE_SAMPLING, OPENAI, TeacherConfig, Topology
from zppo.plan.plan import Windows, Work
from zppo.plan.processes import teacher_grades

WORDING_TOKENS = 512
"""Room for what a request to compress, hint or judge says around question and response."""


def teacher_work(topology: Topology, method: Method, windows: Windows) -> list[Work]:
    """By kind; nothing for a kind without work."""
    teacher = topology.teacher
    if teacher is None:
        return []
    works = [
        _draws(topology, method, windows),
        *_preparations(topology, teacher, method, windows),
        _verdicts(topology, method, windows),
        _scores(topology, teacher, method, windows),
    ]
    return [work for work in works if work.requests]


def covered_steps(topology: Topology, works: list[Work]) -> int | None:
    """Steps that the budget pays for even if each takes the most; None without a budget."""
    if topology.teacher is None or not works:
        return None
    limits = topology.teacher.budget
    found = [
        limit // sum(getattr(work, name) for work in works)
        for name in ("tokens", "requests")
        if (limit := getattr(limits, name)) is not None
    ]
    return min(found, default=None)


def _asked(method: Method, windows: Windows) -> int:
    """The most questions that a teacher answers in a step."""
    match method.teacher_draws:
        case "all" | "hard":
            return windows.new + windows.replayed
        case "selected":
            return windows.reformulated
        case _:
            return 0


def _draws(topology: Topology, method: Method, windows: Windows) -> Work:
    """In a cascade each teacher may be asked, in a pool one of them: the dearest."""
    size, prompt = topology.method.teacher_group_size, topology.data.max_prompt_tokens
    requests = [_requests(one, size) for one in teachers(topology)]
    tokens = [
        n * prompt + size * one.model.sampling.max_new_tokens
        for n, one in zip(requests, teachers(topology), strict=True)
    ]
    total = sum if topology.method.teacher_order == "cascade" else max
    asked = _asked(method, windows)
    return Work(kind="draw", requests=asked * total(requests), tokens=asked * total(tokens))


def _requests(teacher: ServedModel, size: int) -> int:
    """Requests for one group; a server may be asked for fewer responses at once, and is asked for
    one where it decodes greedily."""
    if teacher.actor.engine != OPENAI:
        return 1
    most = 1 if teacher.model.sampling.temperature == 0.0 else size
    return math.ceil(size / (teacher.actor.engine_args.get("choices_per_request") or most))


def _preparations(
    topology: Topology, teacher: TeacherConfig, method: Method, windows: Windows
) -> Iterator[Work]:
    """One request for each response that a rewritten prompt shows. NCQ shows up to all of a group,
    which no other kind exceeds; what two prompts of a question show is asked for once."""
    kinds = {one.preparation for one in method.reformulations} - {"none"}
    if teacher.compression != "teacher":
        return
    responses = topology.method.group_size
    for kind in sorted(kinds):
        requests = windows.reformulated * (responses if kind == "compress" else 1)
        each = _asking(topology) + teacher.compression_sampling.max_new_tokens
        name = "hint" if kind == "write_hint" else "compress"
        yield Work(kind=name, requests=requests, tokens=requests * each)


def _verdicts(topology: Topology, method: Method, windows: Windows) -> Work:
    """One request for each response, of the student and of the teachers."""
    if not teacher_grades(topology):
        return Work(kind=JUDGE, requests=0, tokens=0)
    cascade = topology.method.teacher_order == "cascade"
    drawn = _asked(method, windows) * topology.method.teacher_group_size
    responses = windows.groups * topology.method.group_size
    responses += drawn * (len(teachers(topology)) if cascade else 1)
    rubric = max((len(str(one.args.get("rubric", ""))) for one in topology.data.reward), default=0)
    each = _asking(topology) + rubric + JUDGE_SAMPLING.max_new_tokens
    return Work(kind=JUDGE, requests=responses, tokens=responses * each)


def _scores(topology: Topology, teacher: TeacherConfig, method: Method, windows: Windows) -> Work:
    """One request for each group in the loss, which has the student's responses or a teacher's."""
    if not method.needs_scores or teacher.scoring != "remote":
        return Work(kind="score", requests=0, tokens=0)
    student = topology.method.group_size * topology.student.sampling.max_new_tokens
    drawn = topology.method.teacher_group_size * teacher.sampling.max_new_tokens
    each = topology.data.max_prompt_tokens + max(student, drawn)
    return Work(kind="score", requests=windows.groups, tokens=windows.groups * each)


def _asking(topology: Topology) -> int:
    """The longest request about one response: the question and the response."""
    lengths = [one.model.sampling.max_new_tokens for one in teachers(topology)]
    longest = max(topology.student.sampling.max_new_tokens, *lengths)
    return topology.data.max_prompt_tokens + longest + WORDING_TOKENS
