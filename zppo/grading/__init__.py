"""Grading: a response's final answer against the gold answer, by named rules."""

from zppo.grading.boxes import last_boxed, parse_answer
from zppo.grading.graders import GRADERS, NO_BOX, Grader, get_grader, grade, quick_grade, shown_gold
from zppo.grading.judge import judged, says_correct, scored
from zppo.grading.rewards import Reward, together

__all__ = [
    "GRADERS",
    "NO_BOX",
    "Grader",
    "Reward",
    "get_grader",
    "grade",
    "judged",
    "last_boxed",
    "parse_answer",
    "quick_grade",
    "says_correct",
    "scored",
    "shown_gold",
    "together",
]
