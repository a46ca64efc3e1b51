"""From a YAML file and `--set path=value` to a checked `Topology`; every mistake becomes one sentence.

A sentence names the place (file and line, or the `--set`), the path of the setting, the value, what was expected, and
the nearest valid name. What spans several settings is checked in `zppo.plan`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as shape
from msgspec.structs import replace

from zppo.config import ActorConfig, Topology
from zppo.errors import UserError, nearest
from zppo.openai_arguments import OPENAI
from zppo.sources import is_procedural
from zppo.strict_yaml import parse

Key = str | int


def load(path: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read the topology in `path`, apply `overrides` (`path=value`), and resolve relative paths against its folder.

    Raises UserError.
    """
    name = str(path)
    document = parse(_read(path), name)
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise UserError(f"{name}:1: expected a mapping of sections{nearest('', Topology.__struct_fields__)}")
    places = {place: f"{name}:{line}" for place, line in document.lines.items()}
    places[""] = name
    for override in overrides:
        _apply(override, data, places)
    return resolve(convert(data, places), path.absolute().parent)


def override(topology: Topology, overrides: Sequence[str]) -> Topology:
    """Apply `overrides` to the topology of an existing run. Raises UserError."""
    data: dict[str, Any] = msgspec.to_builtins(topology)
    places = {"": "run.json"}
    for text in overrides:
        _apply(text, data, places)
    return convert(data, places)


def resolve(topology: Topology, base: Path) -> Topology:
    """The same topology with absolute paths; relative ones are taken from `base`, `~` is the home folder.

    The model of a teacher behind a server is a name, not a path.
    """
    data, teacher, actors = topology.data, topology.teacher, topology.actors
    if teacher is not None and actors.teacher.engine != OPENAI:
        teacher = replace(teacher, model=_absolute(teacher.model, base))
    others = [replace(one, actor=_with_script(one.actor, base)) for one in topology.more_teachers]
    others = [one if one.actor.engine == OPENAI else replace(one, model=_absolute(one.model, base)) for one in others]
    data = replace(
        data,
        train=_question_source(data.train, base),
        heldout=data.heldout and _question_source(data.heldout, base),
        templates=data.templates and _absolute(data.templates, base),
    )
    return replace(
        topology,
        data=data,
        student=replace(topology.student, model=_absolute(topology.student.model, base)),
        teacher=teacher,
        more_teachers=others,
        actors=replace(actors, rollout=_with_script(actors.rollout, base), teacher=_with_script(actors.teacher, base)),
    )


def run_directory(topology: Topology) -> Path:
    """`run.directory` with `{name}` filled in, relative to the current folder."""
    return Path(topology.run.directory.replace("{name}", topology.run.name)).expanduser().absolute()


def convert(data: dict[str, Any], places: Mapping[str, str]) -> Topology:
    """Check plain data against the configuration. `places` says where each dotted path stands. Raises UserError."""
    try:
        return msgspec.convert(data, Topology)
    except msgspec.ValidationError as error:
        raise UserError(_sentence(str(error), data, places)) from None


# ---- overrides ---------------------------------------------------------------------------------------------------


def _apply(override: str, data: dict[str, Any], places: dict[str, str]) -> None:
    """Set one `path=value` in `data`; the value is read as YAML."""
    place = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{place}: expected path=value, for example run.steps=100")
    keys = path.split(".")
    _check_path(keys, place)
    value = parse(text, place).data
    section = data
    for key in keys[:-1]:
        inner = section.get(key)
        section[key] = inner if isinstance(inner, dict) else {}
        section = section[key]
    section[keys[-1]] = value
    for known in [known for known in places if known.startswith(f"{path}.")]:
        del places[known]
    places[path] = place


def _check_path(keys: list[str], place: str) -> None:
    node: shape.Type = shape.type_info(Topology)
    for depth, key in enumerate(keys):
        inner = _step(node, key)
        if inner is None:
            raise UserError(f"{place}: there is no setting {'.'.join(keys[: depth + 1])}{_nearest_setting(key, node)}")
        node = inner


# ---- sentences ---------------------------------------------------------------------------------------------------


def _sentence(message: str, data: Any, places: Mapping[str, str]) -> str:
    """Turn msgspec's message into ours."""
    problem, _, where = message.partition(" - at `")
    keys = _keys(where.removesuffix("`"))
    node = _type_at(keys)
    name = re.search(r"(?:unknown|required) field `([^`]*)`", problem)
    if name is not None:
        path = _dotted([*keys, name[1]])
        place = _place(path, places)
        if "unknown" in problem:
            return f"{place}: there is no setting {path}{_nearest_setting(name[1], node)}"
        return f"{place}: {path} is missing; expected {_expectation(_step(node, name[1]))}"
    path = _dotted(keys)
    value = _value_at(data, keys)
    hint = nearest(value, _literals(node)) if isinstance(value, str) and _literals(node) else ""
    return f"{_place(path, places)}: {path or 'the topology'} is {_shown(value)}; expected {_expectation(node)}{hint}"


