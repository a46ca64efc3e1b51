"""The candidate audit on windows whose every reply is written down here, and against a walk over
replies."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.algorithm.window import Candidate, Group, Reformulation, Visit, Window
from zppo.data.question import Question
from zppo.records.candidate_audit import audit
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Grade, Prompt

GOLD = "5"
Reply = str | None


def group(name: str, kind: str, replies: Sequence[Reply], prompt: int = 4) -> Group:
    """A group with these final answers; the prompt has `prompt` tokens."""
    samples = GroupSamples(
        prompt_ids=np.zeros(prompt, np.int32),
        token_ids=np.zeros(len(replies), np.int32),
        log_probs=np.zeros(len(replies), np.float32),
        offsets=np.arange(len(replies) + 1, dtype=np.int32),
        version_spans=np.array([[len(replies), 0]], np.int32),
        texts=[""] * len(replies),
        finish_reasons=["stop"] * len(replies),
    )
    grades = [
        Grade(reward=float(reply is not None and reply.strip() == GOLD), answer=reply)
        for reply in replies
    ]
    return Group(id=name, kind=kind, prompt=Prompt(messages=[]), samples=samples, grades=grades)


def candidate(answer: str | None) -> Candidate:
    correct = answer == GOLD
    source: Literal["teacher", "student"] = "teacher" if correct else "student"
    return Candidate(source=source, index=0, text="", answer=answer, correct=correct)


def visit(
    kind: str, candidates: Sequence[str | None], replies: Sequence[Reply], length: int = 4
) -> Visit:
    shown = [candidate(answer) for answer in candidates]
    rewritten = Reformulation(kind=kind, candidates=shown, group=group("g", kind, replies))
    return Visit(
        question=Question(id="q", text="q", answer=GOLD),
        origin="new",
        plain=group("p", "plain", ["1", "2"], length),
        reformulations=[rewritten],
    )


def audited(*visits: Visit) -> dict[str, float]:
    return audit(Window(index=0, visits=list(visits)))


def test_only_mixed_groups_count_as_mixed_and_silence_is_no_agreement() -> None:
    shares = audited(
        visit("bcq", ["5", "7"], ["5", "7"]),
        visit("bcq", ["5", "7"], ["7", "7"]),
        visit("bcq", ["5", "7"], ["5", " 5"]),
        visit("bcq", ["5", "7"], [None, None]),
    )
    assert shares["audit/bcq/mixed"] == 1 / 4
    assert shares["audit/bcq/unanimous"] == 2 / 4
    assert (shares["audit/plain/mixed"], shares["audit/plain/unanimous"]) == (0.0, 0.0)


def test_a_reply_whose_reward_failed_is_left_out_of_all_of_it() -> None:
    one = visit("bcq", ["5", "7"], ["5", "5", "7"])
    two = visit("bcq", ["5", "7"], ["5", "7"])
    for shown, failed in ((one, [2]), (two, [0, 1])):
        group = shown.reformulations[0].group
        assert group is not None
        grades = [
            msgspec.structs.replace(grade, failed=index in failed)
            for index, grade in enumerate(group.the_grades)
        ]
        group.grades = grades
    assert audited(one)["audit/bcq/mixed"] == 0.0
    assert audited(one)["audit/bcq/unanimous"] == 1.0
    assert audited(one)["audit/bcq/right_repeats"] == 1.0
    assert "audit/bcq/wrong_repeats" not in audited(one)
    assert audited(two)["audit/bcq/mixed"] == audited(two)["audit/bcq/unanimous"] == 0.0


def test_replies_that_repeat_a_candidate() -> None:
    shares = audited(
        visit("bcq", ["7", "5"], ["5", "5", "7", "8", None]),
        visit("ncq", ["7", "9", "7"], ["7", "9", "5", "8"]),
    )
    assert shares["audit/bcq/right_repeats"] == 1.0
    assert shares["audit/bcq/wrong_repeats"] == pytest.approx(1 / 3)
    assert shares["audit/ncq/wrong_repeats"] == pytest.approx(2 / 3)
    assert shares["audit/ncq/listed_repeats"] == 2 / 4
    assert "audit/bcq/listed_repeats" not in shares and "audit/ncq/right_repeats" not in shares


def test_a_prompt_whose_candidates_have_no_answer_lists_nothing_to_repeat() -> None:
    cut_off = visit("ncq", [None, None], ["7", "9"])
    assert "audit/ncq/listed_repeats" not in audited(cut_off)
    shares = audited(cut_off, visit("ncq", ["7", None], ["7", "9"]))
    assert shares["audit/ncq/listed_repeats"] == 1 / 2


def test_the_slot_that_is_picked() -> None:
    shares = audited(
        visit("bcq", ["5", "7"], ["5", "5", "7", "8"], length=3),
        visit("bcq", ["7", "5"], ["7", "7", "7", "5"], length=9),
    )
    assert shares["audit/bcq/picked_first"] == pytest.approx(5 / 7)
    assert shares["audit/bcq/picked_first_right_first"] == pytest.approx(2 / 3)
    assert shares["audit/bcq/picked_first_right_second"] == 3 / 4
    assert shares["audit/bcq/picked_first_short"] == pytest.approx(2 / 3)
    assert shares["audit/bcq/picked_first_long"] == 3 / 4
    assert shares["audit/bcq/accuracy_right_first"] == 2 / 4
    assert shares["audit/bcq/accuracy_right_second"] == 1 / 4


def test_questions_of_two_lengths_are_told_apart_whatever_their_numbers() -> None:
    few = visit("bcq", ["5", "7"], ["5"], length=6)
    many = [visit("bcq", ["5", "7"], ["7"], length=8) for _ in range(9)]
    shares = audited(few, *many)
    assert shares["audit/bcq/picked_first_short"] == 1.0
    assert shares["audit/bcq/picked_first_long"] == 0.0


def test_prompts_that_are_no_pair_have_no_slots() -> None:
    shares = audited(
        visit("hint", ["5"], ["5", "7"]),
        visit("ncq", ["7", "9"], ["7", "9"]),
        visit("bcq", [None, "5"], ["5", None]),
    )
    slots = [name for name in shares if "first" in name and not name.startswith("audit/bcq")]
    assert slots == []
    assert shares["audit/hint/right_repeats"] == 1.0
    assert shares["audit/bcq/picked_first"] == 0.0, "a reply without an answer picks nothing"


def test_a_group_that_was_given_up_is_left_out() -> None:
    one = visit("bcq", ["5", "7"], ["5"])
    one.reformulations[0].group = None
    assert audited(one).keys() == {"audit/plain/mixed", "audit/plain/unanimous"}


answers = st.sampled_from(["5", "7", "8", None])
visits = st.lists(
    st.tuples(st.booleans(), st.lists(answers, min_size=1, max_size=5), st.integers(1, 3)),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(visits)
def test_picks_agree_with_a_walk_over_every_reply(
    drawn: list[tuple[bool, list[Reply], int]],
) -> None:
    shares = audited(
        *(
            visit("bcq", ["5", "7"] if right_first else ["7", "5"], replies, length)
            for right_first, replies, length in drawn
        )
    )
    middle = fmean(length for _, _, length in drawn)
    first: dict[str, list[bool]] = {}
    for right_first, replies, length in drawn:
        for reply in replies:
            if reply in ("5", "7"):
                hit = (reply == "5") == right_first
                order = "_right_first" if right_first else "_right_second"
                for part in ("", order, "_long" if length > middle else "_short"):
                    first.setdefault(f"audit/bcq/picked_first{part}", []).append(hit)
    measured = {name: share for name, share in shares.items() if "picked_first" in name}
    assert measured == {name: pytest.approx(fmean(hits)) for name, hits in first.items()}
