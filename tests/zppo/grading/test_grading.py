"""Grading: the table of answer pairs, boxes, and the promise that the quick half never lies and
never hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.errors import UserError
from zppo.grading import get_grader, grade, last_boxed, parse_answer, quick_grade
from zppo.grading.graders import choice_letters
from zppo.grading.maths import too_hard
from zppo.grading.numbers import as_number

TABLE = Path(__file__).parent / "answer_pairs.tsv"


def answer_pairs() -> list[tuple[str, str, float]]:
    lines = [
        line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")
    ]
    rows = [line.split("\t") for line in lines]
    return [(gold, answer, {"yes": 1.0, "no": 0.0}[verdict]) for gold, answer, verdict in rows]


def boxed(answer: str) -> str:
    return rf"So the answer is \boxed{{{answer}}}."


def test_the_table_is_long_enough_and_balanced() -> None:
    verdicts = [verdict for _, _, verdict in answer_pairs()]
    assert len(verdicts) >= 200
    assert min(verdicts.count(1.0), verdicts.count(0.0)) >= 70


@pytest.mark.slow
@pytest.mark.parametrize(("gold", "answer", "reward"), answer_pairs())
def test_answer_pairs(gold: str, answer: str, reward: float) -> None:
    assert grade(boxed(answer), gold, "math").reward == reward


def test_most_pairs_need_no_mathematics_and_the_quick_half_agrees() -> None:
    quick = [
        (quick_grade(boxed(answer), gold, "math"), reward)
        for gold, answer, reward in answer_pairs()
    ]
    decided = [(graded.reward, reward) for graded, reward in quick if graded is not None]
    assert all(got == expected for got, expected in decided)
    assert len(decided) >= 90


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{ 2 }", "2"),
        (r"\boxed {2}", "2"),
        (r"\fboxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x = \{ y}", r"x = \{ y"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{1} then \boxed{2 and \boxed{3}", "3"),
        (r"\boxed{1} then \boxed{\text{unfinished", None),
        (r"\boxed{1} then \boxed", "1"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} then \fbox{2", None),
        (r"\boxed{3 \boxed{4}", "4"),
        (r"\boxed{3 \boxed{4}}", r"3 \boxed{4}"),
        (r"} } \boxed{5}", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        (r"\boxed{", None),
        (r"boxed{2}", None),
        ("2", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@given(st.text(alphabet=r"\boxed{} 12", max_size=60))
def test_a_box_is_balanced_whatever_the_text(text: str) -> None:
    content = last_boxed(text)
    assert content is None or last_boxed(rf"\boxed{{{content}}}") == content


@given(st.text(alphabet="ab1{} ", max_size=20), st.text(alphabet="ab1 ", max_size=10))
def test_the_box_at_the_end_is_the_last_one(before: str, content: str) -> None:
    assert last_boxed(rf"{before}\boxed{{{content}}}") == content.strip()


def test_a_hundred_thousand_nested_boxes_take_linear_time() -> None:
    depth = 100_000
    graded = quick_grade(r"\boxed{" * depth + "}" * depth, "7", "math")
    assert graded is not None and graded.reward == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{ 2 }", "2"),
        (r"\boxed{$\dfrac{1}{2}$.}", r"\frac{1}{2}"),
        (r"\boxed{\text{Paris}}", "Paris"),
        (r"\boxed{\left( 1,\, 2 \right)}", "( 1, 2 )"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{  }", None),
        ("none", None),
    ],
)
def test_parse_answer(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


def test_without_a_box_there_is_no_reward() -> None:
    graded = grade("The answer is 7.", "7", "math")
    assert (graded.reward, graded.answer, graded.note) == (0.0, None, "no boxed answer")


def test_long_answers_are_compared_as_text_over_their_whole_length() -> None:
    long = "x+" * 5_000
    right, wrong = (
        quick_grade(boxed(long + "1"), long + "1", "math"),
        quick_grade(boxed(long + "2"), long + "1", "math"),
    )
    assert right is not None and right.reward == 1.0
    assert wrong is not None and wrong.reward == 0.0


def test_deep_answers_are_not_given_to_a_parser() -> None:
    assert too_hard("{" * 31) and not too_hard("{" * 30)
    deep = quick_grade(boxed("(" * 50 + "x" + ")" * 50), "x", "math")
    assert deep is not None and deep.reward == 0.0


@pytest.mark.parametrize(
    "text", ["9" * 200, "1e9999", "1e999999999", r"10^{99999}", "٣٤" * 100, "1/0", "²"]
)
def test_numbers_out_of_bounds_are_no_numbers(text: str) -> None:
    assert as_number(text) is None


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_exact(numerator: int, denominator: int) -> None:
    assert as_number(rf"\frac{{{numerator}}}{{{denominator}}}") == as_number(
        f"{numerator}/{denominator}"
    )
    assert as_number(f"{numerator:,}") == numerator


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_right_only_when_equal(gold: int, answer: int) -> None:
    graded = quick_grade(boxed(str(answer)), str(gold), "math")
    assert graded is not None and graded.reward == float(gold == answer)


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        (r"\text{B}", "B"),
        (r"\text{(B) Paris}", "B"),
        ("B. Paris", "B"),
        ("B: Paris", "B"),
        ("A, C", "AC"),
        ("C and A", "AC"),
        ("A C", "AC"),
        ("Paris", ""),
        (r"D\ 12", "D"),
        ("D 12", "D"),
        (r"D \frac{1}{2}", "D"),
        ("{D}", "D"),
        ("[D]", "D"),
        ("**D**", "D"),
        (r"\textbf{(B)}\ 5", "B"),
        (r"\mathbf{B}", "B"),
        ("A - because it is even", "A"),
        ("A, because it is even", "A"),
        ("A — the even one", "A"),
        ("Option B", "B"),
        ("option (b)", "B"),
        ("The correct answer is C", "C"),
        ("Answer: (C)", "C"),
        ("Choice D: 12", "D"),
        ("(A)(B)", "AB"),
        ("(A) and (B)", "AB"),
        ("(A), (B)", "AB"),
        ("A, B, and C", "ABC"),
        ("A/C", "AC"),
        ("ACD", "ACD"),
        ("BAD", ""),
        ("A cat", ""),
        ("(A) or (B)", ""),
        (r"(B) \text{ or } A", ""),
        ("A or B", ""),
        ("Option", ""),
        ("I think so", ""),
        ("A-level", ""),
        ("12", ""),
        ("", ""),
    ],
)
def test_choice_letters(answer: str, letters: str) -> None:
    assert choice_letters(answer) == frozenset(letters)


@pytest.mark.parametrize(
    ("grader", "gold", "answer", "reward"),
    [
        ("choice", "B", "(b)", 1.0),
        ("choice", r"\text{(B)}", "B", 1.0),
        ("choice", "B", "C", 0.0),
        ("choice", "B", "A, B", 0.0),
        ("choice", "A, C", "C, A", 1.0),
        ("choice", "Paris", "Paris", 0.0),
        ("exact", "Paris", " paris ", 1.0),
        ("exact", "1/2", "0.5", 0.0),
        ("exact", "Paris", "London", 0.0),
        ("exact", "", "", 0.0),
    ],
)
def test_other_graders(grader: str, gold: str, answer: str, reward: float) -> None:
    quick = quick_grade(boxed(answer), gold, grader)
    assert quick is not None and quick.reward == reward == grade(boxed(answer), gold, grader).reward


@pytest.mark.slow
@pytest.mark.parametrize("grader", ["math", "choice", "exact"])
@pytest.mark.parametrize(
    "piece",
    [
        "5 km per per ",
        "per ",
        "A , B , ",
        "(A) (B) ",
        "1 2/3 ",
        "m / s ",
        r"\text{ ",
        "( [ ",
        "answer: ",
        "1,2,",
        r"\{x : ",
        "9",
    ],
)
def test_the_quick_half_stays_quick_where_a_pattern_could_explode(grader: str, piece: str) -> None:
    for times in (7, 40, 160, 5_000):
        for answer in (piece * times + "!", "5 " + piece * times + "?"):
            graded = quick_grade(boxed(answer), "B" if grader == "choice" else "5", grader)
            assert graded is None or graded.reward == 0.0


def test_unknown_grader() -> None:
    with pytest.raises(UserError) as error:
        get_grader("maths")
    assert str(error.value) == "data.grader: unknown grader 'maths' (did you mean 'math'?)"


@given(
    st.text(max_size=200),
    st.text(min_size=1, max_size=50),
    st.sampled_from(["math", "exact", "choice"]),
)
def test_the_quick_half_takes_any_text(response: str, gold: str, grader: str) -> None:
    for text in (response, boxed(response)):
        graded = quick_grade(text, gold, grader)
        assert graded is None or graded.reward in (0.0, 1.0)


def test_the_tables_that_measure_graders_are_large_and_share_no_pair() -> None:
    texts = [
        (TABLE.parent / f"answer_pairs_{name}.tsv").read_text(encoding="utf-8")
        for name in ("more", "blind")
    ]
    tables = [
        [tuple(line.split("\t")) for line in t.splitlines() if not line.startswith("# ")]
        for t in texts
    ]
    assert all(len(row) == 3 and row[2] in ("yes", "no") for table in tables for row in table)
    assert min(map(len, tables)) >= 200
    pairs = [row[:2] for table in tables for row in table] + [
        (gold, answer) for gold, answer, _ in answer_pairs()
    ]
    assert len(set(pairs)) == len(pairs) >= 1000
