"""What an evaluation says: pass@1 and pass@k with their intervals, over the questions of a set.

The unit of sampling is the question: the n responses to one question are averaged first, and the
interval is that of the mean over questions. It says how much the number would move with other
questions of the same kind.
"""

from __future__ import annotations

from math import comb

from msgspec import Struct

from zppo.errors import count_of, printable
from zppo.scheduling.heldout import Estimate, estimate
from zppo_protocol.values import Sampling


class Answered(Struct, frozen=True, kw_only=True):
    """One response and its grade. `tokens` is None where a server did not count them one by one."""

    text: str
    reward: float
    answer: str | None
    note: str
    finish_reason: str
    tokens: int | None
    judged: bool = False


class QuestionResult(Struct, frozen=True, kw_only=True):
    """One line of the by-question file. `failed` says why the question could not be asked; it then
    counts as wrong."""

    id: str
    question: str
    gold: str
    responses: list[Answered]
    mean: float
    failed: str | None = None


class EvaluationReport(Struct, frozen=True, kw_only=True):
    """The result of one evaluation; `zppo evaluate --json` prints it."""

    model: str
    data: str
    engine: str
    sampling: Sampling
    questions: int
    samples: int
    """Responses to each question."""
    pass_at_1: Estimate
    """Mean accuracy of the responses."""
    pass_at: dict[str, Estimate]
    """k -> share of questions with a right answer among k responses, by the unbiased estimator."""
    tokens_per_response: float | None
    cut_off: float
    """Share of responses that ended at the limit of tokens."""
    unanswered: float
    """Share of responses without a boxed answer."""
    failed: int
    """Questions that could not be asked."""
    judged: int
    """Responses that the judge decided."""
    timed_out: int
    """Responses whose grading took too long."""
    seconds: float
    tokens_per_second: float | None
    notes: list[str] = []


class Tally(Struct, kw_only=True):
    """What is kept of each question while the evaluation runs: counts, no texts."""

    samples: int
    right: list[int] = []
    responses: int = 0
    tokens: int = 0
    counted: int = 0
    cut_off: int = 0
    unanswered: int = 0
    failed: int = 0
    judged: int = 0
    timed_out: int = 0

    def add(self, result: QuestionResult, timed_out_note: str) -> None:
        """Count one question."""
        responses = result.responses
        self.right.append(sum(response.reward >= 1.0 for response in responses))
        self.failed += result.failed is not None
        self.responses += len(responses)
        self.counted += sum(response.tokens is not None for response in responses)
        self.tokens += sum(response.tokens or 0 for response in responses)
        self.cut_off += sum(response.finish_reason == "length" for response in responses)
        self.unanswered += sum(response.answer is None for response in responses)
        self.judged += sum(response.judged for response in responses)
        self.timed_out += sum(response.note == timed_out_note for response in responses)

    @property
    def tokens_per_response(self) -> float | None:
        return self.tokens / self.counted if self.counted else None

    def pass_at_1(self) -> Estimate:
        return estimate([right / self.samples for right in self.right])

    def pass_at(self) -> dict[str, Estimate]:
        """pass@k for k = 2, 4, 8, … and for all samples."""
        ks = {self.samples, *(2**i for i in range(1, 20) if 2**i <= self.samples)} - {1}
        return {
            str(k): estimate([pass_at_k(self.samples, right, k) for right in self.right])
            for k in sorted(ks)
        }

    def share(self, count: int) -> float:
        return count / self.responses if self.responses else 0.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n responses, drawn without putting back, hold a right one (Chen et al.
    2021)."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def report_text(report: EvaluationReport) -> str:
    """The report for people."""
    lines = [
        (
            f"{report.model} on {report.data}: {count_of(report.questions, 'question')}, "
            f"{count_of(report.samples, 'sample')} each"
        )
    ]
    shares = {"1": report.pass_at_1, **report.pass_at}
    width = max(len(k) for k in shares)
    for k, share in shares.items():
        interval = f"{100 * share.low:.1f} to {100 * share.high:.1f}"
        lines.append(
            f"  pass@{k:<{width}}  {100 * share.value:5.1f} %   95 % interval over questions: "
            f"{interval}"
        )
    lines.append("  " + ", ".join(_details(report)))
    text = "\n".join([*lines, *(f"  note: {note}" for note in report.notes)]) + "\n"
    return printable(text)


def _details(report: EvaluationReport) -> list[str]:
    details = [
        f"cut off {100 * report.cut_off:.1f} %",
        f"without a boxed answer {100 * report.unanswered:.1f} %",
    ]
    if report.tokens_per_response is not None:
        details.insert(0, f"{report.tokens_per_response:.1f} tokens per response")
    if report.judged:
        details.append(f"{count_of(report.judged, 'response')} judged")
    if report.timed_out:
        details.append(f"{count_of(report.timed_out, 'grading')} timed out")
    if report.tokens_per_second is not None:
        details.append(f"{report.tokens_per_second:.0f} tokens/s")
    return [*details, f"{report.seconds:.0f} s"]
