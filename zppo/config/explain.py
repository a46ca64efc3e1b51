"""What a Struct may hold, in words: the sentence about a value that does not fit it.

msgspec says what is wrong in its own words ("Expected int >= 1 - at $.run.steps"). A sentence of
ours names the path, the value, what was expected, and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec import inspect as shape

from zppo.config.counterparts import hint_for
from zppo.errors import closest, nearest

Key = str | int
TYPING_ERROR = 0.8
"""How alike (`difflib`) a name and a setting of its section are that one slip of the fingers lies
between; then it is no other tool's name."""


class Mistake(NamedTuple):
    """`path` is the dotted path of the setting, `sentence` says what is wrong with it, path
    included."""

    path: str
    sentence: str


def explain(message: str, data: Any, struct: type[Struct], prefix: str = "") -> Mistake:
    """Turn msgspec's message about `data`, which should have become a `struct`, into ours.

    `prefix` is the path of `data` itself, e.g. `actors.rollout.engine_args`; the sentence shows it,
    `path` does not.
    """
    problem, _, where = message.partition(" - at `")
    root = shape.type_info(struct)
    keys, found = _place(where.removesuffix("`"), data, root, [])
    node = _type_at(root, keys)
    name = re.search(r"(?:unknown|required) field `([^`]*)`", problem)
    if name is not None:
        path = dotted([*keys, name[1]])
        if "unknown" in problem:
            return Mistake(
                path,
                (
                    "there is no setting "
                    f"{_joined(prefix, path)}{nearest_setting(name[1], node, root)}"
                ),
            )
        missing = (
            f"{_joined(prefix, path)} is missing; expected {_expectation(step(node, name[1]))}"
        )
        return Mistake(path, missing)
    value = _value_at(data, keys)
    hint = closest(value, _literals(node)) if isinstance(value, str) else ""
    named = _joined(prefix, dotted(keys)) or "the whole"
    expected = _expectation(node, value)
    if not found:
        values = [
            choice.value_type for choice in choices(node) if isinstance(choice, shape.DictType)
        ]
        expected = f"each value to be {_expectation(values[0] if values else None)}"
    return Mistake(dotted(keys), f"{named} is {shown(value)}; expected {expected}{hint}")


def _place(where: str, data: Any, root: shape.Type, outer: Sequence[Key]) -> tuple[list[Key], bool]:
    """The keys of `$.cluster.hosts[...].cards`, that of the host among them, and whether all are
    known: msgspec does not say in which value of a mapping a mistake is, so the first section there
    that does not fit is looked for. `where` begins at `outer`."""
    before, within_mapping, after = where.partition("[...]")
    keys = [*outer, *_keys(before)]
    if not within_mapping:
        return keys, True
    values = [choice for choice in choices(_type_at(root, keys)) if type(choice) is shape.DictType]
    struct = values[0].value_type if values else None
    if isinstance(struct, shape.StructType):
        for name, value in _value_at(data, keys).items():
            try:
                msgspec.convert(value, struct.cls)
            except msgspec.ValidationError:
                return _place(after, data, root, [*keys, name])
    return keys, False


def _keys(where: str) -> list[Key]:
    """`$.actors.rollout.devices[0]` as keys; `key` in `$.data.fields` speaks of the mapping
    itself."""
    where = where.partition("` in `")[2] or where
    parts = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]", where.removeprefix("$"))
    return [int(index) if index else name for name, index in parts if name or index]


def _joined(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def dotted(keys: Sequence[Key]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(
        "."
    )


def _value_at(data: Any, keys: Sequence[Key]) -> Any:
    for key in keys:
        data = data[key]
    return data


MOST_SHOWN = 200
"""Characters of a value in a sentence: more than most paths have."""


def shown(value: Any) -> str:
    """A value as YAML has it, cut short, for a sentence."""
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _type_at(node: shape.Type, keys: Sequence[Key]) -> shape.Type:
    for key in keys:
        node = step(node, key) or shape.AnyType()
    return node


def step(node: shape.Type, key: Key) -> shape.Type | None:
    """The type one key further down, or None if there is no such setting."""
    for choice in choices(node):
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


def choices(node: shape.Type) -> Iterator[shape.Type]:
    """The members of a union, or the type itself, without wrappers."""
    if isinstance(node, shape.UnionType):
        for inner in node.types:
            yield from choices(inner)
    elif isinstance(node, shape.Metadata):
        yield from choices(node.type)
    else:
        yield node


def _literals(node: shape.Type) -> list[str]:
    return [
        str(value)
        for choice in choices(node)
        if isinstance(choice, shape.LiteralType)
        for value in choice.values
    ]


def nearest_setting(name: str, node: shape.Type, root: shape.Type) -> str:
    """The nearest setting of this section, else what another tool's name is called here, else a
    setting of that name in another section, else all of this section."""
    names = _names(node)
    if not names:
        return "; expected a single value there"
    if not difflib.get_close_matches(name, names, n=1, cutoff=TYPING_ERROR):
        elsewhere_called = hint_for(name)
        if elsewhere_called is not None:
            return elsewhere_called
        elsewhere = [path for path in settings(root) if path.endswith(f".{name}")]
        if elsewhere:
            return f" (did you mean {elsewhere[0]!r}?)"
    return nearest(name, names)


def _names(node: shape.Type) -> list[str]:
    """Names of the settings in a section, or of the keys that a mapping may have."""
    names: list[str] = []
    for choice in choices(node):
        if isinstance(choice, shape.StructType):
            names += [field.name for field in choice.fields]
        elif isinstance(choice, shape.DictType):
            names += _literals(choice.key_type)
    return names


def settings(node: shape.Type, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings, sections included, in the order of the configuration."""
    for choice in choices(node):
        if isinstance(choice, shape.StructType):
            for field in choice.fields:
                yield f"{prefix}{field.name}"
                yield from settings(field.type, f"{prefix}{field.name}.")


def _expectation(node: shape.Type | None, value: Any = None) -> str:
    """What a setting may be, in place of this value, in words, e.g. `a whole number of at least 1,
    or null`."""
    words = [_one_expectation(choice, value) for choice in choices(node or shape.AnyType())]
    return ", or ".join(dict.fromkeys(words))


def _one_expectation(node: shape.Type, value: Any) -> str:
    match node:
        case shape.IntType() | shape.FloatType():
            noun = "a whole number" if isinstance(node, shape.IntType) else "a number"
            return f"{noun}{_range(node, value)}"
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


def _range(node: shape.IntType | shape.FloatType, value: Any) -> str:
    """The bounds; of a very large one only a value beyond it hears."""
    lower = (
        f"of at least {node.ge}"
        if node.ge is not None
        else f"above {node.gt}"
        if node.gt is not None
        else ""
    )
    beyond = isinstance(value, int | float) and node.le is not None and value > node.le
    upper = f"at most {node.le}" if node.le is not None and (node.le < 1e9 or beyond) else ""
    limits = " and ".join(part for part in (lower, upper) if part)
    return f" {limits}" if limits else ""
