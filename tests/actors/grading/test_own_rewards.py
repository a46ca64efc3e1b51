"""Rewards of the user's own, as a grading worker gives them: in this process where they behave, in
real workers where they do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from living import is_living

from zppo.algorithm.window import PLAIN, Group
from zppo.config.rewards import REWARD, RewardConfig, parts_of
from zppo.errors import UserError
from zppo.extensions import identity_of
from zppo.grading import together
from zppo_actors.grading.handle import GradeWorker, worker_command
from zppo_actors.grading.own import OwnOrder, OwnRewards
from zppo_protocol.values import TIMED_OUT, Grade, Prompt

FILE = '''
import asyncio, os, sys, time
from zppo.grading import Reward

def short(question, response, row, *, most=10):
    return max(-1.0, 1.0 - len(response) / most)

def full(question, response, row):
    return Reward(value=0.5, answer=response.split()[-1], parts={"words": len(response.split())},
                  note=f"{question} {row['level']} {row['answer']}")

def as_told(question, response, row):
    """Does what the response says."""
    if response == "raise":
        raise KeyError("no such column")
    if response == "sleep":
        time.sleep(600)
    while response == "burn":
        pass
    if response == "fork and return":
        os.fork()
    if response == "fork and stay" and os.fork() == 0:
        time.sleep(600)
    if response == "fork and burn":
        if os.fork() == 0:
            time.sleep(600)
        while True:
            pass
    if response == "print":
        for _ in range(256):
            sys.stdout.write("x" * 2**20)
            os.write(2, b"y" * 2**20)
    if response == "exit":
        sys.exit(0)
    if response == "delete":
        os.unlink(__file__)
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None,
            "large": 1e10, "true": True}.get(response, 0.25)

def whole(questions, responses, rows):
    return [row["scale"] * len(set(responses)) for row in rows]

def array(questions, responses, rows):
    import numpy as np
    return np.arange(float(len(responses)))

def writes(question, response, row):
    row["seen"].append(response)
    return float(len(row["seen"]))

async def leaves(question, response, row):
    if response == "exit":
        sys.exit(1)
    raise asyncio.CancelledError if response == "cancel" else Wordless if response else Base("no")

class Wordless(Exception):
    def __str__(self):
        raise ValueError

class Base(BaseException):
    pass

def says(question, response, row):
    half = "\\ud800"
    if response == "raise":
        raise ValueError(half)
    parts = {"many": {str(i): 1.0 for i in range(101)}, "none": None, "odd": {half: 1.0}}
    return Reward(value=1.0, answer=half, note=half, parts=parts.get(response, {}))

def too_few(questions, responses, rows):
    return [1.0]

async def waits(question, response, row):
    await asyncio.sleep(0)
    waits.together = getattr(waits, "together", 0) + 1
    await asyncio.sleep(0)
    if response == "raise":
        raise ConnectionError("refused")
    return waits.together
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


Grading = Callable[..., list[Grade]]


@pytest.fixture
def graded(file: Path) -> Grading:
    """Grades in this process: entries are (use, args); a name without a colon is built in."""

    def grade(
        entries: dict[str, dict], *responses: str, gold: str = "7", row: str = "{}"
    ) -> list[Grade]:
        own = OwnRewards(parts_of(configs(file, entries)), {})
        return own.grades("q?", responses, row, gold)

    return grade


def configs(file: Path, entries: dict[str, dict]) -> list[RewardConfig]:
    return [
        RewardConfig(
            use=use.replace("mine", str(file)),
            weight=arguments.get("weight"),
            args={name: value for name, value in arguments.items() if name != "weight"},
        )
        for use, arguments in entries.items()
    ]


def test_a_weighted_sum_of_what_is_built_in_and_what_is_own(graded: Grading) -> None:
    entries = {"math": {"weight": 0.7}, "mine:short": {"weight": 0.3, "most": 20}}
    assert graded(entries, r"so \boxed{7}", "seven") == [
        Grade(reward=0.82, answer="7", parts={"math": 1.0, "short": 0.4}, undecided=True),
        Grade(reward=0.225, note="no boxed answer", parts={"math": 0.0, "short": 0.75}),
    ]


def test_a_row_may_name_the_one_part_that_counts(file: Path) -> None:
    entries = {
        "math": {"weight": 0.7},
        "mine:short": {"weight": 0.1, "most": 20},
        "rubric": {"weight": 0.2, "rubric": "Be kind."},
    }
    own = OwnRewards(parts_of(configs(file, entries)), {})
    [grade] = own.grades("q?", ["seven"], "{}", "7", "short")
    assert grade == Grade(reward=0.75, parts={"short": 0.75})
    [grade] = own.grades("q?", [r"\boxed{7}"], "{}", "7", "rubric")
    assert grade == Grade(reward=0.0, answer="7")


def test_a_reward_sees_question_response_and_columns_and_may_say_more(graded: Grading) -> None:
    [grade] = graded({"mine:full": {}}, "it is 9", row='{"level": 3}')
    parts = {"full": 0.5, "full/words": 3.0}
    assert grade == Grade(reward=0.5, answer="9", parts=parts, note="q? 3 7")


def test_a_sum_that_no_message_can_carry_fails(graded: Grading) -> None:
    [grade] = graded({"mine:whole": {"weight": 1e6}}, "a", row='{"scale": 1e5}')
    assert grade.failed
    assert grade.note == "the rewards add up to 1e+11; expected at most 1e+09"


def test_equal_shares_of_full_marks_are_one(graded: Grading) -> None:
    entries = {"math": {}, "exact": {}, "format": {"pattern": ".*7.*"}}
    [grade] = graded(entries, r"\boxed{7}")
    assert grade.reward == 1.0


@pytest.mark.parametrize(
    ("response", "note"),
    [
        ("raise", "raised KeyError: 'no such column'"),
        ("nan", "returned nan as a reward; expected a finite number, at most 1e+09"),
        ("inf", "returned inf as a reward; expected a finite number, at most 1e+09"),
        ("large", "returned 1e+10 as a reward; expected a finite number, at most 1e+09"),
        ("text", "returned '1.0' as a reward; expected a number"),
        ("none", "returned None as a reward; expected a number"),
    ],
)
def test_what_is_no_reward_fails_its_response_alone(
    graded: Grading, file: Path, response: str, note: str
) -> None:
    bad, good = graded({"mine:as_told": {}}, response, r"\boxed{7}")
    said = f"the reward '{file}:as_told' {note}"
    assert bad == Grade(reward=0.0, note=said, failed=True)
    assert good == Grade(reward=0.25, answer="7", parts={"as_told": 0.25})


def test_a_batch_is_asked_once_for_all_responses(graded: Grading, file: Path) -> None:
    assert [g.reward for g in graded({"mine:whole": {}}, "a", "b", "a", row='{"scale": 2}')] == [
        4.0
    ] * 3
    failed = graded({"mine:too_few": {}}, "a", "b", "a")
    note = f"the reward '{file}:too_few' returned 1 reward; expected 3, one per response"
    assert failed == [Grade(reward=0.0, note=note, failed=True)] * 3


def test_a_batch_may_return_an_array(graded: Grading) -> None:
    assert [g.reward for g in graded({"mine:array": {}}, "a", "b", "a")] == [0.0, 1.0, 2.0]


def test_what_a_reward_writes_into_a_row_reaches_no_other_response(graded: Grading) -> None:
    grades = graded({"mine:writes": {}}, "a", "b", "c", row='{"seen": []}')
    assert [grade.reward for grade in grades] == [1.0, 1.0, 1.0]


def test_a_coroutine_that_leaves_fails_alone(graded: Grading, file: Path) -> None:
    said = [g.note for g in graded({"mine:leaves": {}}, "exit", "cancel", "wordless", "")]
    raised = ["SystemExit: 1", "CancelledError: ", "Wordless: ", "Base: no"]
    assert said == [f"the reward '{file}:leaves' raised {one}" for one in raised]


def test_whatever_a_reward_says_can_be_sent(graded: Grading, file: Path) -> None:
    grades = graded({"mine:says": {}}, "", "raise", "many", "none", "odd")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(grades), type=list[Grade]) == grades
    assert grades[0] == Grade(reward=1.0, answer="?", note="?", parts={"says": 1.0})
    assert [grade.note.removeprefix(f"the reward '{file}:says' ") for grade in grades[1:]] == [
        "raised ValueError: ?",
        "returned 101 parts; expected a dictionary of at most 100",
        "returned the parts None; expected a dictionary of at most 100",
        r"named a part '\ud800'; expected 1 to 100 printable characters",
    ]


def test_coroutines_wait_together_and_fail_alone(graded: Grading, file: Path) -> None:
    first, bad, last = graded({"mine:waits": {}}, "a", "raise", "b")
    assert (first.reward, last.reward) == (3.0, 3.0)  # all were asked before any had its answer
    assert bad.note == f"the reward '{file}:waits' raised ConnectionError: refused" and bad.failed


def test_answers_without_a_box(graded: Grading, file: Path) -> None:
    file.write_text("def last(response):\n    return response.split()[-1] if response else None\n")
    for args in ({"pattern": r"Answer:\s*(\S+)"}, {"extractor": f"{file}:last"}):
        right, wrong, none = graded({"math": args}, "Answer: 3 Answer: 7.0", "Answer: 8", "")
        assert (right.reward, right.answer) == (1.0, "7.0")
        assert (wrong.reward, wrong.answer) == (0.0, "8")
        assert (none.reward, none.note) == (0.0, "no answer found")


def test_length_and_format(graded: Grading) -> None:
    entries = {"length": {"free": 4, "limit": 8}}
    assert [g.reward for g in graded(entries, "ab", "abcdef", "a" * 99)] == [0.0, -0.5, -1.0]
    entries = {"format": {"pattern": "<think>.*</think>.*"}}
    assert [g.reward for g in graded(entries, "<think>\n</think> 7\n", "7")] == [1.0, 0.0]


@pytest.mark.slow
def test_code_passes_if_its_tests_run_to_their_end(graded: Grading) -> None:
    row = '{"tests": "assert double(3) == 6"}'
    right = [
        "def double(x):\n    return 2 * x",
        "import os; assert os.listdir() == ['program.py'] and len(os.environ) < 6\n"
        "def double(x): return 6",
    ]
    wrong = [
        "def double(x):\n    return x",
        "import sys; sys.exit(0)",
        "x = bytearray(2**31)",
        "open('large', 'wb').write(bytes(2**26))",
    ]
    endless = ["while True: pass", "import time; time.sleep(600)"]
    for programs, seconds, reward in (
        (right, 300.0, 1.0),
        (wrong, 300.0, 0.0),
        (endless, 1.0, 0.0),
    ):
        responses = [f"Here:\n```python\n{program}\n```\n" for program in programs]
        limits = {"seconds": seconds, "memory_mib": 512}
        grades = graded({"code": limits}, *responses, row=row)
        assert [grade.reward for grade in grades] == [reward] * len(programs), grades
    [none] = graded({"code": {}}, "no block", row=row)
    assert (none.reward, none.note) == (0.0, "no program")
    [failed] = graded({"code": {}}, responses[0])
    assert failed.note == "the reward 'code' found no text in the column 'tests' of the row"


def test_the_part_of_the_teacher_is_added_later(file: Path) -> None:
    parts = parts_of(
        configs(file, {"rubric": {"weight": 0.5, "rubric": "Be kind."}, "exact": {"weight": 2.0}})
    )
    [local] = OwnRewards(parts, {}).grades("q?", [r"\boxed{7}"], "", "7")
    assert local == Grade(reward=0.0, answer="7", parts={"exact": 1.0})
    grade = together(parts, local, parts[0], Grade(reward=0.25))
    parts_of_it = {"exact": 1.0, "rubric": 0.25}
    assert grade == Grade(reward=2.125, answer="7", parts=parts_of_it, undecided=True)
    failed = together(parts, local, parts[0], Grade(reward=0.0, note="silent", failed=True))
    assert (failed.failed, failed.reward, failed.note) == (True, 0.0, "silent")


def test_a_right_answer_that_earns_too_little_is_no_wrong_candidate(file: Path) -> None:
    rule = {"exact": {"weight": 0.5}, "format": {"weight": 0.5, "pattern": "So .*"}}
    parts = parts_of(configs(file, rule))
    texts = [r"So \boxed{7}", r"\boxed{7}", r"So \boxed{8}", r"\boxed{8}"]
    grades = OwnRewards(parts, {}).grades("q?", texts, "", "7")
    group = Group(id="g", kind=PLAIN, prompt=Prompt(messages=[]), grades=grades)
    assert [grade.reward for grade in group.the_grades] == [1.0, 0.5, 0.5, 0.0]
    assert group.indices(correct=False) == [1, 2, 3]
    assert group.found_wrong() == [2, 3]
    judged = parts_of(configs(file, {"format": {"pattern": "So .*"}, "judge": {}}))
    [local] = OwnRewards(judged, {}).grades("q?", ["7"], "", "seven")
    assert together(judged, local, judged[1], Grade(reward=1.0)).undecided
    assert not together(judged, local, judged[1], Grade(reward=0.0)).undecided


def test_code_that_has_changed_since_the_run_began_is_refused(file: Path) -> None:
    entries = configs(file, {"mine:short": {}})
    use = entries[0].use
    before = {use: identity_of("", use, "reward")}
    OwnRewards(parts_of(entries), before)
    file.write_text(FILE + "\n")
    with pytest.raises(UserError) as caught:
        OwnRewards(parts_of(entries), before)
    assert str(caught.value) == (
        f"data.reward[0].use: the code of {use!r} has changed since the run began; put the old "
        "code back and resume, or begin a new run"
    )


# ---- in real workers -----------------------------------------------------------------------------


@pytest.fixture
def worker(file: Path) -> Iterator[GradeWorker]:
    order = OwnOrder(entries=configs(file, {"mine:as_told": {}}))
    worker = GradeWorker(1.0, worker_command(rewards=order))
    yield worker
    worker.close()


def living_children(worker: GradeWorker) -> list[psutil.Process]:
    return [child for child in psutil.Process(worker.pid).children() if is_living(child)]


def ask(worker: GradeWorker, response: str) -> Grade:
    return worker.grade(response, "7", REWARD, "q?", "{}")


@pytest.mark.slow
def test_whatever_a_reward_does_every_response_gets_one_grade(
    worker: GradeWorker, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker after the other: what it does costs its own response, and nothing else."""
    caplog.set_level(logging.INFO, "zppo.grader")
    fine = Grade(reward=0.25, parts={"as_told": 0.25})
    timed_out = Grade(reward=0.0, note=TIMED_OUT, failed=True)
    assert ask(worker, "fine") == fine
    assert ask(worker, "sleep") == timed_out
    assert ask(worker, "exit").note == f"the reward '{file}:as_told' raised SystemExit: 0"
    assert ask(worker, "fork and return") == fine
    assert ask(worker, "fork and stay") == fine
    while len(living := living_children(worker)) > 1:  # the fork that returned ends by itself
        pass
    [child] = living
    assert ask(worker, "fork and burn") == timed_out
    child.wait(600)
    assert ask(worker, "fine") == fine
    assert [ask(worker, text).failed for text in ("nan", "text", "raise")] == [True] * 3
    assert ask(worker, "delete") == fine
    assert not file.exists()
    assert ask(worker, "fine") == fine
    with pytest.raises(UserError) as caught:
        ask(worker, "burn")
        ask(worker, "fine")
    assert str(caught.value) == f"data.reward[0].use: there is no file '{file}'"


@pytest.mark.slow
def test_what_a_reward_prints_is_bounded(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zppo.grader")
    order = OwnOrder(entries=configs(file, {"mine:as_told": {}}))
    worker = GradeWorker(60.0, worker_command(rewards=order))
    assert ask(worker, "print").reward == 0.25
    worker.close()
    [said] = [record.getMessage() for record in caplog.records if "printed" in record.getMessage()]
    assert "(the first of 536870912 bytes)" in said and len(said) < 5000


@pytest.mark.slow
def test_a_reward_of_whole_groups_is_asked_for_groups(file: Path) -> None:
    order = OwnOrder(entries=configs(file, {"mine:whole": {}}))
    worker = GradeWorker(5.0, worker_command(rewards=order))
    while not worker.ready:
        worker.poll(1.0)
    assert worker.whole_groups
    worker.submit(["a", "b", "a"], "7", REWARD, "q?", '{"scale": 1}')
    while (grades := worker.poll(1.0)) is None:
        pass
    worker.close()
    assert [grade.reward for grade in grades] == [2.0] * 3
