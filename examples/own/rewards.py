"""Rewards of one's own for the quickstart; `docs/extending.md` says how they are named."""

from zppo.grading import Reward


def short(question: str, response: str, row: dict, *, most: int = 24) -> float:
    """1 for an empty response, falling to 0 at `most` words."""
    return max(0.0, 1.0 - len(response.split()) / most)


def boxes(question: str, response: str, row: dict) -> Reward:
    """1 for exactly one box; how many there are goes into the metrics."""
    count = response.count(r"\boxed{")
    return Reward(value=float(count == 1), parts={"count": float(count)})
