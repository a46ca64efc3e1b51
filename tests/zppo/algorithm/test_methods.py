"""Methods as values, and what each asks of the teacher: whom, when, and what happens when it
cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
from msgspec import structs
from worlds import Fake, World, questions, scores, topology

import zppo.algorithm.methods
from zppo.algorithm.composition import (
    correct_teacher_responses,
    student_groups,
    with_teacher_response,
)
from zppo.algorithm.methods import Method, get_method, method_names
from zppo.config.topology import ActorConfig, TeacherConfig
from zppo.errors import UserError
from zppo.records.metrics import window_metrics
from zppo.scheduling import events
from zppo.scheduling.dispatch import Assignment
from zppo.scheduling.scheduler import RunFailure
from zppo.scheduling.state import SchedulerState
from zppo.scheduling.waiting import waiting
from zppo_protocol import codec
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores

MOST_LINES = 60
WORDS = ("grpo", "zppo", "hint", "prefix")
"""Names of methods that mean something else as well."""


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_one_short_file_named_like_it(name: str) -> None:
    path = Path(zppo.algorithm.methods.__file__).parent / f"{name}.py"
    assert len(path.read_text().splitlines()) <= MOST_LINES
    method = get_method(name)
    assert method.name == name and method.title and method.summary


def test_titles_tell_methods_apart() -> None:
    assert len({get_method(name).title for name in method_names()}) == len(method_names()) == 13


def test_no_module_but_its_own_names_a_method() -> None:
    """Scheduler, trainer and actors read a method's values; the default of the topology is the one
    exception."""
    root = Path(zppo.algorithm.methods.__file__).parents[1]
    files = [
        *root.glob("*.py"),
        *root.glob("training/*.py"),
        *(root.parent / "actors").rglob("*.py"),
    ]
    distinct = [name for name in method_names() if name not in WORDS]
    named = {
        path.name: name for path in files for name in distinct if f'"{name}"' in path.read_text()
    }
    assert not named


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grpo", (False, "none", [], student_groups, False, "clipped_surrogate", None)),
        ("grpo_replay", (True, "none", [], student_groups, False, "clipped_surrogate", None)),
        (
            "grpo_both",
            (False, "hard", ["bcq", "ncq"], student_groups, False, "clipped_surrogate", None),
        ),
        (
            "grpo_replay_bcq",
            (True, "hard", ["bcq"], student_groups, False, "clipped_surrogate", None),
        ),
        (
            "grpo_replay_ncq",
            (True, "none", ["ncq"], student_groups, False, "clipped_surrogate", None),
        ),
        ("zppo", (True, "hard", ["bcq", "ncq"], student_groups, False, "clipped_surrogate", None)),
        (
            "grpo_replay_teacher_response",
            (True, "hard", [], with_teacher_response, True, "clipped_surrogate", None),
        ),
        ("hint", (True, "selected", ["hint"], student_groups, False, "clipped_surrogate", None)),
        (
            "prefix",
            (True, "selected", ["prefix"], student_groups, False, "clipped_surrogate", None),
        ),
        ("off_distill", (False, "all", [], correct_teacher_responses, True, "jsd", 1)),
        ("off_distill_replay", (True, "all", [], correct_teacher_responses, True, "jsd", 1)),
        ("on_distill", (False, "none", [], student_groups, False, "jsd", 1)),
        ("on_distill_replay", (True, "none", [], student_groups, False, "jsd", 1)),
    ],
)
def test_methods_differ_only_by_their_values(name: str, values: tuple[object, ...]) -> None:
    m = get_method(name)
    kinds = [r.kind for r in m.reformulations]
    assert (
        m.replay,
        m.teacher_draws,
        kinds,
        m.composer,
        m.teacher_tokens,
        m.loss,
        m.updates_per_step,
    ) == values


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("grpo", (False, False, False, False)),
        ("grpo_replay_ncq", (False, True, False, False)),
        ("zppo", (True, True, False, False)),
        ("grpo_replay_teacher_response", (True, True, False, True)),
        ("off_distill", (True, True, True, True)),
        ("on_distill", (True, False, True, True)),
    ],
)
def test_what_follows_from_the_values(method: str, needs: tuple[bool, ...]) -> None:
    m: Method = get_method(method)
    assert (m.needs_teacher, m.asks_teacher, m.needs_scores, m.needs_same_vocabulary) == needs


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        get_method("of_distil")
    assert (
        str(caught.value)
        == "method.name: there is no method 'of_distil' (did you mean 'off_distill'?); or name "
        "package.module:name or ./file.py:name"
    )


# ---- whom and when the teacher is asked ----------------------------------------------------------


def world(name: str, hard: set[str], *, count: int = 4, **sections: dict[str, Any]) -> World:
    """One window of `count` questions; those in `hard` are answered wrong, the teacher is always
    right."""
    config = topology(
        method={
            "name": name,
            "group_size": 2,
            "teacher_group_size": 2,
            **sections.pop("method", {}),
        },
        scheduler={
            "new_questions": count,
            "rho_aug": 0.5,
            "max_staleness": 0,
            **sections.pop("scheduler", {}),
        },
        **sections,
    )

    def rewards(group_id: str, n: int) -> list[float]:
        _, question, kind = group_id.split("/")
        return [float(kind == "teacher" or question not in hard)] * n

    return World(config, questions(count), seed=0, rewards=rewards)


def asked(assignments: list[Assignment], kind: str) -> set[str]:
    messages = [a.job.message for a in assignments]
    return {
        m.task_id.split("/")[1] for m in messages if isinstance(m, GenerateTask) and m.kind == kind
    }


def play(world: World, enough: Callable[[], bool]) -> None:
    """Play on until something has happened."""
    for _ in range(10_000):
        if enough():
            return
        world.turn()
    raise AssertionError(f"it does not happen: {waiting(world.scheduler)}")


def until(world: World, kind: str) -> set[str]:
    """Play until the first task of that kind is handed out; the questions whose plain groups are
    graded by then."""
    play(world, lambda: any(kind in task.split("/") for task in world.dispatched))
    [window] = world.scheduler.windows.values()
    return {v.question.id for v in window.visits if v.plain.done}


def test_off_distillation_asks_about_every_question_at_once() -> None:
    played = world("off_distill", {"q0"})
    assert len(asked(played.assignments(0.0), "teacher")) == 2, (
        "as many as the teacher has room for"
    )
    played = world("off_distill", {"q0"}).run()
    assert sorted(t for t in played.dispatched if t.endswith("/teacher")) == [
        f"0/q{i}/teacher" for i in range(4)
    ]


def test_zppo_asks_about_a_hard_question_as_soon_as_it_is_known() -> None:
    done = until(world("zppo", {"q0", "q1", "q2", "q3"}), "teacher")
    assert len(done) < 4


@pytest.mark.parametrize("name", ["hint", "prefix"])
def test_hint_and_prefix_choose_among_all_before_they_ask(name: str) -> None:
    played = world(name, {"q0", "q2", "q3"})
    assert until(played, "teacher") == {"q0", "q1", "q2", "q3"}
    played.run()
    chosen = [v.question.id for v in played.steps[0].window.visits if v.selected]
    order = [v.question.id for v in played.steps[0].window.visits if v.question.id != "q1"]
    assert chosen == order[:2], "equal accuracies keep the order of the window"
    assert {t.split("/")[1] for t in played.dispatched if t.endswith("/teacher")} == set(chosen)


@pytest.mark.parametrize("compression", ["teacher", "rule"])
def test_a_hint_group_reads_one_hint_without_the_answer(compression: str) -> None:
    played = world("hint", {"q0", "q2"}, teacher={"compression": compression}).run()
    [first, second] = [g for g in played.steps[0].window.student_groups() if g.kind == "hint"]
    for group in (first, second):
        [hint] = re.findall(r"<hint>\n(.*)\n</hint>", group.prompt.messages[-1].content, re.DOTALL)
        assert "boxed" not in hint and hint.strip("…")
    assert any("/write_hint/" in task for task in played.dispatched) == (compression == "teacher")


@pytest.mark.parametrize(
    ("reason", "writer", "share"), [("stop", "teacher", 0.0), ("length", "rule", 1.0)]
)
def test_a_reply_that_was_cut_off_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, reason: str, writer: str, share: float
) -> None:
    """It may be a thought, with the right answer in it, that had not come to its end."""
    played = world("zppo", {"q0", "q2"})
    answer = worlds.samples

    def compress(task: GenerateTask, versions: list[int]) -> GroupSamples:
        drawn = answer(task, versions)
        if task.kind != "compress":
            return drawn
        candidate = task.prompt.messages[-1].content
        box = re.findall(r"\\boxed\{[^}]*\}", candidate)
        written = f"in short, {box[-2]}" if len(box) > 1 else "in short"
        return structs.replace(drawn, texts=[written], finish_reasons=[reason])

    monkeypatch.setattr(worlds, "samples", compress)
    window = played.run().steps[0].window
    candidates = [c for visit in window.visits for r in visit.reformulations for c in r.candidates]
    assert candidates and {c.writer for c in candidates} == {writer}
    shown = [g.prompt.messages[-1].content for g in window.student_groups() if g.kind != "plain"]
    assert all(("in short" in text) == (writer == "teacher") for text in shown)
    assert window_metrics(window, 0)["compression/by_rule"] == share


@pytest.mark.parametrize(
    ("engine", "given", "said"),
    [
        ("transformers", None, {"enable_thinking": False, "effort": "low"}),
        ("openai", None, {"effort": "low"}),
        ("openai", {"enable_thinking": False}, {"enable_thinking": False}),
        ("transformers", {}, {}),
    ],
)
def test_templates_are_told_what_the_settings_say(
    engine: str, given: dict[str, bool] | None, said: dict[str, object]
) -> None:
    base = topology(
        method={"name": "zppo", "group_size": 2, "teacher_group_size": 2},
        scheduler={"new_questions": 4, "rho_aug": 1.0},
    )
    teacher = TeacherConfig(
        model="t", chat_template_kwargs={"effort": "low"}, compression_chat_template_kwargs=given
    )
    student = structs.replace(base.student, chat_template_kwargs={"style": 1})
    actors = structs.replace(base.actors, teacher=ActorConfig(engine=engine))
    config = structs.replace(base, teacher=teacher, student=student, actors=actors)
    played = World(config, questions(4), seed=0, rewards=lambda g, n: [float("teacher" in g)] * n)
    told: dict[str, list[object]] = {}
    receive = played.receive

    def watch(assignment: Assignment) -> None:
        message = assignment.job.message
        if isinstance(message, GenerateTask):
            told.setdefault(message.kind, []).append(message.prompt.chat_template_kwargs)
        receive(assignment)

    played.receive = watch  # type: ignore[method-assign]
    played.run()
    assert {kind: variables[0] for kind, variables in told.items()} == {
        "plain": {"style": 1}, "bcq": {"style": 1}, "ncq": {"style": 1},
        "teacher": {"effort": "low"}, "compress": said,
    }  # fmt: skip
    assert all(one == variables[0] for variables in told.values() for one in variables)


@pytest.mark.parametrize(("largest", "count"), [(None, 1), (0.5, 2), (1.0, 3)])
def test_the_adaptive_cap_follows_the_hard_questions(largest: float | None, count: int) -> None:
    scheduler = {"rho_aug": 0.25, "rho_aug_max": largest}
    played = world("grpo_replay_bcq", {"q0", "q1", "q2"}, scheduler=scheduler).run()
    assert sum(len(v.reformulations) for v in played.steps[0].window.visits) == count


def test_dynamic_sampling_drops_what_came_back_all_same_from_the_loss_alone() -> None:
    played = world("grpo_replay", {"q0"}, method={"dynamic_sampling": True}).run()
    assert [sent.groups for sent in played.sent] == [[]]
    assert [e.question.id for e in played.scheduler.buffer.entries()] == ["q0"]


def test_dynamic_sampling_keeps_a_question_whose_bcq_helps() -> None:
    config = topology(
        method={"name": "zppo", "group_size": 2, "dynamic_sampling": True},
        scheduler={"new_questions": 2, "rho_aug": 1.0, "max_staleness": 0},
    )
    answers = {"0/q0/plain": [0.0, 0.0], "0/q0/bcq": [1.0, 0.0], "0/q0/ncq": [0.0, 0.0]}
    played = World(
        config, questions(2), seed=0, rewards=lambda group, n: answers.get(group, [1.0] * n)
    ).run()
    assert [g.group_id for g in played.sent[0].groups] == list(answers), (
        "and q1, all right, is left out"
    )


@pytest.mark.parametrize("truncated", ["count", "zero", "mask"])
@pytest.mark.parametrize("grader", ["math", "judge"])
def test_what_a_cut_off_response_earns(
    truncated: str, grader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worlds.samples

    def cut_off(task: GenerateTask, versions: list[int]) -> GroupSamples:
        """Every second response hits the limit."""
        drawn = whole(task, versions)
        reasons: Any = ["length" if index % 2 else "stop" for index in range(task.n)]
        return structs.replace(drawn, finish_reasons=reasons)

    monkeypatch.setattr(worlds, "samples", cut_off)
    config = topology(
        method={
            "name": "grpo_replay_teacher_response",
            "group_size": 4,
            "truncated": truncated,
            "hard_threshold": 0.6,
        },
        scheduler={"new_questions": 2, "max_staleness": 0},
    )
    corpus = [structs.replace(q, grader=grader, answer="gold") for q in questions(2)]
    played = World(config, corpus, seed=0, rewards=lambda group, n: [1.0] * n).run()
    expected = [1.0, 0.0, 1.0, 0.0] if truncated == "zero" else [1.0] * 4
    for visit in played.steps[0].window.visits:
        assert visit.plain.rewards.tolist() == expected
        if visit.teacher is not None:
            assert set(visit.teacher.rewards.tolist()) == {1.0}, (
                "only the student's responses can be zero"
            )
    assert (played.steps[0].window.hard_questions == 0) or truncated == "zero"


# ---- remote scores -------------------------------------------------------------------------------


def remote(name: str) -> World:
    return world(
        name,
        {"q0", "q1"},
        teacher={"scoring": "remote", "score_top_k": 3},
        student={"sampling": SAMPLING},
    )


SAMPLING = {"max_new_tokens": 8, "temperature": 0.7}


@pytest.mark.parametrize("name", ["on_distill", "off_distill_replay"])
def test_a_score_task_asks_for_the_tokens_that_are_trained(name: str) -> None:
    played = remote(name)
    tasks: dict[str, ScoreTask] = {}
    receive = played.receive

    def watch(assignment: Assignment) -> None:
        message = assignment.job.message
        if isinstance(message, ScoreTask):
            assert assignment.job.cost == message.n and assignment.job.pool == "teacher"
            tasks[message.task_id] = message
        receive(assignment)

    played.receive = watch  # type: ignore[method-assign]
    played.run()
    groups = played.sent[0].groups
    assert len(groups) == len(tasks) == 4
    for group in groups:
        task = tasks[f"{group.group_id}/score"]
        for field in ("prompt_ids", "token_ids", "offsets"):
            assert getattr(task, field).tolist() == getattr(group.samples, field).tolist()
        assert (task.top_k, task.temperature) == (3, 0.7)
        assert group.scores is not None
        assert group.scores.token_ids.tolist() == scores(task).token_ids.tolist()


def test_scores_are_asked_for_only_when_the_teacher_is_remote() -> None:
    played = world("on_distill", set()).run()
    assert not any(task.endswith("/score") for task in played.dispatched)
    assert all(group.scores is None for group in played.sent[0].groups)


def restore(played: World) -> None:
    """Go on with another scheduler from the state of the world's own, and with new actors."""
    data = codec.dumps(played.scheduler.state())
    played.scheduler = played.build(codec.loads(data, SchedulerState))
    played.actors = {}
    for pool in ("rollout", "teacher", "grader"):
        played.join(Fake(f"{pool}-9", pool, pool, 100))


