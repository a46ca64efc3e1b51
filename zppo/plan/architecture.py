"""What a model's configuration says of how it computes: up to which length its positions mean the
same, how far it looks back, and what it carries from token to token.

All rules read the text section of `config.json`, or the same settings of a loaded model as a
mapping. What a configuration does not say is found by the checks that trainer and engine make of a
loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zppo.errors import UserError

NO_LIMIT = 2**31
ALIASES = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}
"""Names that older families have for the usual sizes."""
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "window_size",
)
"""Settings that bound how far back a layer looks, in tokens."""
COLUMN_STEP = 32
"""The engine 'transformers' reads a multiple of this many columns of its slots, which also keeps
its bias aligned for fused kernels."""
OTHER_CACHES = ("kv_lora_rank", "sliding_window")
"""Settings of a model that keeps less than all keys and values."""
LENGTH_DEPENDENT = ("longrope", "su")
"""Rotary embeddings that use other factors for every token as soon as one of a pass stands beyond
the original context. (`dynamic` does so beyond `max_position_embeddings`, which bounds us
anyway.)"""
CARRIED = frozenset(
    {
        *("full_attention", "sliding_attention", "chunked_attention", "attention"),
        *("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"),
        *("moe", "mlp"),
    }
)
"""Kinds of layers for which the slots of the engine 'transformers' hold what is carried from token
to token: keys and values, the inputs of a convolution, a recurrent state, or nothing."""
WITHOUT_KEYS = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp"})
"""Kinds of layers that keep no keys and values."""
CARRYING = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"})
"""Kinds of layers that keep a state, the inputs of a convolution, or both."""
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")
"""Settings that say layer by layer, or in turn, what a layer is."""
MASKED = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
        "megatron-bert",
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm"),
        *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "reformer"),
    }
)
"""Families that transformers loads as causal models, but that see the whole text unless their
configuration says `is_decoder`."""

UNTRAINED = frozenset({"cpmant"})
"""Families that the trainer's own check refuses in docs/models.md, though nothing in their
configuration says why."""
NO_SLOTS = frozenset(
    {
        *("bloom", "codegen", "cpmant", "doge", "falcon", "git", "gpt_neo", "gpt_neox_japanese"),
        *("gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "inkling_text", "mamba2"),
        *("mimo_v2_flash", "minimax", "mpt", "nemotron_h", "openai-gpt", "xglm", "xlstm"),
    }
)
"""Families that ask more of attention or of a cache than the engine 'transformers' has, though
their configuration does not say so: those that its own check refuses in docs/models.md."""


def setting(text: Mapping[str, Any], name: str) -> Any:
    """The setting of this name, or of one of its older names; None without one."""
    return next((text[one] for one in (name, *ALIASES.get(name, ())) if text.get(one)), None)


def context_of(text: Mapping[str, Any]) -> int:
    """Longest sequence in tokens, within which no position changes what another one computes."""
    positions = setting(text, "max_position_embeddings")
    bounds = [int(positions)] if positions else []
    for rope in _rotary_settings(text):
        kind = rope.get("rope_type") or rope.get("type")
        original = rope.get("original_max_position_embeddings") or text.get(
            "original_max_position_embeddings"
        )
        if kind in LENGTH_DEPENDENT and original:
            bounds.append(int(original))
    return min(bounds, default=NO_LIMIT)


def _rotary_settings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Settings of the rotary embedding, which some models have one of for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if isinstance(found, Mapping):
            yield found
            yield from (part for part in found.values() if isinstance(part, Mapping))


def window_of(text: Mapping[str, Any]) -> int | None:
    """How many tokens the most short-sighted layer looks back; None if all see everything."""
    types = text.get("layer_types")
    if types and set(types) == {"full_attention"}:
        return None
    names = [name for name in WINDOWS if text.get(name)]
    if text.get("use_sliding_window") is False and not types:
        names = [name for name in names if not name.startswith("sliding_window")]
    sizes = [text[name] for name in names if isinstance(text[name], int)]
    return min(sizes, default=None)


def tempered_from(text: Mapping[str, Any]) -> int | None:
    """Of how many tokens on a layer scales its queries by their number (Llama 4); None for a model
    without such layers. It counts places of a row or of a cache and asks for no positions, so rows
    of several rollouts, and slots, must end before."""
    places = text.get("floor_scale")
    return int(places) if places and text.get("attn_temperature_tuning") else None


def slots_window_of(text: Mapping[str, Any]) -> int | None:
    """Longest sequence that the slots of the engine 'transformers' hold; None if the context alone
    bounds it. They know no windows, and count for every sequence the columns that are read for the
    longest one."""
    tempered = tempered_from(text)
    bounds = (window_of(text), None if tempered is None else max(1, tempered - COLUMN_STEP))
    return min((bound for bound in bounds if bound is not None), default=None)


def other_state(text: Mapping[str, Any]) -> str | None:
    """What a layer carries from token to token that slots do not hold; None if the configuration
    names nothing."""
    return ", ".join(sorted(layer_kinds(text) - CARRIED)) or None


def caches_otherwise(text: Mapping[str, Any]) -> bool:
    """Whether something else than full keys and values is kept in every layer."""
    odd = set(text.get("layer_types") or ()) - {"full_attention"}
    return bool(odd) or any(text.get(name) for name in OTHER_CACHES)


def listed_layers(text: Mapping[str, Any]) -> int | None:
    """How many layers the configuration lists one by one; some families have no other number."""
    lists = [text[name] for name in LAYER_LISTS[:2] if isinstance(text.get(name), list | tuple)]
    return max(map(len, lists), default=0) or None


def attending_layers(text: Mapping[str, Any], layers: int) -> int:
    """How many of the `layers` keep keys and values; all of them where nothing says otherwise."""
    if kinds := _kinds_in_order(text):
        return sum(kind not in WITHOUT_KEYS for kind in kinds)
    if interval := text.get("full_attention_interval"):
        return layers // int(interval)
    if isinstance(places := text.get("attn_layer_indices"), list):
        return len(places)
    if period := text.get("attn_layer_period"):
        return len(range(int(text.get("attn_layer_offset") or 0), layers, int(period)))
    return layers


def state_numbers(text: Mapping[str, Any], layers: int) -> int:
    """Numbers that one sequence carries in recurrent states and inputs of convolutions, at most.

    Of a gated delta rule (Qwen3.5, Qwen3-Next, OLMo Hybrid), of Mamba (Granite 4 H, Bamba,
    Falcon-H1, Jamba) or of a short convolution (LFM2); 0 for a family with other settings.
    """
    attending = attending_layers(text, layers)
    if kinds := _kinds_in_order(text):
        carrying = sum(kind in CARRYING for kind in kinds)
    else:  # a family that does not say which: in all, beside attention
        carrying = layers - attending if attending < layers else layers
    return carrying * _state_of_a_layer(text)


def delta_widths(text: Mapping[str, Any]) -> tuple[int, int] | None:
    """Widths of a key and of a value in a gated delta rule; None for a model without one."""
    if not setting(text, "linear_num_value_heads"):
        return None
    names = ("linear_key_head_dim", "linear_value_head_dim")
    key, value = (int(setting(text, name) or 0) for name in names)
    return key, value


def _state_of_a_layer(text: Mapping[str, Any]) -> int:
    def number(name: str) -> int:
        return int(setting(text, name) or 0)

    if heads := number("linear_num_value_heads"):
        width, values = number("linear_key_head_dim"), heads * number("linear_value_head_dim")
        channels = 2 * number("linear_num_key_heads") * width + values
        return values * width + channels * number("linear_conv_kernel_dim")
    if states := number("mamba_d_state"):
        inner = number("mamba_d_ssm") or number("mamba_expand") * number("hidden_size")
        channels = inner + 2 * number("mamba_n_groups") * states
        return inner * states + channels * number("mamba_d_conv")
    return number("hidden_size") * number("conv_L_cache")


def _kinds_in_order(text: Mapping[str, Any]) -> list[str]:
    """What each layer is; empty where the configuration does not list them one by one."""
    lists = (text.get(name) for name in LAYER_LISTS[:2])
    return next((list(map(str, one)) for one in lists if isinstance(one, list | tuple)), [])


def layer_kinds(text: Mapping[str, Any]) -> set[str]:
    """What the configuration says that layers are; empty if it says nothing."""
    lists = [text[name] for name in LAYER_LISTS if isinstance(text.get(name), list | tuple)]
    return {str(kind) for kinds in lists for kind in kinds}


def bounded(text: Mapping[str, Any]) -> bool:
    """Whether the context ends before the model's positions do."""
    positions = setting(text, "max_position_embeddings")
    return bool(positions) and context_of(text) < int(positions)


