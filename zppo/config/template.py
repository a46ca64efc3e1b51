"""`zppo init`: a commented topology with every setting at its default, ready to be edited; with
`--like`, the settings that another tool has, at its defaults, with its names in the comments.

The text is made from the configuration itself, so it cannot fall behind it; only the paths of the
three things that have no default (questions, student, teacher) are examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect as shape
from msgspec.structs import replace

from zppo.config.counterparts import ABSENT, COUNTERPARTS, KEPT, TITLES, TOOLS, Tool
from zppo.config.docstrings import setting_help
from zppo.config.topology import DataConfig, StudentConfig, TeacherConfig, Topology
from zppo.errors import UserError

HEADING = """\
# A run of zppo: every setting with its default. Delete what you do not change. Check it with
#   zppo launch FILE --dry-run
"""
LIKE = """\
# A run of zppo that does what {title}'s GRPO does by default. Behind each setting is its name
# there; docs/topology.md says what it means here, and docs/from_{tool}.md shows a whole script
# beside its topology. Check this file with
#   zppo launch FILE --dry-run
"""
EXAMPLE = Topology(
    data=DataConfig(train="questions.jsonl"),
    student=StudentConfig(model="models/student"),
    teacher=TeacherConfig(model="models/teacher"),
)
ORDER = ("run", "method", "data", "student", "teacher", "scheduler", "optimizer", "actors")
"""Sections that come first; the others follow in the order of the configuration."""


def commented_topology() -> str:
    """The YAML text of `EXAMPLE` with a comment on every setting."""
    helps = dict(setting_help(shape.type_info(Topology)))
    return HEADING + _sections(msgspec.to_builtins(EXAMPLE), helps)


def topology_like(tool: Tool) -> str:
    """The YAML text of what `tool`'s GRPO does by default: the settings that it has too, each with
    its name there as a comment."""
    values: dict[str, Any] = msgspec.to_builtins(replace(EXAMPLE, teacher=None))
    comments: dict[str, str] = {}
    for one in COUNTERPARTS:
        called, default = ", ".join(one.names(tool)), one.values[TOOLS.index(tool)]
        if called or default is not KEPT:
            comments[one.ours] = "; ".join(filter(None, [called, one.note]))
        if default is not KEPT:
            section, _, setting = one.ours.rpartition(".")
            _value(values, section.split("."))[setting] = default
    shown = {name.partition(".")[0] for name in comments}
    for path, meaning in setting_help(shape.type_info(Topology)):
        if path in shown:
            comments[path] = meaning
    text = _sections(values, comments)
    return LIKE.format(title=TITLES[tool], tool=tool) + text


def write_topology(path: Path, like: Tool | None = None) -> None:
    """Write the commented topology to a new file. Raises UserError if it is there already or cannot
    be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(commented_topology() if like is None else topology_like(like))
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


def names_of(tool: Tool) -> str:
    """A Markdown table: what the tool calls a setting, its name here, what differs; then what is
    not here."""
    rows = [f"| {TITLES[tool]} | here | |", "|---|---|---|"]
    for one in COUNTERPARTS:
        if names := one.names(tool):
            rows.append(f"| {_code(names)} | `{one.ours}` | {one.note} |")
    rows += [f"| {_code(names.split())} | – | {reason} |" for reason, names in ABSENT.items()]
    return "\n".join(rows) + "\n"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


_ABSENT = object()


def _value(values: Any, keys: list[str]) -> Any:
    """The value at a path; `_ABSENT` below an optional section that is null by default."""
    for key in keys:
        if not isinstance(values, dict):
            return _ABSENT
        values = values[key]
    return values


def _sections(values: dict[str, Any], comments: Mapping[str, str]) -> str:
    """All sections with the settings that have a comment, each after an empty line."""
    names = [*ORDER, *(name for name in values if name not in ORDER)]
    parts = [list(_section(name, values[name], name, comments)) for name in names]
    return "".join("\n" + "\n".join(part) + "\n" for part in parts if part)


def _section(name: str, value: Any, path: str, comments: Mapping[str, str]) -> Iterator[str]:
    depth = path.count(".")
    indent = "  " * depth
    comment = comments.get(path)
    if isinstance(value, dict) and value:
        inner = [
            line
            for key, item in value.items()
            for line in _section(key, item, f"{path}.{key}", comments)
        ]
        heading = f"{indent}{name}:"
        if inner and depth == 0:
            yield from (f"# {comment}.", heading)
        elif inner:
            yield f"{heading}  # {comment}" if comment else heading
        yield from inner
    elif comment:
        yield f"{indent}{name}: {_scalar(value)}  # {comment}"


def _scalar(value: Any) -> str:
    """One value in YAML's flow style."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