@pytest.mark.parametrize("name", ["on_distill", "off_distill"])
def test_a_resumed_run_asks_again_only_for_the_scores_that_it_lacks(name: str) -> None:
    played = remote(name)
    play(
        played,
        lambda: (
            sum(len(v.scores) for w in played.scheduler.windows.values() for v in w.visits) == 2
        ),
    )
    have = {name for v in played.scheduler.windows[0].visits for name in v.scores}
    restore(played)
    tasks = {a.job.id for a in played.assignments(played.now)}
    group = "plain" if name == "on_distill" else "teacher"
    assert tasks == {f"0/q{i}/{group}/score" for i in range(4)} - {f"{done}/score" for done in have}
    assert len(tasks) == 2


@pytest.mark.parametrize("name", ["on_distill", "off_distill"])
@pytest.mark.parametrize("retryable", [False, True])
def test_a_score_that_cannot_be_had_ends_the_run_naming_the_task(
    name: str, retryable: bool
) -> None:
    played = remote(name)
    finish = played.finish

    def fail(actor: Fake, task_id: str) -> None:
        if not task_id.endswith("/score"):
            finish(actor, task_id)
            return
        played.fail(actor, task_id, "no such token", retryable=retryable)

    played.finish = fail  # type: ignore[method-assign]
    with pytest.raises(RunFailure, match=r"task 0/q\d/\w+/score cannot be done: no such token"):
        played.run()