def _keys(where: str) -> list[Key]:
    """`$.actors.rollout.devices[0]` as keys; `key` in `$.data.fields` speaks of the mapping itself."""
    where = where.partition("` in `")[2] or where
    parts = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]", where.removeprefix("$"))
    return [int(index) if index else name for name, index in parts if name or index]


def _dotted(keys: Sequence[Key]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _place(path: str, places: Mapping[str, str]) -> str:
    """The place of the path, or of the nearest section above it that has one."""
    while path and path not in places:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return places[path]


def _value_at(data: Any, keys: Sequence[Key]) -> Any:
    for key in keys:
        data = data[key]
    return data


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- the shape of the configuration ------------------------------------------------------------------------------


def _type_at(keys: Sequence[Key]) -> shape.Type:
    node: shape.Type = shape.type_info(Topology)
    for key in keys:
        node = _step(node, key) or shape.AnyType()
    return node


def _step(node: shape.Type, key: Key) -> shape.Type | None:
    """The type one key further down, or None if there is no such setting."""
    for choice in _choices(node):
        if isinstance(choice, shape.StructType):
            return next((field.type for field in choice.fields if field.name == key), None)
        if isinstance(choice, shape.DictType):
            allowed = _literals(choice.key_type)
            return choice.value_type if not allowed or key in allowed else None
        if isinstance(choice, shape.ListType) and isinstance(key, int):
            return choice.item_type
        if isinstance(choice, shape.AnyType):
            return choice
    return None


def _choices(node: shape.Type) -> Iterator[shape.Type]:
    """The members of a union, or the type itself, without wrappers."""
    if isinstance(node, shape.UnionType):
        for inner in node.types:
            yield from _choices(inner)
    elif isinstance(node, shape.Metadata):
        yield from _choices(node.type)
    else:
        yield node


def _literals(node: shape.Type) -> list[str]:
    return [str(value) for choice in _choices(node) if isinstance(choice, shape.LiteralType) for value in choice.values]


def _nearest_setting(name: str, node: shape.Type) -> str:
    """The nearest setting of this section, else one of that name in another section, else all of this section."""
    names = _names(node)
    if not names:
        return "; expected a single value there"
    if not difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        elsewhere = [path for path in settings() if path.endswith(f".{name}")]
        if elsewhere:
            return f" (did you mean {elsewhere[0]!r}?)"
    return nearest(name, names)


def _names(node: shape.Type) -> list[str]:
    """Names of the settings in a section, or of the keys that a mapping may have."""
    names: list[str] = []
    for choice in _choices(node):
        if isinstance(choice, shape.StructType):
            names += [field.name for field in choice.fields]
        elif isinstance(choice, shape.DictType):
            names += _literals(choice.key_type)
    return names


def settings(node: shape.Type | None = None, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings, sections included, in the order of the configuration."""
    for choice in _choices(node or shape.type_info(Topology)):
        if isinstance(choice, shape.StructType):
            for field in choice.fields:
                yield f"{prefix}{field.name}"
                yield from settings(field.type, f"{prefix}{field.name}.")


def _expectation(node: shape.Type | None) -> str:
    """What a setting may be, in words, e.g. `a whole number of at least 1, or null`."""
    words = [_one_expectation(choice) for choice in _choices(node or shape.AnyType())]
    return ", or ".join(dict.fromkeys(words))


def _one_expectation(node: shape.Type) -> str:
    match node:
        case shape.IntType() | shape.FloatType():
            return f"{'a whole number' if isinstance(node, shape.IntType) else 'a number'}{_range(node)}"
        case shape.StrType():
            return "a text"
        case shape.BoolType():
            return "true or false"
        case shape.NoneType():
            return "null"
        case shape.LiteralType():
            return f"one of {', '.join(map(str, node.values))}"
        case shape.ListType():
            return f"a list, each item {_expectation(node.item_type)}"
        case shape.DictType():
            keys = _literals(node.key_type)
            return f"a mapping with the keys {', '.join(keys)}" if keys else "a mapping"
        case shape.StructType():
            return "a section of settings"
        case _:
            return "any value"


def _range(node: shape.IntType | shape.FloatType) -> str:
    lower = f"of at least {node.ge}" if node.ge is not None else f"above {node.gt}" if node.gt is not None else ""
    upper = f"at most {node.le}" if node.le is not None and node.le < 1e9 else ""
    limits = " and ".join(part for part in (lower, upper) if part)
    return f" {limits}" if limits else ""


# ---- paths -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        raise UserError(f"{path}: there is no such topology{nearest(path.name, close) if close else ''}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start + 1})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _absolute(path: str, base: Path) -> str:
    return str((base / Path(path).expanduser()).absolute())


def _question_source(source: str, base: Path) -> str:
    """Procedural questions have a specification instead of a path."""
    return source if is_procedural(source) else _absolute(source, base)


def _with_script(config: ActorConfig, base: Path) -> ActorConfig:
    """The simulated engine's script is a path as well."""
    script = config.engine_args.get("script")
    if not isinstance(script, str):
        return config
    return replace(config, engine_args={**config.engine_args, "script": _absolute(script, base)})