def refuse_no_decoder(config: Mapping[str, Any], folder: Path | str, where: str) -> None:
    """Raise UserError for a family that does not predict each token from those before it."""
    family = config.get("model_type")
    if config.get("is_encoder_decoder"):
        what = "an encoder-decoder"
    elif family in MASKED and not config.get("is_decoder"):
        what = "a masked language model, which sees the tokens that it should predict"
    else:
        return
    raise UserError(
        f"{where}: {str(folder)!r} ({family}) is {what}; expected a decoder-only language model"
    )


def refuse_other_state(
    state: str | None, family: str | None, folder: Path | str, where: str
) -> None:
    """Raise UserError for a `state` that the engine 'transformers' cannot carry."""
    if state is not None:
        raise UserError(
            f"{where}: {str(folder)!r} ({family}) keeps other state than a key-value cache "
            f"({state}), which the engine 'transformers' does not serve"
        )


def refuse_untrained(family: str, folder: Path | str, where: str) -> None:
    """Raise UserError for a family that the trainer would refuse once it is loaded."""
    if family in UNTRAINED:
        raise UserError(
            f"{where}: {str(folder)!r} ({family}) lets a token see more than the tokens before it, "
            "so it cannot be trained; expected a family that has a number in docs/models.md"
        )


def refuse_quantised(quantised: bool, folder: Path | str, where: str) -> None:
    """Raise UserError for a model whose weights no gradient can move as they lie."""
    if quantised:
        raise UserError(
            f"{where}: the weights of {str(folder)!r} are quantised and cannot be trained; "
            "expected a folder in float32 or bfloat16"
        )


def refuse_without_slots(family: str, folder: Path | str, where: str) -> None:
    """Raise UserError for a family that the engine 'transformers' would refuse once it is
    loaded."""
    if family in NO_SLOTS:
        raise UserError(
            f"{where}: {str(folder)!r} ({family}) asks more of attention or of a cache than the "
            "engine 'transformers' has; expected a family that has a number in docs/models.md, or "
            "the engine 'vllm'"
        )
