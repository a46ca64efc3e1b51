"""How much of the trainer's passes is padding, at the shapes of the paper: no model, no weights.

    python -P benches/padding.py [--questions 384] [--seeds 3]

Prompts have 200 to 1,500 tokens, responses a lognormal length of median 1,536 whose 99th percentile
is 8 times as long, at most 12,288. Each question is a group of 8, or of 4. Responses of a group
begin alike in nothing. What a rank repeats because another has more passes counts as padding. Rows
alone are the passes that hold one row; the last column says how many more positions the busiest
rank has than the mean.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from zppo.config.options import positive
from zppo.errors import Parser, run_command
from zppo.training.batch import Rollouts, assemble
from zppo.training.layout import Deal, MicroBatch, deal_passes
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

MEDIAN, LONGEST, TAIL = 1536, 12_288, 8.0
"""Tokens of a response; the 99th percentile is `TAIL` times the median."""
SIGMA = math.log(TAIL) / 2.3263
PROMPTS = (200, 1500)
BUDGETS, RANKS, SIZES = (16_384, 32_768), (1, 8), (8, 4)


@dataclass(frozen=True)
class Share:
    """Positions of all passes of all ranks, those that hold a token, passes, and those of one row;
    `longest` and `mean` are positions of a rank."""

    positions: int
    real: int
    passes: int
    alone: int
    longest: int
    mean: float

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.real / self.positions


def window(questions: int, size: int, seed: int) -> Rollouts:
    """A window of that many groups."""
    rng = np.random.default_rng([seed, size])
    groups = [_group(str(number), size, rng) for number in range(questions)]
    return assemble(TrainWindow(step=0, groups=groups), max_staleness=0, device=torch.device("cpu"))


def _group(name: str, size: int, rng: np.random.Generator) -> TrainGroup:
    lengths = (
        np.minimum(MEDIAN * np.exp(SIGMA * rng.standard_normal(size)), LONGEST).astype(int) + 1
    )
    total, prompt = int(lengths.sum()), int(rng.integers(PROMPTS[0], PROMPTS[1] + 1))
    return TrainGroup(
        group_id=name,
        question_id=name,
        kind="plain",
        samples=GroupSamples(
            prompt_ids=np.zeros(prompt, np.int32),
            token_ids=rng.integers(0, 150_000, total).astype(np.int32),
            log_probs=np.zeros(total, np.float32),
            offsets=np.array([0, *np.cumsum(lengths)], np.int32),
            version_spans=np.array([[total, 0]], np.int32),
            texts=[],
            finish_reasons=["stop"] * size,
        ),
        rewards=np.zeros(size, np.float32),
    )


def measure(rollouts: Rollouts, budget: int, ranks: int) -> Share:
    """The passes of all ranks."""
    deals = [
        deal_passes(
            rollouts, np.arange(rollouts.sequences), budget, share=True, rank=rank, ranks=ranks
        )
        for rank in range(ranks)
    ]
    return share_of(rollouts, deals)


def share_of(rollouts: Rollouts, deals: list[Deal]) -> Share:
    loads, real, alone = [], 0, 0
    for deal in deals:
        loads.append(sum(batch.input_ids_BL.numel() for batch in deal.batches))
        for batch in deal.batches:
            alone += len(batch.input_ids_BL) == 1
            if batch.weight:
                real += _real(rollouts, batch)
    passes = sum(len(deal.batches) for deal in deals)
    return Share(sum(loads), real, passes, alone, max(loads), sum(loads) / len(loads))


def _real(rollouts: Rollouts, batch: MicroBatch) -> int:
    """Positions that hold a token: all of a row see its first."""
    if batch.ends_BL is not None:
        return int(batch.ends_BL[:, 0].sum())
    sequences = batch.sequences_S.numpy()
    prompts = sum(len(rollouts.prompts_G[group]) for group in rollouts.group_S[sequences])
    return prompts + int((rollouts.lengths_S[sequences] - 1).sum())


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=positive, default=384)
    parser.add_argument("--seeds", type=positive, default=3, help="windows that are averaged")
    options = parser.parse_args()
    print("group  budget  ranks  padding  passes  rows alone  busiest rank")
    for size in SIZES:
        windows = [window(options.questions, size, seed) for seed in range(options.seeds)]
        for budget in BUDGETS:
            for ranks in RANKS:
                found = [measure(one, budget, ranks) for one in windows]
                print(
                    f"{size:5}{budget:8}{ranks:7}"
                    f"{np.mean([one.padding for one in found]):9.2%}"
                    f"{np.mean([one.passes for one in found]):8.0f}"
                    f"{np.mean([one.alone for one in found]):12.0f}"
                    f"{np.mean([one.longest / one.mean for one in found]) - 1:14.2%}"
                )


if __name__ == "__main__":
    sys.exit(run_command(main))
