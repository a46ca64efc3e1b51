"""The rules of the house, read from the source itself: who may import whom, and what may not be called at all."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "zppo_protocol": ROOT / "protocol/zppo_protocol",
    "zppo_kernels": ROOT / "kernels/zppo_kernels",
    "zppo": ROOT / "zppo",
    "zppo_actors": ROOT / "actors/zppo_actors",
}
MAY_IMPORT = {
    "zppo_protocol": set(),
    "zppo_kernels": set(),
    "zppo": {"zppo_protocol", "zppo_kernels"},
    "zppo_actors": {"zppo_protocol", "zppo_kernels", "zppo"},
}
ROLES = {"controller", "rollout", "teacher", "grader", "trainer", "supervisor"}
SIDE_DOORS = {"zppo_actors/__main__.py": {"supervisor"}}
"""Where one role is named on purpose: the command line hands over to the supervisor."""
PURE_BANNED = {"socket", "subprocess", "multiprocessing", "threading", "asyncio", "time"}
DOORS = {"launch", "report", "evaluate", "compare", "cli", "init", "__main__", "run_dir", "plan", "processes"}
"""Files of `zppo` at the edge: they look at the machine, the clock or the command line."""


def sources() -> list[Path]:
    return [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`zppo_actors/engines/slots.py` for a file of ours."""
    package = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    return str(path.relative_to(package.parent))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # relative imports stay in their package
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(rule: Callable[[Path], Iterable[str]]) -> dict[str, list[str]]:
    """What `rule` finds in each file of ours; files without a finding are left out."""
    found = {name_of(path): sorted(rule(path)) for path in sources()}
    return {name: findings for name, findings in found.items() if findings}


def upward_imports(path: Path) -> set[str]:
    package = name_of(path).split("/")[0]
    ours = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
    return ours - {package} - MAY_IMPORT[package]


def sideways_imports(path: Path) -> set[str]:
    """Roles that an actor imports other than its own."""
    roles = {part.split(".")[1] for part in imports(path) if part.startswith("zppo_actors.")} & ROLES
    return roles - {path.stem} - SIDE_DOORS.get(name_of(path), set())


def impure_imports(path: Path) -> set[str]:
    parts = Path(name_of(path)).with_suffix("").parts
    in_the_mind = parts[0] == "zppo" and parts[1] not in DOORS
    return {name.split(".")[0] for name in imports(path)} & PURE_BANNED if in_the_mind else set()


def test_imports_go_down_only() -> None:
    assert violations(upward_imports) == {}


def test_actors_do_not_import_each_other() -> None:
    assert violations(sideways_imports) == {}


def test_the_mind_is_pure() -> None:
    assert violations(impure_imports) == {}


def test_one_file_imports_zmq() -> None:
    users = [name_of(path) for path in sources() if any(name.split(".")[0] == "zmq" for name in imports(path))]
    assert users == ["zppo_protocol/sockets.py"]


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
BANNED_NAMES = {"eval", "exec", "recv_pyobj", "send_pyobj", "recv_string"}
BANNED_DOTTED = {"torch.load", "os.system", "yaml.load", "yaml.unsafe_load", "subprocess.getoutput"}
WILDCARD = re.compile(r"tcp://(\*|0\.0\.0\.0)")


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Calls and texts that may not stand in product code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            # `model.eval()` switches dropout off; only the builtin is meant.
            if called in BANNED_NAMES | BANNED_DOTTED or called.rpartition(".")[2] in BANNED_NAMES - {"eval", "exec"}:
                yield called
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false(keyword.value):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WILDCARD.search(node.value):
            yield node.value


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_forbidden_calls_are_absent() -> None:
    assert violations(lambda path: {name.split(".")[0] for name in imports(path)} & BANNED_MODULES) == {}
    assert violations(lambda path: forbidden(tree_of(path))) == {}


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "torch.load(path)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "socket.recv_pyobj()",
        "address = 'tcp://*:5555'",
        "np.load(f, allow_pickle=flag)",
    ],
)
def test_forbidden_calls_are_found(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


def test_every_file_says_what_it_is() -> None:
    silent = [name_of(path) for path in sources() if path.stat().st_size and not ast.get_docstring(tree_of(path))]
    assert silent == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_stay_short(package: str) -> None:
    """Lines of the body; a kernel's list of arguments is not what makes it hard to read."""
    lengths = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or 0) - node.body[0].lineno + 1
        for path in PACKAGES[package].rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("zppo_protocol.sockets, zppo_protocol.leases, zppo_protocol.credits", "torch, transformers, pandas, yaml"),
        ("zppo.launch, zppo.cli, zppo.init", "torch, transformers, zmq"),
        ("zppo.scheduler", "torch, transformers, zmq"),
        ("zppo_actors.supervisor, zppo_actors.controller, zppo_actors.grader", "torch, transformers"),
    ],
)
def test_light_modules_stay_light(modules: str, absent: str) -> None:
    program = f"import sys, {modules}; print([m for m in '{absent}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_readme_names_the_commands_of_the_makefile() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", readme))
    assert {"quickstart", "test"} <= named
    assert named <= set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.MULTILINE))
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_lock_pins_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[^A-Za-z0-9-]", text)[0].lower() for text in wanted}
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned
