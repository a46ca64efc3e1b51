"""How long a weight update stops a vLLM engine, against a plain copy of the same bytes.

    python -P benches/weight_update.py --model models/smollm2 [--dtype bfloat16] [--sequences 8]
    [--repeats 5] [--json]

A group is being sampled all the time. Every update publishes the model's weights as a new version
into shared memory and loads it. *verify* and *prepare* run beside the sampling; then the step in
flight ends (*drain*), whose tokens count, and *stop* is the time without a step, until sampling
goes on. *pause* is drain and stop together. *copy* is the floor: one thread maps such a file anew
and copies its tensors into tensors that exist already, as every engine must. Copies and updates
take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from zppo.config.options import positive
from zppo.config.served import ServedModel
from zppo.config.topology import ActorConfig, ModelConfig
from zppo.errors import Parser, run_command
from zppo.plan.model_folder import inspect_model
from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.vllm.publication import FileIdentity, Update
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import ChatMessage, PolicyManifest, Prompt, Sampling


def spec_of(options: argparse.Namespace) -> EngineSpec:
    """The engine as an actor would build it."""
    engine_args = {
        "max_num_seqs": options.sequences,
        "max_model_len": 2048,
        "enforce_eager": options.eager,
    }
    served = ServedModel(
        role="rollout",
        model=ModelConfig(model=options.model, dtype=options.dtype),
        actor=ActorConfig(engine="vllm", engine_args=engine_args, threads=options.threads),
        model_path="--model",
        actor_path="--model",
    )
    return EngineSpec(served=served, device=options.device)


def endless(number: int, n: int) -> GenerateTask:
    """A group that is still being sampled when the last update has come."""
    prompt = Prompt(messages=[ChatMessage(role="user", content="Tell me a very long story.")])
    sampling = Sampling(max_new_tokens=1500)
    return GenerateTask(
        task_id=str(number), kind="plain", prompt=prompt, n=n, sampling=sampling, seed=number
    )


def copy_seconds(manifest: PolicyManifest, target: dict[str, torch.Tensor]) -> float:
    """Map the file and copy every tensor of it."""
    # Imported here: it is a part of vLLM's worker, and importing it starts with importing vLLM.
    from zppo_actors.engines.vllm.weights import map_file, tensors

    update = Update(manifest, FileIdentity.of(Path(manifest.path).stat()))
    begin = time.perf_counter()
    shared_memory.copy(
        [(target[name], tensor) for name, tensor in tensors(map_file(update), manifest.tensors)]
    )
    return time.perf_counter() - begin


async def measure(
    engine: Any, tensors: dict[str, torch.Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """Update, copy, update, copy, … while groups are being sampled."""
    names = ("verify", "prepare", "drain", "stop", "pause", "copy", "tokens_per_second")
    rows: dict[str, list[float]] = {name: [] for name in names}
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    sampling = asyncio.ensure_future(sample_for_ever(engine, options.sequences))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for version in range(options.repeats + 1):
            manifest = await asyncio.to_thread(
                shared_memory.publish, tensors, version, Path(folder)
            )
            before, begin = engine.progress, time.perf_counter()
            await asyncio.sleep(1.0)
            rate = (engine.progress - before) / (time.perf_counter() - begin)
            await engine.load_policy(manifest)
            seconds = await asyncio.to_thread(copy_seconds, manifest, target)
            shared_memory.remove(Path(folder), version)
            if version:  # the first one warms everything up
                load = engine.last_load
                for name, value in zip(
                    names, (*load, load.drained + load.stopped, seconds, rate), strict=True
                ):
                    rows[name].append(value)
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    return {name: statistics.median(values) for name, values in rows.items()}


async def sample_for_ever(engine: Any, n: int) -> None:
    number = 0
    while True:
        await engine.generate(endless(number := number + 1, n))


async def run(options: argparse.Namespace) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tensors = dict(shared_memory.untied(model.state_dict()))
    engine = create(spec_of(options))
    try:
        result = await measure(engine, tensors, options)
    finally:
        await engine.close()
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "model": options.model,
        "dtype": options.dtype,
        "bytes": size,
        **result,
        "ratio": result["pause"] / result["copy"],
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of vLLM")
    parser.add_argument("--sequences", type=positive, default=8)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--folder", default="/dev/shm", help="where weights are published")
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile the model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    inspect_model(Path(options.model), "--model")
    torch.set_num_threads(1)
    result = asyncio.run(run(options))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    names = ("pause", "drain", "stop", "copy", "verify", "prepare")
    pause, drain, stop, copy, verify, prepare = (result[name] * 1e3 for name in names)
    print(
        f"{result['bytes'] / 2**20:.0f} MiB: sampling paused for {pause:.0f} ms ({drain:.0f} ms of "
        "them the step in "
        f"flight, {stop:.0f} ms stopped), plain copy {copy:.0f} ms, ratio {result['ratio']:.1f}; "
        "beside the sampling: "
        f"verified in {verify:.0f} ms, prepared in {prepare:.0f} ms; "
        f"{result['tokens_per_second']:.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