def test_a_score_with_too_few_tokens_is_a_failed_try() -> None:
    played = remote("on_distill")
    play(played, lambda: any(task.endswith("/score") for task in played.actors["teacher-0"].held))
    actor = played.actors["teacher-0"]
    [task_id, *_] = [task for task in actor.held if task.endswith("/score")]
    message = actor.held[task_id].job.message
    assert isinstance(message, ScoreTask)
    answer = played.answer(actor, message, [])
    assert isinstance(answer, events.Scored)
    short = TokenScores(
        token_ids=answer.scores.token_ids[1:], log_probs=answer.scores.log_probs[1:]
    )
    assert not played.accepts(structs.replace(answer, scores=short))
    assert played.scheduler.dispatcher.attempts(task_id) == 1


# ---- without the teacher -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lost", "kinds"),
    [
        ("off_distill", "teacher", set()),
        ("grpo_replay_teacher_response", "teacher", {"plain"}),
        ("hint", "teacher", {"plain"}),
        ("hint", "write_hint", {"plain", "hint"}),
        ("hint", "hint", {"plain"}),
        ("prefix", "prefix", {"plain"}),
    ],
)
def test_what_is_left_when_a_task_cannot_be_done(name: str, lost: str, kinds: set[str]) -> None:
    played = world(name, {"q0", "q2"})
    finish = played.finish

    def fail(actor: Fake, task_id: str) -> None:
        if task_id.split("/")[2] != lost or task_id.endswith("/grade"):
            finish(actor, task_id)
            return
        played.fail(actor, task_id, "too long", retryable=False)

    played.finish = fail  # type: ignore[method-assign]
    played.run()
    assert {group.kind for sent in played.sent for group in sent.groups} == kinds
