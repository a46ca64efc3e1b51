"""`zppo init`: a commented topology with every setting at its default, ready to be edited.

The text is made from the configuration itself, so it cannot fall behind it; only the paths of the
three things that have no default (questions, student, teacher) are examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect as shape

from zppo.config.docstrings import setting_help
from zppo.config.topology import DataConfig, ModelConfig, TeacherConfig, Topology
from zppo.errors import UserError

HEADING = """\
# A run of zppo: every setting with its default. Delete what you do not change. Check it with
#   python -m zppo.launch --topology FILE --dry-run
"""
EXAMPLE = Topology(
    data=DataConfig(train="questions.jsonl"),
    student=ModelConfig(model="models/student"),
    teacher=TeacherConfig(model="models/teacher"),
)
ORDER = ("run", "method", "data", "student", "teacher", "scheduler", "optimizer", "actors")
"""Sections that come first; the others follow in the order of the configuration."""


def commented_topology() -> str:
    """The YAML text of `EXAMPLE` with a comment on every setting."""
    values: dict[str, Any] = msgspec.to_builtins(EXAMPLE)
    names = [*ORDER, *(name for name in values if name not in ORDER)]
    helps = dict(setting_help(shape.type_info(Topology)))
    parts = ["\n".join(_section(name, values[name], name, helps)) for name in names]
    return HEADING + "".join(f"\n{part}\n" for part in parts)


def write_topology(path: Path) -> None:
    """Write the commented topology to a new file. Raises UserError if it is there already or cannot
    be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(commented_topology())
    except FileExistsError:
        raise UserError(f"{path}: exists already; expected the name of a new file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def reference() -> str:
    """A Markdown table of all settings: path, default, meaning."""
    values: dict[str, Any] = msgspec.to_builtins(EXAMPLE)
    required = {"data.train", "student.model", "teacher.model"}
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for path, meaning in setting_help(shape.type_info(Topology)):
        value = _value(values, path.split("."))
        if isinstance(value, dict) and value:
            rows.append(f"| **{path}** | | {meaning} |")
        elif value is not _ABSENT:
            default = "required" if path in required else f"`{_scalar(value)}`"
            rows.append(f"| `{path}` | {default} | {meaning} |")
    return "\n".join(row.replace("|X_new|", "\\|X_new\\|") for row in rows) + "\n"


_ABSENT = object()


def _value(values: Any, keys: list[str]) -> Any:
    """The value at a path; `_ABSENT` below an optional section that is null by default."""
    for key in keys:
        if not isinstance(values, dict):
            return _ABSENT
        values = values[key]
    return values


def _section(name: str, value: Any, path: str, helps: Mapping[str, str]) -> Iterator[str]:
    depth = path.count(".")
    indent = "  " * depth
    if isinstance(value, dict) and value:
        heading = f"{indent}{name}:"
        if depth == 0:
            yield from (f"# {helps[path]}.", heading)
        else:
            yield f"{heading}  # {helps[path]}"
        for key, inner in value.items():
            yield from _section(key, inner, f"{path}.{key}", helps)
    else:
        yield f"{indent}{name}: {_scalar(value)}  # {helps[path]}"


def _scalar(value: Any) -> str:
    """One value in YAML's flow style."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
