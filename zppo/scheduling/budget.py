"""What the teachers cost, by kind of work, and the limit on it (`teacher.budget`).

A *request* is a job handed to a teacher, again for each new try; a server that was asked in several
requests for one job reports as many. *Tokens* are those that an answer reports: a server's usage,
or what a token-level engine read and wrote. Also an answer that is not let in has been paid for.

Invariant: nothing is handed to a teacher once either limit is reached. So the requests exceed their
limit only by what a server splits the last jobs into, and the tokens theirs by the jobs that were
in flight when it was reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from zppo.algorithm.window import COMPRESS, SCORE, TEACHER, WRITE_HINT
from zppo.config.topology import TeacherBudget
from zppo.scheduling.dispatch import Job
from zppo.scheduling.events import Answer, Cost, Sampled
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples

KINDS = {TEACHER: "draw", COMPRESS: "compress", WRITE_HINT: "hint", SCORE: "score"}
"""Kind of a job -> what its cost is counted as; a judge's is its own."""


class Spent(Struct, kw_only=True):
    """What one kind of work has cost so far."""

    requests: int = 0
    tokens: int = 0


class Budget:
    """`pools`: those of all teachers. `spent`: what the run has cost before, also in attempts that
    were lost: the money is gone, whatever became of the answers."""

    def __init__(
        self,
        limits: TeacherBudget,
        pools: Iterable[str],
        spent: Mapping[str, Spent] | None = None,
    ) -> None:
        self.limits, self._pools = limits, frozenset(pools)
        self.spent = {
            kind: Spent(requests=s.requests, tokens=s.tokens) for kind, s in (spent or {}).items()
        }
        self._costs: list[Cost] = []

    def admits(self, job: Job) -> bool:
        """Whether the job may be handed out; if so, its request is counted."""
        if job.pool not in self._pools:
            return True
        if self.problem is not None:
            return False
        self._charge(Cost(kind=kind_of(job), requests=1))
        return True

    def answered(self, job: Job, answer: Answer) -> None:
        """Count what an answer says that it cost."""
        if job.pool not in self._pools:
            return
        requests = 0
        if isinstance(answer, Sampled):
            requests = max(0, len(answer.samples.usage) - 1)  # the first was counted when it began
        self._charge(Cost(kind=kind_of(job), requests=requests, tokens=tokens_of(job, answer)))

    @property
    def problem(self) -> str | None:
        """Which limit has been reached."""
        for name in ("tokens", "requests"):
            limit = getattr(self.limits, name)
            total = sum(getattr(spent, name) for spent in self.spent.values())
            if limit is not None and total >= limit:
                return (
                    f"the teacher's budget is spent: {total:,} {name} of {limit:,} "
                    f"(teacher.budget.{name}; raise it to go on)"
                )
        return None

    def news(self) -> list[Cost]:
        """What has been counted since the last call."""
        news, self._costs = self._costs, []
        return news

    def _charge(self, cost: Cost) -> None:
        spent = self.spent.setdefault(cost.kind, Spent())
        spent.requests += cost.requests
        spent.tokens += cost.tokens
        self._costs.append(cost)


def kind_of(job: Job) -> str:
    """What a teacher's job is counted as."""
    kind = job.message.kind if isinstance(job.message, GenerateTask) else SCORE
    return KINDS.get(kind, kind)


def tokens_of(job: Job, answer: Answer) -> int:
    """Tokens read and written for an answer, as far as somebody counted them."""
    if isinstance(answer, Sampled):
        return _tokens(answer.samples)
    if isinstance(job.message, ScoreTask):
        return len(job.message.prompt_ids) + len(job.message.token_ids)
    return 0


def _tokens(samples: GroupSamples) -> int:
    """A server bills the prompt of each of its requests; an engine of ours reads it once."""
    billed = sum((u.prompt_tokens or 0) + (u.completion_tokens or 0) for u in samples.usage)
    return billed + len(samples.prompt_ids) + len(samples.token_ids)
