"""Numbers that a model of a given config.json has, by dtype, as `--machines` wants them: the model
is built without memory, so no weights are needed.

    python tools/model_sizes.py examples/paper.machines.yaml

prints for each model of the file that has a `config` the `tensors` and `tower` that follow from it.
Where the config says FP8, matrices of the language model are counted as such, with a scale in
bfloat16 for each block of 128 × 128; embeddings, head, norms, convolutions, the gates of linear
attention and the tower stay in bfloat16 (what Qwen's FP8 folders leave out). Layers for predicting
several tokens are not counted.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from zppo.errors import Parser, run_command
from zppo.plan.machines_file import read_machines
from zppo.training.loading import tower_parameters

BLOCK = 128
WHOLE = ("lm_head", "visual", "in_proj_a", "in_proj_b", "conv1d", "embed_tokens")
"""Parts of names of matrices that are not quantised."""


def build(config: dict[str, Any]) -> Any:
    """The model, without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))


def sizes(config: dict[str, Any], model: Any) -> dict[str, int]:
    """Numbers by dtype, tied weights once."""
    quantised = "quantization_config" in config
    found = Counter[str]()
    linear = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)
    }
    for name, tensor in model.named_parameters():
        if quantised and name in linear and not any(part in name for part in WHOLE):
            found["F8_E4M3"] += tensor.numel()
            found["BF16"] += math.prod(-(-side // BLOCK) for side in tensor.shape)
        else:
            found["BF16"] += tensor.numel()
    return dict(found)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("machines", type=Path, help="file as --machines has it")
    for name, model in read_machines(parser.parse_args().machines).models.items():
        if model.config:
            config = {key: value for key, value in model.config.items() if key != "dtype"}
            built = build(config)
            tower = sum(tensor.numel() for _, tensor in tower_parameters(built))
            print(f"{name}: tensors: {sizes(config, built)}, tower: {tower}")


if __name__ == "__main__":
    sys.exit(run_command(main))
