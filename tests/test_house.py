"""The rules of the house, read from the source itself: who may import whom, and what may not be
called at all."""

from __future__ import annotations

import ast
import functools
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from zppo.cli import DOORS, READ_TOKENIZERS

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "zppo_protocol": ROOT / "protocol/zppo_protocol",
    "zppo_kernels": ROOT / "kernels/zppo_kernels",
    "zppo": ROOT / "zppo",
    "zppo_actors": ROOT / "actors/zppo_actors",
}
BESIDE = {name: ROOT / name for name in ("benches", "examples", "tools")}
"""Programs beside the packages, which are as short and say as well what they are."""
ROOMS: dict[str, set[str]] = {
    "zppo_protocol": set(),
    "zppo_kernels": set(),
    "zppo.signals": set(),
    "zppo.errors": {"zppo.signals"},
    "zppo.extensions": {"zppo.errors"},
    "zppo.config": {"zppo.errors", "zppo.extensions", "zppo_protocol"},
    "zppo.grading": {"zppo.config", "zppo.errors", "zppo.extensions", "zppo_protocol"},
    "zppo.data": {
        "zppo.config",
        "zppo.errors",
        "zppo.extensions",
        "zppo.grading",
        "zppo_protocol",
    },
    "zppo.prompting": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.grading",
        "zppo_protocol",
    },
    "zppo.curation": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.grading",
        "zppo.prompting",
        "zppo_protocol",
    },
    "zppo.algorithm": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.extensions",
        "zppo.prompting",
        "zppo_protocol",
    },
    "zppo.plan": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.extensions",
        "zppo.grading",
        "zppo.prompting",
        "zppo_protocol",
    },
    "zppo.records": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.errors",
        "zppo.grading",
        "zppo.plan",
        "zppo_protocol",
    },
    "zppo.diagnosis": {"zppo.errors", "zppo.records"},
    "zppo.scheduling": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.grading",
        "zppo.prompting",
        "zppo_protocol",
    },
    "zppo.simulation": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.plan",
        "zppo.prompting",
        "zppo.scheduling",
        "zppo_protocol",
    },
    "zppo.capacity": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.records",
        "zppo.signals",
        "zppo.simulation",
    },
    "zppo.training": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
        "zppo_kernels",
        "zppo_protocol",
    },
    "zppo.evaluation": {
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.records",
        "zppo.scheduling",
        "zppo_protocol",
    },
    "zppo.report": {
        "zppo.data",
        "zppo.diagnosis",
        "zppo.errors",
        "zppo.records",
        "zppo_protocol",
    },
    "zppo.comparison": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.records",
        "zppo.report",
    },
    "zppo.suites": {
        "zppo.config",
        "zppo.errors",
        "zppo.records",
        "zppo.report",
    },
    "zppo.launch": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
    },
    "zppo.plan_command": {
        "zppo.capacity",
        "zppo.config",
        "zppo.errors",
        "zppo.launch",
        "zppo.plan",
        "zppo.records",
        "zppo.simulation",
    },
    "zppo.evaluate_suite": {
        "zppo.config",
        "zppo.errors",
        "zppo.evaluation",
        "zppo.plan",
        "zppo.prompting",
        "zppo.suites",
    },
    "zppo.evaluate": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.evaluation",
        "zppo.plan",
        "zppo.prompting",
        "zppo.evaluate_suite",
    },
    "zppo.join": {"zppo.config", "zppo.errors"},
    "zppo.render": {"zppo.algorithm", "zppo.config", "zppo.errors", "zppo.plan"},
    "zppo.grade": {"zppo.config", "zppo.data", "zppo.errors", "zppo.grading"},
    "zppo.compare": {
        "zppo.comparison",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.launch",
        "zppo.plan",
        "zppo.records",
        "zppo.signals",
    },
    "zppo.data_command": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.evaluation",
        "zppo.grading",
        "zppo.plan",
        "zppo.prompting",
        "zppo_protocol",
    },
    "zppo.build_data": {"zppo.curation", "zppo.errors"},
    "zppo.sample_videos": {"zppo.config", "zppo.data", "zppo.errors", "zppo_protocol"},
    "zppo.timeline": {"zppo.config", "zppo.errors", "zppo.records"},
    "zppo.quickstart": {"zppo.errors", "zppo.report", "zppo.signals"},
    "zppo.cli": {"zppo.config", "zppo.errors", "zppo.prompting"},
    "zppo.__main__": {"zppo.cli"},
    "zppo_actors.runtime": {"zppo.records", "zppo_protocol"},
    "zppo_actors.membership": {"zppo.errors", "zppo_protocol"},
    "zppo_actors.timeline": {"zppo.records"},
    "zppo_actors.own_time": set(),
    "zppo_actors.process": {
        "zppo.config",
        "zppo.errors",
        "zppo.records",
        "zppo.signals",
        "zppo_actors.runtime",
        "zppo_actors.timeline",
        "zppo_protocol",
    },
    "zppo_actors.nursery": {"zppo.signals", "zppo_actors.process"},
    "zppo_actors.weights": {
        "zppo.errors",
        "zppo.records",
        "zppo_actors.membership",
        "zppo_actors.process",
        "zppo_protocol",
    },
    "zppo_actors.engines": {
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.extensions",
        "zppo.plan",
        "zppo.prompting",
        "zppo.signals",
        "zppo.training",
        "zppo_actors.weights",
        "zppo_kernels",
        "zppo_protocol",
    },
    "zppo_actors.grading": {
        "zppo.config",
        "zppo.errors",
        "zppo.grading",
        "zppo.signals",
        "zppo_protocol",
    },
    "zppo_actors.grader": {
        "zppo.config",
        "zppo.errors",
        "zppo.grading",
        "zppo.records",
        "zppo_actors.grading",
        "zppo_actors.membership",
        "zppo_actors.process",
        "zppo_protocol",
    },
    "zppo_actors.sampler": {
        "zppo.config",
        "zppo.errors",
        "zppo.records",
        "zppo_actors.engines",
        "zppo_actors.membership",
        "zppo_actors.process",
        "zppo_actors.weights",
        "zppo_protocol",
    },
    "zppo_actors.trainer": {
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.records",
        "zppo.training",
        "zppo_actors.membership",
        "zppo_actors.process",
        "zppo_actors.runtime",
        "zppo_actors.weights",
        "zppo_protocol",
    },
    "zppo_actors.sinks": {
        "zppo.config",
        "zppo.errors",
        "zppo.extensions",
        "zppo.plan",
        "zppo.records",
    },
    "zppo_actors.controller": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.diagnosis",
        "zppo.errors",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
        "zppo.scheduling",
        "zppo_actors.own_time",
        "zppo_actors.process",
        "zppo_actors.runtime",
        "zppo_actors.sinks",
        "zppo_protocol",
    },
    "zppo_actors.evaluator": {
        "zppo.algorithm",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.evaluation",
        "zppo.grading",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
        "zppo_actors.engines",
        "zppo_actors.grading",
        "zppo_actors.process",
        "zppo_protocol",
    },
    "zppo_actors.suites": {
        "zppo.data",
        "zppo.errors",
        "zppo.grading",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
        "zppo.report",
        "zppo.signals",
        "zppo.suites",
        "zppo_actors.engines",
        "zppo_actors.evaluator",
        "zppo_actors.own_time",
        "zppo_actors.runtime",
        "zppo_protocol",
    },
    "zppo_actors.calibrator": {
        "zppo.algorithm",
        "zppo.capacity",
        "zppo.config",
        "zppo.data",
        "zppo.errors",
        "zppo.grading",
        "zppo.plan",
        "zppo.prompting",
        "zppo.records",
        "zppo.simulation",
        "zppo.training",
        "zppo_actors.engines",
        "zppo_actors.process",
        "zppo_actors.weights",
        "zppo_protocol",
    },
    "zppo_actors.supervisor": {
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.records",
        "zppo.signals",
        "zppo_actors.nursery",
        "zppo_actors.own_time",
        "zppo_actors.runtime",
        "zppo_actors.timeline",
        "zppo_protocol",
    },
    "zppo_actors.hosts": {
        "zppo.config",
        "zppo.errors",
        "zppo.plan",
        "zppo.signals",
        "zppo_actors.own_time",
        "zppo_actors.process",
        "zppo_actors.runtime",
        "zppo_actors.supervisor",
        "zppo_actors.timeline",
        "zppo_protocol",
    },
    "zppo_actors.audit": {
        "zppo.data",
        "zppo.errors",
        "zppo_actors.grading",
        "zppo_actors.process",
    },
    "zppo_actors.__main__": {
        "zppo.errors",
        "zppo.signals",
        "zppo_actors.audit",
        "zppo_actors.calibrator",
        "zppo_actors.evaluator",
        "zppo_actors.hosts",
        "zppo_actors.nursery",
        "zppo_actors.process",
        "zppo_actors.suites",
        "zppo_actors.supervisor",
    },
}
"""Every room, from the ground up, and the rooms it imports: no more than these, and no fewer."""
PURE = ("algorithm", "scheduling", "simulation", "config", "prompting", "grading")
"""Rooms of `zppo` without sockets, clocks, threads, processes or files; time is an argument there."""
SYSTEM = {"socket", "zmq", "subprocess", "multiprocessing", "threading", "asyncio", "time"}
OUTSIDE = {
    "zppo/capacity/measuring.py",
    "zppo/compare.py",
    "zppo/plan/cards.py",
    "zppo/plan/server.py",
    "zppo/plan/sinks.py",
    "zppo/plan_command.py",
    "zppo/quickstart.py",
    "zppo/signals.py",
}
"""Files of `zppo` that look at the clock, at a port or start a process: one has a process measure,
one runs several runs, one has a process ask cards, one waits for a server, one looks whether a port
is free, one searches for a bounded time, one runs one run and reports on it, one counts two signals
that come together as one."""
READS_FILES = {
    "zppo/config/load.py",
    "zppo/config/template.py",
    "zppo/prompting/prompts.py",
    "zppo/prompting/tokenization.py",
}
"""The files of pure rooms that may touch files all the same: the topology, and what prompts are made of."""
FILE_CALLS = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "from_pretrained"),
    *("exists", "is_file", "is_dir", "iterdir", "glob", "rglob", "stat", "cwd"),
    *("mkdir", "touch", "unlink", "rmdir", "rmtree"),
}


