"""Which class of transformers opens a model folder as what it is.

A folder with a tower for pictures can often be opened by two classes: whole, or as its text half,
whose parameters have other names, so that what is saved is another model. What `architectures` in
config.json names decides. The tables are read from the source of the installed transformers,
because importing it takes longer than a plan may take to be checked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from zppo.errors import UserError
from zppo.plan.model_defaults import tables

AutoClass = Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"]
SEEING: AutoClass = "AutoModelForImageTextToText"
CAUSAL_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
SEEING_TABLE = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"


def auto_class(config: Mapping[str, Any]) -> AutoClass | None:
    """The class for this config.json; None for a family of which transformers has no model that
    generates text. Of several `architectures` the first one that is known decides."""
    family, named, known = str(config.get("model_type")), config.get("architectures"), _tables()
    causal, seeing = known[CAUSAL_TABLE].get(family), known[SEEING_TABLE].get(family)
    listed = named if isinstance(named, list) else []
    first = next((one for one in listed if one in (causal, seeing)), None)
    if seeing is not None and (first is None or first != causal):
        return SEEING
    return None if causal is None else "AutoModelForCausalLM"


def refuse_unknown(found: AutoClass | None, family: str, folder: Path | str, where: str) -> None:
    """Raise UserError for a folder that `auto_class` has `found` no class for."""
    if found is None:
        raise UserError(
            f"{where}: {str(folder)!r} ({family}) is of no family that the installed transformers "
            "generates text with; expected one of docs/models.md"
        )


@functools.cache
def _tables() -> dict[str, dict[str, str]]:
    """Class names by model type."""
    return tables("modeling_auto.py", CAUSAL_TABLE, SEEING_TABLE)
