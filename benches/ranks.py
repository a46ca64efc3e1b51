"""What several ranks of a trainer cost and gain on CPUs, as ratios to one rank.

    python -P benches/ranks.py [--ranks 2] [--layers 8] [--hidden 512] [--vocabulary 16384]
    [--tokens 4096] [--repeats 3]

*step* is a forward and backward pass over `tokens` tokens, dealt out to the ranks, and an update;
*publication* gathers every tensor and writes it into shared memory. The floor of the first is one
rank's time divided by the ranks (where each has a core of its own), that of the second one rank's
publication of the same bytes. Each number is the median of the repeats, in seconds of wall time and
of processor time, of all ranks together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import Qwen3Config, Qwen3ForCausalLM

from zppo.config.options import positive
from zppo.config.topology import OptimizerConfig
from zppo.errors import Parser, UserError, run_command
from zppo.training.optimizer import AdamW, Gradients
from zppo.training.policy import Policy
from zppo.training.ranks import ALONE, Ranks
from zppo_actors.weights import shared_memory

HEAD = 64
ROWS = 256
"""Tokens of one row; a rank has its share of the rows, one after the other."""
Found: TypeAlias = dict[str, list[list[float]]]
"""[wall, processor] seconds of each repeat, by what was measured."""


def build(options: argparse.Namespace) -> Policy:
    """A tied Qwen3 of random bfloat16 weights."""
    torch.manual_seed(0)
    heads = options.hidden // HEAD
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else heads // 2,
        head_dim=HEAD,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3ForCausalLM(config)
    return Policy(model.to(torch.bfloat16))


def work(options: argparse.Namespace, ranks: Ranks, folder: Path) -> Found:
    """What this rank measures."""
    policy = build(options)
    if ranks.count > 1:
        policy.shard(ranks)
    parameters = policy.parameters()
    gradients = Gradients(parameters, ranks)
    optimizer = AdamW(parameters, OptimizerConfig(), seed=0)
    rows = max(1, options.tokens // ROWS // ranks.count)
    ids = torch.randint(options.vocabulary, (rows, 1, ROWS))

    def step() -> None:
        gradients.clear()
        for row in ids:
            loss = policy.within(lambda row=row: policy.model(input_ids=row, labels=row).loss)
            (loss / (rows * ranks.count)).backward()
        gradients.clip(gradients.norm(), 1.0)
        optimizer.step(gradients.tensors())

    def publish(version: int) -> None:
        if ranks.rank == 0:
            shared_memory.publish_each(policy.weights(), version, folder)
            shared_memory.remove(folder, version)
        else:
            for _ in policy.weights():
                pass

    step()
    return {
        "step": [timed(step, ranks) for _ in range(options.repeats)],
        "publication": [
            timed(partial(publish, number), ranks) for number in range(options.repeats)
        ],
    }


def timed(task: Callable[[], None], ranks: Ranks) -> list[float]:
    """Wall and processor seconds until all ranks have done it."""
    ranks.sum(torch.zeros(1))
    begin, used = time.perf_counter(), time.process_time()
    task()
    used = time.process_time() - used
    ranks.sum(torch.zeros(1))
    return [time.perf_counter() - begin, used]


def rank(options: argparse.Namespace, number: int, count: int, folder: Path) -> Found:
    """What one of `count` ranks measures."""
    torch.set_num_threads(1)
    if count == 1:
        return work(options, ALONE, folder)
    store = dist.FileStore(str(folder / f"store-{count}"), count)
    dist.init_process_group("gloo", store=store, rank=number, world_size=count)
    assert dist.group.WORLD is not None
    found = work(options, Ranks(number, DeviceMesh.from_group(dist.group.WORLD, "cpu")), folder)
    dist.destroy_process_group()
    return found


def measured(
    options: argparse.Namespace, count: int, folder: Path
) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of `count` ranks, by what was measured. They are forked from this
    process, which has imported everything and computed nothing."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context) as pool:
        ranks = [pool.submit(rank, options, number, count, folder) for number in range(count)]
        found = [one.result() for one in ranks]
    return {
        name: (
            statistics.median(wall for wall, _ in found[0][name]),
            sum(statistics.median(used for _, used in one[name]) for one in found),
        )
        for name in found[0]
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    for name, value in {
        "ranks": 2, "layers": 8, "hidden": 512, "vocabulary": 16_384, "tokens": 4096, "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=value)
    options = parser.parse_args()
    if options.hidden % HEAD:
        raise UserError(f"--hidden is {options.hidden}; expected a multiple of {HEAD}")
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        one, many = (measured(options, count, Path(folder)) for count in (1, options.ranks))
    for name, (wall, used) in one.items():
        walls, uses = many[name]
        print(
            f"{name:12} 1 rank {wall:.2f} s, {options.ranks} ranks {walls:.2f} s: "
            f"{walls / wall:.2f} of the wall time, {uses / used:.2f} of the processor time"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
