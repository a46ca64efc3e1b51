"""Model folders in memory, opened as what they are: for the trainer and for engines that run
transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from zppo.errors import UserError, first_line
from zppo.plan.architecture import refuse_no_decoder
from zppo.plan.model_class import auto_class, refuse_unknown

MOST_NAMED = 3
OTHER_SHAPES = "ignore_mismatched_sizes"
"""What transformers says of weights whose shapes are not the model's, with a report elsewhere."""
FAULTS = (
    *(OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises of a folder whose settings or weights are not of their kind, or need a
library that is not here."""


def load_folder(folder: str, dtype: str, where: str) -> Any:
    """The model of `folder`, with its tower if it has one.

    Raises UserError, naming the setting `where`, if it cannot be loaded, is no decoder, or lacks
    weights, which transformers would make up.
    """
    opened_by = model_class(read_config(folder, where), folder, where)
    try:
        model, report = opened_by.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        if OTHER_SHAPES in str(error):
            raise UserError(
                f"{where}: the weights in {folder!r} have other shapes than its config.json says; "
                "expected both as save_pretrained wrote them together"
            ) from error
        raise UserError(f"{where}: cannot load {folder!r}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise UserError(
            f"{where}: {folder!r} lacks weights of its model: {', '.join(missing[:MOST_NAMED])}"
            f"{more}; expected a folder as save_pretrained writes it"
        )
    return model


def read_config(folder: str, where: str) -> Any:
    """The configuration of `folder` as transformers completes it. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAULTS as error:
        raise UserError(f"{where}: cannot load {folder!r}: {first_line(error)}") from error


def model_class(config: Any, folder: Path | str, where: str) -> Any:
    """The class that opens a folder of this configuration. Raises UserError for what is no
    decoder."""
    entries = config.to_dict()
    refuse_no_decoder(entries, folder, where)
    name = auto_class(entries)
    refuse_unknown(name, config.model_type, folder, where)
    return getattr(transformers, str(name))


def freeze_tower(model: Any) -> None:
    """Leave the language model and its head trainable. What an engine has made of a picture then
    stays valid."""
    for _, parameter in tower_parameters(model):
        parameter.requires_grad_(False)


def tower_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """What sees pictures: the parameters outside of the language model and its head, by name.

    A model of text alone has no tower, and what transformers calls its decoder may be no more than
    its head.
    """
    if model.config.get_text_config() is model.config:
        return []
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    trained = {id(parameter) for part in parts if part for parameter in part.parameters()}
    return [(name, one) for name, one in model.named_parameters() if id(one) not in trained]


def is_recurrent(model: Any) -> bool:
    """Whether a layer carries a state from token to token, in the order of the row, whatever a mask
    of attention says."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
