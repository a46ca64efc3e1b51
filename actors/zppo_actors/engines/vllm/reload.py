"""Loading a whole policy with vLLM's own loaders: into the model itself, or into its shadow while
the model samples.

On a CPU vLLM computes linear layers with packed copies of their weights, and packing takes longer
than copying. So the new weights are laid out *beside* the model: a shadow is a second tree of its
modules, with tensors of its own, that vLLM loads and packs like the model, and `adopt` then takes
over. Two invariants: until `adopt` nothing that the model computes with is touched, and `adopt`
writes into the tensors that are there, so compiled graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import (
    Attention,
    MMEncoderAttention,
    is_deferred_attention_layer,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import (
    restore_layer_refs,
    sanitize_layer_refs,
)

STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
"""Attributes in which a shadow differs from its model from the start; any other one was written by
loading."""
PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


@torch.no_grad()
def load(model: nn.Module, model_config: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load all of `tensors`, by their Hugging Face names, into a model or a shadow."""
    initialize_layerwise_reload(model)
    model.load_weights(tensors)  # type: ignore[operator, unused-ignore]
    finalize_layerwise_reload(model, model_config)
    refresh_tied(model)


def refresh_tied(model: nn.Module) -> None:
    """Renew what layers derive from a weight that came in under the name of another layer.

    vLLM's reload processes only the layer that a weight was loaded into. An output head that is
    tied to the embedding shares the tensor, but on a CPU it computes with a packed copy, which
    would be that of the old policy.
    """
    first: dict[int, nn.Module] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is None or first.setdefault(id(weight), layer) is layer:
            continue
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)


def can_shadow(model: nn.Module) -> bool:
    """Whether loading writes into modules alone: on a CPU, with plain weights and ordinary
    attention."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
    return on_cpu and all(_is_plain(layer) for layer in model.modules())


def _is_plain(layer: nn.Module) -> bool:
    if is_deferred_attention_layer(layer):
        # A tower's attention derives something of its weights for fp8 alone.
        eyes = isinstance(layer, MMEncoderAttention) and not layer.fp8_enabled
        return eyes or type(layer) is Attention
    method = getattr(layer, "quant_method", None)
    return method is None or type(method) in PLAIN_METHODS


def make_shadow(model: nn.Module) -> nn.Module:
    """A tree of the same modules whose tensors are copies; what is one object in `model` is one in
    the shadow."""
    return _twin(model, {}, {})


def _twin(
    module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor]
) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    twin = modules[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        name: _copy(tensor, tensors, module, twin) for name, tensor in module._parameters.items()
    }
    twin._buffers = {
        name: _copy(tensor, tensors, module, twin) for name, tensor in module._buffers.items()
    }
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    twin._modules = {
        name: None if child is None else _twin(child, modules, tensors)
        for name, child in module._modules.items()
    }
    info, own = get_layerwise_info(module), get_layerwise_info(twin)
    # Restoring binds a layer's loaders to the tensors of its record, so the shadow's must be its
    # own.
    parameters, buffers = info.restore_metadata
    own.restore_metadata = (_records(parameters), _records(buffers))
    own.restore_device = info.restore_device
    return twin


def _records(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: to_meta_tensor(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Any, tensors: dict[int, Tensor], module: nn.Module, twin: nn.Module) -> Any:
    if tensor is None:
        return None
    if id(tensor) not in tensors:
        copy = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=False)
            # Of vLLM's own kinds, with a loader that belongs to the layer. Its reload restores
            # both from a record, but for biases.
            copy.__class__ = tensor.__class__
            copy.__dict__.update(tensor.__dict__)
            copy = restore_layer_refs(sanitize_layer_refs(copy, module), twin)
        tensors[id(tensor)] = copy
    return tensors[id(tensor)]


@torch.no_grad()
def adopt(model: nn.Module, shadow: nn.Module) -> None:
    """Give `model` what its loaded `shadow` holds: tensors in place, packed weights by
    reference."""
    copied: set[int] = set()
    for layer, twin in zip(model.modules(), shadow.modules(), strict=True):
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is not None and tensor.numel() and id(tensor) not in copied:
                copied.add(id(tensor))
                tensor.copy_(getattr(twin, name))
        for name, value in twin.__dict__.items():
            if name not in STRUCTURE and layer.__dict__.get(name) is not value:
                layer.__dict__[name] = value
