"""Tokens per second of the transformers engine against `model.generate` on the same model, prompts
and lengths.

Run: `python benches/engine.py [--model FOLDER] [--threads 1] [--json]`. Two loads: *even*, groups
of 8 that all end at the same length, and *ragged*, single responses of very different lengths (a
tenth up to ten tenths of the longest). `generate` runs full batches, one after the other, and
computes no log-probs; the engine admits new sequences into every freed slot, and includes
log-probs, asyncio and detokenisation. Only wanted tokens count. Best of `--repeats`. `--clock cpu`
divides by CPU seconds of the process instead: with one thread that is steadier on a busy computer.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from zppo.config.options import positive
from zppo.errors import Parser, UserError, run_command
from zppo.plan.model_folder import inspect_model
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.transformers.engine import TransformersEngine
from zppo_actors.engines.transformers.models import adopt_slots
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import ChatMessage, Prompt, Sampling

GROUP = 8
NEVER = frozenset({-1})
"""No token ends a response, so that both sides sample exactly the lengths asked for."""


def load_of(name: str, sequences: int, longest: int, seed: int = 0) -> list[int]:
    """Response lengths of the load, in the order they are asked for."""
    if name == "even":
        return [longest] * sequences
    numbers = random.Random(seed)
    return [max(1, longest * numbers.randint(1, 10) // 10) for _ in range(sequences)]


def make_tasks(name: str, lengths: list[int], prompts: list[str]) -> list[GenerateTask]:
    """The load as tasks: groups where all lengths are equal, single responses otherwise."""
    n = GROUP if name == "even" else 1
    return [
        GenerateTask(
            task_id=str(i),
            kind="plain",
            prompt=Prompt(messages=[ChatMessage(role="user", content=prompts[i * n // GROUP])]),
            n=n,
            sampling=Sampling(max_new_tokens=lengths[i * n]),
            seed=i,
        )
        for i in range(len(lengths) // n)
    ]


async def run_engine(engine: TransformersEngine, tasks: list[GenerateTask]) -> int:
    """Sample all tasks; returns the tokens sampled."""
    samples = await asyncio.gather(*(engine.generate(task) for task in tasks))
    return sum(len(each.token_ids) for each in samples)


@torch.inference_mode()
def run_generate(model: Any, prompts: list[np.ndarray], lengths: list[int], batch: int) -> int:
    """The same load in batches of `batch`, each as long as its longest response; returns the tokens
    wanted."""
    for start in range(0, len(lengths), batch):
        chunk = prompts[start : start + batch]
        width = max(map(len, chunk))
        ids, mask = (torch.zeros((len(chunk), width), dtype=torch.int64) for _ in range(2))
        for row, prompt in enumerate(chunk):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        longest = max(lengths[start : start + batch])
        model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=longest)
    return sum(lengths)


async def best_rate(run: Callable[[], Awaitable[int]], options: argparse.Namespace) -> float:
    """Tokens per second of the fastest run, after one to warm up."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    await run()
    rates = []
    for _ in range(options.repeats):
        start = clock()
        tokens = await run()
        rates.append(tokens / (clock() - start))
    return max(rates)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result per load."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    tokenizer = PromptTokenizer(options.model, "--model")
    tokenizer.end_ids = NEVER
    plain = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    plain.generation_config.eos_token_id = None
    plain.generation_config.pad_token_id = 0
    ours = copy.deepcopy(plain)
    adopt_slots(ours, options.model, "--model")
    return [measure_load(name, options, tokenizer, plain, ours) for name in ("even", "ragged")]


def measure_load(
    name: str, options: argparse.Namespace, tokenizer: PromptTokenizer, plain: Any, ours: Any
) -> dict[str, Any]:
    lengths = load_of(name, options.sequences, options.tokens)
    texts = [
        f"{i % 23} * {(7 * i) % 23} * {(11 * i) % 23} mod 23" for i in range(options.sequences)
    ]
    tasks = make_tasks(name, lengths, texts)
    prompts = [tokenizer.encode(task.prompt) for task in tasks for _ in range(task.n)]
    longest = max(map(len, prompts)) + options.tokens

    async def generate() -> int:
        return run_generate(plain, prompts, lengths, options.slots)

    async def engine_rate() -> float:
        engine = TransformersEngine(ours, tokenizer, options.slots, longest)
        rate = await best_rate(lambda: run_engine(engine, tasks), options)
        await engine.close()
        return rate

    rate, rate_generate = asyncio.run(engine_rate()), asyncio.run(best_rate(generate, options))
    return {
        "load": name,
        "sequences": options.sequences,
        "slots": options.slots,
        "longest": options.tokens,
        "tokens": sum(lengths),
        "engine_tokens_per_second": round(rate),
        "generate_tokens_per_second": round(rate_generate),
        "ratio": round(rate / rate_generate, 2),
    }


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(root / "examples" / "quickstart" / "student"))
    parser.add_argument("--slots", type=positive, default=64)
    parser.add_argument("--sequences", type=positive, default=256)
    parser.add_argument("--tokens", type=positive, default=128, help="longest response")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.sequences % GROUP:
        raise UserError(f"--sequences is {options.sequences}; expected a multiple of {GROUP}")
    inspect_model(Path(options.model), "--model")
    torch.set_num_threads(options.threads)
    results = measure(options)
    if options.json:
        print(
            json.dumps(
                {
                    "threads": options.threads,
                    "clock": options.clock,
                    "torch": torch.__version__,
                    "results": results,
                },
                indent=2,
            )
        )
        return
    for result in results:
        print(
            f"{result['load']:>7}: engine {result['engine_tokens_per_second']:>7,} tokens/s, "
            f"generate {result['generate_tokens_per_second']:>7,} tokens/s, ratio {result['ratio']}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
