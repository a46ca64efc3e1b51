"""What it saves to lay the rollouts of a group behind one prompt in long rows: processor time of
forward and backward pass, without the LM head, with and without, in turns.

    python -P benches/long_rows.py [--dtype bfloat16] [--width 1024] [--prompt 1200] [--group 8] …

Prompts have `--prompt` tokens, responses are lognormal around `--response`, cut at `--longest`; the
tokens are random, so nothing is alike but the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zppo.config.options import counting, positive
from zppo.errors import Parser, UserError, run_command
from zppo.training.batch import Rollouts, assemble
from zppo.training.layout import MicroBatch, deal_passes
from zppo.training.policy import Policy
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

VOCABULARY, HEAD = 512, 64
WAYS = (False, True)


def model_of(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    heads = options.width // HEAD
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 4 else heads // 4,
        max_position_embeddings=1 << 15,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(getattr(torch, options.dtype))


def group_of(name: str, options: argparse.Namespace, rng: np.random.Generator) -> TrainGroup:
    drawn = rng.lognormal(np.log(options.response), 0.6, options.group)
    lengths = np.clip(drawn.astype(int), 2, options.longest).tolist()
    return TrainGroup(
        group_id=name,
        question_id=name,
        kind="plain",
        samples=GroupSamples(
            prompt_ids=rng.integers(0, VOCABULARY, options.prompt).astype(np.int32),
            token_ids=rng.integers(0, VOCABULARY, sum(lengths)).astype(np.int32),
            log_probs=np.full(sum(lengths), -1.0, np.float32),
            offsets=np.array([0, *np.cumsum(lengths)], np.int32),
            version_spans=np.array([[sum(lengths), 0]], np.int32),
            texts=[],
            finish_reasons=["stop"] * options.group,
        ),
        rewards=np.zeros(options.group, np.float32),
    )


def passes(rollouts: Rollouts, options: argparse.Namespace, *, long: bool) -> list[MicroBatch]:
    every = np.arange(rollouts.sequences)
    return deal_passes(rollouts, every, options.micro_batch_tokens, share=True, long=long).batches


def seconds_of(policy: Policy, batches: list[MicroBatch]) -> float:
    begin = time.process_time()
    for batch in batches:
        policy.hidden(batch).float().square().sum().backward()
    return time.process_time() - begin


def measure(options: argparse.Namespace) -> None:
    policy = Policy(model_of(options))
    assert policy.shares_long_rows
    rng = np.random.default_rng(options.seed)
    task = TrainWindow(
        step=0, groups=[group_of(str(i), options, rng) for i in range(options.groups)]
    )
    rollouts = assemble(task, max_staleness=0, device=torch.device("cpu"))
    laid = {long: passes(rollouts, options, long=long) for long in WAYS}
    found: dict[bool, list[float]] = {long: [] for long in WAYS}
    for repeat in range(options.repeats):
        for long in WAYS if repeat % 2 else WAYS[::-1]:
            found[long].append(seconds_of(policy, laid[long]))
    for long in WAYS:
        positions = sum(batch.input_ids_BL.numel() for batch in laid[long])
        times = " ".join(f"{one:.2f}" for one in found[long])
        print(f"{'shared' if long else 'alone':7}{positions:8} positions  s {times}")
    ratios = [alone / shared for alone, shared in zip(found[False], found[True], strict=True)]
    print(f"{options.dtype}, width {options.width}: {statistics.median(ratios):.2f} times as fast")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    for name, value in (
        *(("width", 1024), ("layers", 1), ("prompt", 1200), ("response", 1500)),
        *(("longest", 4000), ("group", 8), ("groups", 1), ("repeats", 3)),
        ("micro-batch-tokens", 16_384),
    ):
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--seed", type=counting, default=1)
    options = parser.parse_args()
    if options.width % HEAD:
        raise UserError(f"--width is {options.width}; expected a multiple of {HEAD}")
    torch.set_num_threads(1)
    measure(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