def sources(folders: Iterable[Path] = PACKAGES.values()) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def all_sources() -> list[Path]:
    return sources([*PACKAGES.values(), *BESIDE.values()])


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`zppo_actors/engines/transformers/slots.py` for a file of a package, `tools/try_suites.py` for
    one beside them."""
    packages = [folder for folder in PACKAGES.values() if path.is_relative_to(folder)]
    return str(path.relative_to(packages[0].parent if packages else ROOT))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif (
            isinstance(node, ast.ImportFrom) and node.level == 0
        ):  # relative imports stay in their package
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(rule: Callable[[Path], Iterable[str]]) -> dict[str, list[str]]:
    """What `rule` finds in each file of ours; files without a finding are left out."""
    found = {name_of(path): sorted(rule(path)) for path in sources()}
    return {name: findings for name, findings in found.items() if findings}


def room_of(dotted: str) -> str:
    """`zppo.plan` for a module of ours, at any depth; the other two packages are one room each."""
    package, *inner = dotted.split(".")
    return ".".join([package, *inner[:1]]) if package in ("zppo", "zppo_actors") else package


def rooms_imported() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    found: dict[str, set[str]] = {}
    for path in sources():
        own = room_of(name_of(path).removesuffix(".py").replace("/", "."))
        ours = {room_of(part) for part in imports(path) if part.split(".")[0] in PACKAGES}
        found.setdefault(own, set()).update(ours - {own})
    return {room: rooms for room, rooms in found.items() if not room.endswith("__init__")}


def test_rooms_import_what_the_table_says() -> None:
    assert rooms_imported() == ROOMS


def test_no_import_runs_up() -> None:
    order = list(ROOMS)
    assert [room for i, room in enumerate(order) if not ROOMS[room] <= set(order[:i])] == []


def system_imports(path: Path) -> set[str]:
    name = name_of(path)
    in_the_mind = name.startswith("zppo/") and name not in OUTSIDE
    return {part.split(".")[0] for part in imports(path)} & SYSTEM if in_the_mind else set()


def file_calls(path: Path) -> Iterator[str]:
    name = name_of(path)
    if not name.startswith(tuple(f"zppo/{room}/" for room in PURE)) or name in READS_FILES:
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in FILE_CALLS:
            yield dotted(node.func)


def test_the_mind_is_pure() -> None:
    assert violations(system_imports) == {}
    assert violations(file_calls) == {}


def test_three_files_import_zmq() -> None:
    users = [
        name_of(path)
        for path in sources()
        if any(name.split(".")[0] == "zmq" for name in imports(path))
    ]
    assert users == [f"zppo_protocol/{name}.py" for name in ("doors", "keys", "sockets")]


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
            if called in BANNED_NAMES | BANNED_DOTTED or called.rpartition(".")[
                2
            ] in BANNED_NAMES - {"eval", "exec"}:
                yield called
            if lacks_a_word_on_code(node):
                yield f"{called} without trust_remote_code"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false(
                    keyword.value
                ):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and WILDCARD.search(node.value)
        ):
            yield node.value


OPENERS = ("from_pretrained", "from_config")
HAVE_NO_CODE = ("GenerationConfig",)
"""Classes of transformers whose files name no code."""


def lacks_a_word_on_code(call: ast.Call) -> bool:
    """Whether transformers would ask on the terminal if the code of a folder may be run: it does
    where it is not told."""
    owner, _, opener = dotted(call.func).rpartition(".")
    told = any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
    return opener in OPENERS and owner not in HAVE_NO_CODE and not told


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_forbidden_calls_are_absent() -> None:
    assert (
        violations(lambda path: {name.split(".")[0] for name in imports(path)} & BANNED_MODULES)
        == {}
    )
    assert violations(lambda path: forbidden(tree_of(path))) == {}


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "torch.load(path)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(f)",
        "opened_by.from_config(config)",
        "socket.recv_pyobj()",
        "address = 'tcp://*:5555'",
        "np.load(f, allow_pickle=flag)",
    ],
)
def test_forbidden_calls_are_found(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


PROGRAMS = [
    path
    for folder in (BESIDE["benches"], BESIDE["tools"])
    for path in sources([folder])
    if "__main__" in path.read_text(encoding="utf-8")
    and path.name != "trl_grpo.py"  # for a Python that has nothing of ours
]
END = "sys.exit(run_command(main))"
LOOSE = ("int", "float")
"""Types of options that take a zero and what is below, or no number (`zppo.config.options`)."""


def loose_ends(tree: ast.AST) -> Iterator[str]:
    """What would let a traceback or a usage text out of a program where a command has a
    sentence."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called.endswith("ArgumentParser"):
                yield called
            if called in ("sys.exit", "SystemExit", "exit") and ast.unparse(node) != END:
                yield ast.unparse(node)
            if called.endswith("add_argument"):
                types = {keyword.arg: dotted(keyword.value) for keyword in node.keywords}
                yield from (f"type={types['type']}" for _ in range(types.get("type") in LOOSE))
        elif isinstance(node, ast.Attribute) and dotted(node) == "sys.argv":
            yield "sys.argv"


