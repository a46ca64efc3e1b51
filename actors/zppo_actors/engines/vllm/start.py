"""Starting vLLM: the environment of its processes, the defaults of what a topology leaves out, and
its own complaints.

The engine core and its workers are processes of their own, started here and tied to this one.
`engine_args` go to vLLM as they are; what they leave out is vLLM's default, but for the few things
that `defaults` says.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import psutil

from zppo.config.topology import DTYPE_BYTES
from zppo.errors import UserError
from zppo.plan.engines.vllm import (
    CHUNKED_PREFILL,
    KV_POLICY,
    check_prompts_read_whole,
    check_vllm_arguments,
    check_vllm_sizes,
    sequence_bytes,
    whole,
)
from zppo.plan.engines.vllm_models import (
    PREFIX_CACHING,
    check_recurrent_on_cpu,
    check_torchvision,
    torchvision_problem,
    torchvision_sentence,
)
from zppo.plan.model_folder import ModelFacts, inspect_model
from zppo_actors.engines.base import EngineSpec
from zppo_actors.engines.vllm.media import takes_pictures
from zppo_actors.engines.vllm.plugin import BACKEND, ENTRY_POINT, TIE_VARIABLE

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

GROUP = "vllm.general_plugins"
UNREADABLE = "failed to be inspected"
"""What vLLM says of a model whose code it cannot import."""
MAX_SEQUENCES = 64
GIB = 1 << 30
MAX_TOP_K = 4096
"""Tokens a position that a task to score may ask for; vLLM's own bound, 20, protects public
servers."""
CACHE_SHARE = 0.25
"""On a CPU the key-value cache takes at most this share of the free memory, unless the topology
says otherwise."""
CACHE_SETTINGS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")


class TokenCounter:
    """A stat logger of vLLM that counts sampled tokens and forgets the rest."""

    def __init__(self) -> None:
        self.tokens = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *others: Any, **more: Any) -> None:
        """Take the numbers of one step of the engine core."""
        if iteration_stats is not None:
            self.tokens += iteration_stats.num_generation_tokens

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def arguments_of(spec: EngineSpec) -> dict[str, Any]:
    """All arguments for vLLM, checked as far as that goes without starting it. Raises UserError."""
    check_vllm_arguments(spec.served)
    facts = inspect_model(spec.served.folder, spec.served.model_path)
    _check_plugin()
    arguments = {**defaults(spec, facts), **spec.served.actor.engine_args, **fixed(spec)}
    arguments.pop(KV_POLICY, None)
    check_vllm_sizes(arguments, facts, spec.served)
    if spec.device == "cpu":
        check_prompts_read_whole(arguments, facts, spec.served)
        check_recurrent_on_cpu(arguments, facts, spec.served)
    check_torchvision(facts.kind, spec.served)
    _check_memory(arguments, facts, spec)
    return arguments


def fixed(spec: EngineSpec) -> dict[str, Any]:
    """What the topology sets elsewhere, and what this engine cannot do without
    (`zppo.plan.engines.vllm.OWNED`)."""
    return {
        "model": spec.served.model.model,
        "dtype": spec.served.model.dtype,
        # vLLM's processors of pictures want a tokenizer, although they get and give token ids.
        "skip_tokenizer_init": not takes_pictures(spec.served.model.model),
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": "zppo_actors.engines.vllm.weights.WorkerExtension",
        "disable_log_stats": False,
    }


def defaults(spec: EngineSpec, facts: ModelFacts) -> dict[str, Any]:
    """Our defaults: as many sequences as other engines, and on a CPU a cache that leaves room for
    the other actors."""
    chosen: dict[str, Any] = {"max_num_seqs": MAX_SEQUENCES, "max_logprobs": MAX_TOP_K}
    if takes_pictures(spec.served.model.model):
        # vLLM counts a picture as known to its engine core even if the prompt was refused for its
        # length on the way; the next prompt with that picture then ends in an error. So nothing is
        # remembered.
        chosen["mm_processor_cache_gb"] = 0
        # In its worker vLLM would scale the pixels of videos as those of pictures.
        chosen["mm_device_do_normalize"] = False
    if facts.bounded:
        # Beyond it vLLM would turn all positions by other factors than the trainer does.
        chosen["max_model_len"] = facts.context
    if spec.device == "cpu":
        chosen[CHUNKED_PREFILL] = False
        if facts.states:
            chosen[PREFIX_CACHING] = False
    if spec.device != "cpu" or any(
        name in spec.served.actor.engine_args for name in CACHE_SETTINGS
    ):
        return chosen
    arguments = {**chosen, **spec.served.actor.engine_args}
    one = sequence_bytes(arguments, facts, spec.served.model.dtype)
    share = int(psutil.virtual_memory().available * CACHE_SHARE)
    sequences = whole(arguments["max_num_seqs"], MAX_SEQUENCES)
    chosen["kv_cache_memory_bytes"] = max(one, min(sequences * one, share))
    return chosen


def set_environment(spec: EngineSpec, devices: int) -> None:
    """Environment of vLLM's processes; `devices` is the number of accelerators that the engine
    spreads over."""
    environment = os.environ
    environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads
    environment[TIE_VARIABLE] = "1"
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM would bind every engine of this host to the same cores.
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if spec.served.actor.threads is not None:
        environment["OMP_NUM_THREADS"] = str(spec.served.actor.threads)
    kind, _, index = spec.device.partition(":")
    if kind == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(int(index or 0), devices, spec))


def _visible(first: int, count: int, spec: EngineSpec) -> list[str]:
    """`count` devices from number `first` on, of those that are visible to this process already."""
    already = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = already.split(",") if already else [str(i) for i in range(first + count)]
    if first + count > len(names):
        raise UserError(
            f"{spec.served.actor_path}.devices: {spec.device!r} with tensor_parallel_size {count} "
            f"needs {first + count} visible devices; there are {len(names)}"
        )
    return names[first : first + count]


def _check_plugin() -> None:
    if not entry_points(group=GROUP, name=ENTRY_POINT):
        raise UserError(
            f"the installed package 'zppo' has no entry point {ENTRY_POINT!r} in {GROUP!r}, by "
            "which vLLM learns to take weights; install it again with pip"
        )


def _check_memory(arguments: dict[str, Any], facts: ModelFacts, spec: EngineSpec) -> None:
    """Refuse what cannot fit into the memory of the host; the kernel would end the engine while it
    loads."""
    if spec.device != "cpu":
        return
    cache = whole(
        arguments.get("kv_cache_memory_bytes"),
        sequence_bytes(arguments, facts, spec.served.model.dtype),
    )
    needed, free = (
        facts.parameters * DTYPE_BYTES[spec.served.model.dtype] + cache,
        psutil.virtual_memory().available,
    )
    if needed > free:
        raise UserError(
            f"{spec.served.actor_path}: vLLM needs {needed / GIB:.1f} GiB for the weights and the "
            f"key-value cache of {spec.served.model_path}, but {free / GIB:.1f} GiB are free; "
            "lower max_model_len, max_num_seqs or kv_cache_memory_bytes in engine_args"
        )


def start(arguments: dict[str, Any], spec: EngineSpec, counter: TokenCounter) -> AsyncLLM:
    """Start vLLM; takes as long as loading the model. Raises UserError if it does not start.

    What goes wrong in the engine core is in its own lines before that.
    """
    set_environment(spec, whole(arguments.get("tensor_parallel_size"), 1))
    # Importing vLLM reads the environment.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        engine_args = AsyncEngineArgs(**arguments)
        config = engine_args.create_engine_config()
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if UNREADABLE in str(error) and (problem := torchvision_problem()):
            raise UserError(torchvision_sentence(problem, spec.served)) from error
        raise UserError(
            f"{spec.served.actor_path}.engine_args: vLLM refuses them: {first_sentence(error)}"
        ) from error
    _check_platform(str(config.device_config.device_type), spec)
    if spec.device == "cpu":
        _check_heads(config.model_config.get_head_size(), spec)
    # The processes of one engine meet by a file of vLLM's (0.32), so there is no port to be lost.
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[lambda *arguments: counter])
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"{spec.served.actor_path}: vLLM does not start with {spec.served.model_path} "
            f"{spec.served.model.model!r} ({first_sentence(error)}); if memory is short, lower "
            "max_model_len or max_num_seqs in engine_args, on a GPU also gpu_memory_utilization"
        ) from error


def _check_platform(there: str, spec: EngineSpec) -> None:
    """vLLM is built for one kind of device, and takes it whatever it is told."""
    kind = spec.device.partition(":")[0]
    if there == kind:
        return
    other = "the vLLM of '.[vllm-cpu]'" if kind == "cpu" else "the vLLM of '.[vllm]'"
    raise UserError(
        f"{spec.served.actor_path}.devices names {spec.device!r}, but the vLLM that is installed "
        f"runs on {there}; expected {'a card such as cuda:0' if there == 'cuda' else repr(there)} "
        f"there, or {other} (docs/vllm.md)"
    )


def _check_heads(width: int, spec: EngineSpec) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supported = CPUAttentionBackend.get_supported_head_sizes()
    if width not in supported:
        raise UserError(
            f"{spec.served.model_path}: {spec.served.model.model!r} has attention heads of width "
            f"{width}; on a CPU vLLM serves {', '.join(map(str, supported))} only, the "
            "engine 'transformers' any"
        )


def first_sentence(error: Exception) -> str:
    """The first thing an error of vLLM or pydantic says that is no heading."""
    details = getattr(error, "errors", None)
    text = str(details()[0].get("msg", "")) if callable(details) and details() else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
