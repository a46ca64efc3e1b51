"""What a config.json leaves out: the defaults of its family in the installed transformers.

Files on the hub often hold only what differs from them (Gemma 3, LLaVA). They are read from the
source, because importing transformers takes longer than a plan may take to be checked.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zppo.plan.architecture import ALIASES

CLASSES, FOLDERS = "CONFIG_MAPPING_NAMES", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
"""Tables of `auto_mappings.py`: of a family its configuration's class, and its folder where that
has another name."""


def models_source() -> Path:
    """The folder of transformers with a folder for each family."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "models"


def tables(file: str, *names: str) -> dict[str, dict[str, str]]:
    """Tables of these names in a file of transformers' `auto`, each by model type."""
    source = (models_source() / "auto" / file).read_text(encoding="utf-8")
    return {
        target.id: dict(ast.literal_eval(statement.value.args[0]))
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in names
    }


def completed(text: Mapping[str, Any]) -> dict[str, Any]:
    """`text`, the text section of a config.json, with what its family has for what it leaves out;
    as it is for an unknown family."""
    renamed = {name for name, older in ALIASES.items() if any(one in text for one in older)}
    defaults = _defaults(str(text.get("model_type")))
    return {name: value for name, value in defaults.items() if name not in renamed} | dict(text)


@functools.cache
def _defaults(family: str) -> Mapping[str, Any]:
    known = _tables()
    if family not in known[CLASSES]:
        return {}
    folder = known[FOLDERS].get(family, family.replace("-", "_"))
    for file in sorted((models_source() / folder).glob("configuration_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == known[CLASSES][family]:
                return dict(_values(node))
    return {}


def _values(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration that are numbers, products of numbers, words or switches."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match field.value:
                case ast.Constant(value=value):
                    yield field.target.id, value
                case ast.BinOp(ast.Constant(value=int(a)), ast.Mult(), ast.Constant(value=int(b))):
                    yield field.target.id, a * b


@functools.cache
def _tables() -> dict[str, dict[str, str]]:
    return tables("auto_mappings.py", CLASSES, FOLDERS)
