"""YAML as people expect it: no duplicate keys, `1e-6` is a number, `no` is a text, and every value
has a line.

PyYAML resolves scalars by YAML 1.1, where `1e-6` is a text and `no` is false; this loader follows
the core schema of YAML 1.2. Only plain data comes out: texts, numbers, true, false, null, lists and
mappings; other tags (`!!binary`, `!!timestamp`, `!!set`) and merge keys are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from zppo.errors import UserError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
"""Values with their aliases written out; a topology has some hundred, a bomb of aliases has
billions."""
MOST_DIGITS = 19
"""Of a whole number of 64 bits."""


class Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 core scalars."""


PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
Loader.yaml_implicit_resolvers = {}
# Under None stands what refuses a tag that has no constructor.
Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in {f"tag:yaml.org,2002:{name}" for name in PLAIN}
}

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first
    )


def _construct_str(loader: Loader, node: yaml.ScalarNode) -> str:
    """JSON writes a character beyond U+FFFF as two escapes, each half a surrogate pair; what PyYAML
    makes of them is put together here. A half alone no file and no message could hold."""
    text: str = loader.construct_scalar(node)
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        problem = f"the text {text[:40]!r} holds half a surrogate pair"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # Python refuses to read thousands of digits.
    value = int(text) if len(text.lstrip("+-0")) <= MOST_DIGITS else None
    if value is None or not -(2**63) <= value < 2**63:  # no file and no message of ours could hold
        problem = f"the whole number {text[:40]} does not fit into 64 bits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    value = float(text)
    if math.isinf(value):  # run.json, which actors read, would hold null in its place
        problem = f"the number {text[:40]} is too large"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


# PyYAML's own constructors would read 010 as octal and 1:30 as ninety.
Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class Document:
    """The plain data of one YAML text, and the 1-based line of each dotted path in it."""

    def __init__(self, data: Any, lines: dict[str, int]) -> None:
        self.data = data
        self.lines = lines


def parse(text: str, name: str) -> Document:
    """Parse one YAML document. Raises UserError naming `name`, the line and what is wrong."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{name}: has {len(text)} characters; a topology has at most {MAX_BYTES}")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, {})
        walk = _Walk(name)
        walk.visit(node, "")
        return Document(loader.construct_document(node), walk.lines)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: not YAML: {_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{name}:{number}: not YAML: the character U+{error.character:04X} may not stand in it"
        ) from None
    except RecursionError:
        raise UserError(f"{name}: is nested too deeply, or an alias refers to itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: not YAML: {error}") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    """What PyYAML says is wrong; where it only says what was found, with what was expected."""
    problem = error.problem or ""
    told = [] if problem and not problem.startswith("but ") else [error.context or ""]
    return ", ".join(filter(None, [*told, problem]))


class _Walk:
    """Notes the line of every path; refuses duplicate keys and keys that are not texts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, int] = {}
        self.values = 0

    def visit(self, node: yaml.Node, path: str) -> None:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.values += 1
        if self.values > MAX_VALUES:
            raise UserError(
                f"{self.name}: holds more than {MAX_VALUES} values; is an alias repeated in "
                "aliases?"
            )
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, f"{path}[{index}]")
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)

    def _visit_mapping(self, node: yaml.MappingNode, path: str) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise UserError(
                    f"{self.name}:{line}: a key is not a text; expected the name of a setting"
                )
            child = f"{path}.{key.value}" if path else key.value
            if key.value in seen:
                raise UserError(
                    f"{self.name}:{line}: {child} is given twice, first on line {seen[key.value]}"
                )
            seen[key.value] = line
            self.lines[child] = line
            self.visit(value, child)