def test_programs_read_their_arguments_and_end_as_commands_do() -> None:
    found = {name_of(path): sorted(loose_ends(tree_of(path))) for path in PROGRAMS}
    # It passes its own arguments on to a child.
    assert {name: ends for name, ends in found.items() if ends} == {
        "benches/weights_hosts.py": ["sys.argv"]
    }
    texts = [path.read_text(encoding="utf-8") for path in PROGRAMS]
    assert [text for text in texts if not text.endswith(f"    {END}\n")] == []


def test_no_option_of_a_command_takes_any_number() -> None:
    found = {
        name_of(path): [end for end in loose_ends(tree_of(path)) if end.startswith("type=")]
        for path in sources([PACKAGES["zppo"]])
    }
    assert {name: ends for name, ends in found.items() if ends} == {}


def test_programs_find_the_files_beside_them_under_any_python() -> None:
    """`python -P`, which children run with, does not put a program's own folder on the path."""
    lost = []
    for path in PROGRAMS:
        beside = {one.stem for one in path.parent.glob("*.py")}
        body = ast.parse(path.read_text(encoding="utf-8")).body
        imports = [n.lineno for n in body if isinstance(n, ast.ImportFrom) and n.module in beside]
        paths = [n.lineno for n in body if ast.unparse(n).startswith("sys.path")]
        if imports and not min(paths, default=math.inf) < min(imports):
            lost.append(name_of(path))
    assert lost == []


