"""What is to be evaluated, and how: the order that `zppo.evaluate` hands to the process that does
it.

A model is named as a run directory (its newest whole checkpoint), a checkpoint `step-N`, or a model
folder. What a run directory knows about its questions and prompts is the default for what the
command line leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.config.served import ServedModel
from zppo.config.topology import (
    ActorConfig,
    DataConfig,
    ModelConfig,
    ResponseSampling,
    Topology,
)
from zppo.errors import UserError
from zppo.plan.model_folder import TEXT_SECTION, inspect_model
from zppo.records import checkpoint, run_directory
from zppo_protocol.values import TemplateValue

PAPER_SAMPLING = ResponseSampling(
    max_new_tokens=12_288, temperature=0.6, top_p=0.95, top_k=20, presence_penalty=1.5
)
"""The paper's decoding for evaluation (Table 8)."""
DTYPES = ("float32", "bfloat16", "float16")


class EvaluationOrder(Struct, frozen=True, kw_only=True):
    """Everything the evaluating process is told; it travels as JSON on its command line."""

    label: str
    """The model as the user named it."""
    data: DataConfig
    served: ServedModel
    judge: ServedModel | None = None
    samples: int = 4
    limit: int | None = None
    seed: int = 0
    grader_seconds: float = 5.0
    out: str | None = None
    json: bool = False
    notes: list[str] = []


class Located(Struct, frozen=True, kw_only=True):
    """A model folder, the topology of the run that it came from, if any, and what there is to say
    about it."""

    folder: Path
    topology: Topology | None = None
    notes: list[str] = []


def served_as(option: str, model: ModelConfig, actor: ActorConfig) -> ServedModel:
    """The model that `option` of the command line names; nothing trains it."""
    return ServedModel(
        role="teacher", model=model, actor=actor, model_path=option, actor_path=option
    )


def locate_model(path: Path) -> Located:
    """Find the model folder that `path` stands for. Raises UserError."""
    if (path / "run.json").is_file():
        found = checkpoint.find_latest(path)
        if found.folder is None:
            torn = f" ({found.warnings[0]})" if found.warnings else ""
            raise UserError(f"--model: the run {str(path)!r} has no whole checkpoint yet{torn}")
        folder = found.folder / checkpoint.MODEL
        return Located(
            folder=folder,
            topology=run_directory.read(path).topology,
            notes=[f"{folder}", *found.warnings],
        )
    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
        run = path.absolute().parent.parent
        topology = run_directory.read(run).topology if (run / "run.json").is_file() else None
        return Located(folder=path / checkpoint.MODEL, topology=topology)
    return Located(folder=path)


def served_folder(
    located: Located,
    sampling: ResponseSampling,
    dtype: str | None,
    engine: str,
    where: str,
    chat_template_kwargs: Mapping[str, TemplateValue],
) -> tuple[ModelConfig, list[str]]:
    """The settings of a model folder: its own dtype unless another is asked for, and no more tokens
    than fit.

    Raises UserError if the folder is no usable model. The simulated engine needs none.
    """
    if engine == "simulated":
        return ModelConfig(model=str(located.folder), dtype="float32", sampling=sampling), []
    context = inspect_model(located.folder, where).context
    chosen: Any = dtype or _own_dtype(located.folder)
    notes = []
    if sampling.max_new_tokens >= context:
        notes.append(
            f"responses have at most {context - 1} tokens less the prompt's, the context of the "
            f"model, instead of {sampling.max_new_tokens}"
        )
        sampling = msgspec.structs.replace(sampling, max_new_tokens=context - 1)
    return ModelConfig(
        model=str(located.folder.absolute()),
        dtype=chosen,
        sampling=sampling,
        chat_template_kwargs=dict(chat_template_kwargs),
    ), notes


def _own_dtype(folder: Path) -> str:
    """The dtype that `config.json` names, of the model or of its text half; float32 if it names
    none that we serve."""
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    named = [
        part.get(name)
        for part in (config, config.get(TEXT_SECTION, {}))
        for name in ("dtype", "torch_dtype")
    ]
    return next((one for one in named if one in DTYPES), "float32")
