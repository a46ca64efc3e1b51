"""Which class of transformers opens a model folder as what it is.

A folder with a tower for pictures can often be opened by two classes: whole, or as its text half,
whose parameters have other names, so that what is saved is another model. What `architectures` in
config.json names decides. The tables are read from the source of the installed transformers,
because importing it takes longer than a plan may take to be checked.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from zppo.errors import UserError

AutoClass = Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"]
CAUSAL_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
SEEING_TABLE = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"


def auto_class(config: Mapping[str, Any]) -> AutoClass | None:
    """The class for this config.json; None for a family of which transformers has no model that
    generates text."""
    family, named = str(config.get("model_type")), config.get("architectures") or ()
    tables = _tables()
    causal, seeing = tables[CAUSAL_TABLE].get(family), tables[SEEING_TABLE].get(family)
    if seeing is not None and causal not in named:
        return "AutoModelForImageTextToText"
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
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "models/auto/modeling_auto.py"
    return {
        target.id: dict(ast.literal_eval(statement.value.args[0]))
        for statement in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in (CAUSAL_TABLE, SEEING_TABLE)
    }