@pytest.mark.parametrize(
    "line",
    [
        "argparse.ArgumentParser()",
        "sys.exit(main())",
        "raise SystemExit('no')",
        "parser.add_argument('--n', type=int)",
        "words = sys.argv[1:]",
    ],
)
def test_loose_ends_are_found(line: str) -> None:
    assert list(loose_ends(ast.parse(line)))


def test_every_file_says_what_it_is() -> None:
    silent = [
        name_of(path)
        for path in all_sources()
        if path.stat().st_size and not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


@pytest.mark.parametrize("package", [*PACKAGES, *BESIDE])
def test_functions_stay_short(package: str) -> None:
    """Lines of the body; a kernel's list of arguments is not what makes it hard to read."""
    lengths = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or 0) - node.body[0].lineno + 1
        for path in (PACKAGES | BESIDE)[package].rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 10


def test_files_stay_short() -> None:
    lengths = {
        name_of(path): path.read_text(encoding="utf-8").count("\n") for path in all_sources()
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "zppo_protocol.sockets, zppo_protocol.leases, zppo_protocol.credits",
            "torch, transformers, pandas, yaml",
        ),
        (
            (
                "zppo.launch, zppo.cli, zppo.config.template, zppo.compare, zppo.evaluate, "
                "zppo.plan_command, zppo.data_command, zppo.grade"
            ),
            "torch, transformers, zmq, matplotlib",
        ),
        ("zppo.scheduling.scheduler", "torch, transformers, zmq"),
        (
            (
                "zppo_actors.supervisor.supervisor, zppo_actors.controller.controller, "
                "zppo_actors.grader, zppo_actors.weights.actor"
            ),
            "torch, transformers",
        ),
    ],
)
def test_light_modules_stay_light(modules: str, absent: str) -> None:
    program = (
        f"import sys, {modules}; print([m for m in '{absent}'.split(', ') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=600
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def reached(module: str, known: dict[str, Path], seen: set[str]) -> set[str]:
    """Modules of ours that one imports, at any depth, itself among them."""
    while module and module not in known:
        module = module.rpartition(".")[0]  # a name in a module
    if module and module not in seen:
        seen.add(module)
        for name in imports(known[module]):
            reached(name, known, seen)
    return seen


def test_commands_that_read_tokenizers_are_told_to_load_no_torch() -> None:
    names = {path: name_of(path).removesuffix(".py").replace("/", ".") for path in sources()}
    known = {name.removesuffix(".__init__"): path for path, name in names.items()}
    readers = [
        command
        for command, door in DOORS.items()
        if "zppo.prompting.tokenization" in reached(door, known, set())
    ]
    assert sorted(readers) == list(READ_TOKENIZERS)


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
