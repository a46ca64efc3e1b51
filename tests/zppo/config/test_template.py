"""`zppo init` and the command line: complete, correct, and one sentence for a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from msgspec import inspect as shape

from zppo.algorithm.methods import method_names
from zppo.cli import main
from zppo.config.counterparts import COUNTERPARTS, KEPT, TOOLS, Tool
from zppo.config.docstrings import setting_help
from zppo.config.load import setting_names
from zppo.config.strict_yaml import parse
from zppo.config.template import EXAMPLE, commented_topology, reference
from zppo.config.topology import Topology
from zppo.grading.graders import GRADERS

ROOT = Path(__file__).parents[3]
OPTIONAL_SINKS = ("wandb", "trackio", "mlflow", "prometheus")
HELP = dict(setting_help(shape.type_info(Topology)))


def test_every_setting_has_its_line_of_help() -> None:
    assert list(HELP) == list(setting_names())
    assert all(HELP.values())


def test_commented_topology_is_the_defaults() -> None:
    data = parse(commented_topology(), "init").data
    assert msgspec.convert(data, Topology) == EXAMPLE


def test_commented_topology_names_every_setting_once() -> None:
    document = parse(commented_topology(), "init")
    written = {path for path in document.lines if path and "[" not in path}
    null = ("evaluation.sampling", *(f"sinks.{name}" for name in OPTIONAL_SINKS))
    inside_null = {
        path for path in setting_names() if path.startswith(tuple(f"{name}." for name in null))
    }
    assert written == set(setting_names()) - inside_null


def test_help_names_every_method() -> None:
    assert set(re.findall(r"[a-z_]+", HELP["method.name"])) - {"or"} == set(method_names())


def test_help_names_every_grader() -> None:
    assert all(re.search(rf"\b{name}\b", HELP["data.grader"]) for name in GRADERS)


def test_reference_in_the_docs_is_up_to_date() -> None:
    text = (ROOT / "docs/topology.md").read_text(encoding="utf-8")
    assert reference() in text, "run tools/topology_reference.py"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_topology_like_anothers_has_its_names_and_defaults(tool: Tool, tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "t.yaml"), "--like", tool]) == 0
    text = (tmp_path / "t.yaml").read_text(encoding="utf-8")
    document = parse(text, "init")
    assert msgspec.convert(document.data, Topology).method.name == "grpo"
    for one in COUNTERPARTS:
        value = document.data
        for key in one.ours.split(".") if one.names(tool) else ():
            value = value[key]
        default = one.values[TOOLS.index(tool)]
        assert default is KEPT or value == default or not one.names(tool)
        if one.names(tool):
            line = text.splitlines()[document.lines[one.ours] - 1]
            assert line.partition("  # ")[2].startswith(", ".join(one.names(tool)))


def test_init_writes_a_new_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.yaml"
    assert main(["init", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == commented_topology()
    assert main(["init", str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: exists already; expected the name of a new file\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lunch"], "zppo: there is no command 'lunch' (did you mean 'launch'?)\n"),
        (
            ["init", "a", "b"],
            "zppo init: 'b' is one argument too many; see zppo init --help\n",
        ),
        (
            ["init", "--like", "trll"],
            "zppo init: --like is 'trll'; expected one of trl, verl (did you mean 'trl'?)\n",
        ),
        (
            ["init", "--like", "foo"],
            "zppo init: --like is 'foo'; expected one of trl, verl\n",
        ),
        (
            ["report"],
            "zppo report: the following arguments are required: RUN; see zppo report --help\n",
        ),
        (
            ["launch", "--topolgy"],
            "zppo launch: there is no option --topolgy (did you mean --topology?); see zppo launch "
            "--help\n",
        ),
        (
            ["report", "run", "--jason"],
            "zppo report: there is no option --jason (did you mean --json?); see zppo report "
            "--help\n",
        ),
        (
            ["doctor", "run", "--gpu"],
            "zppo doctor: there is no option --gpu; see zppo doctor --help\n",
        ),
        (
            ["compare", "--lr=1e-6"],
            "zppo compare: there is no option --lr; settings are changed with --set "
            "optimizer.learning_rate=…; see zppo compare --help\n",
        ),
        (
            ["init", "/nowhere/t.yaml"],
            "/nowhere/t.yaml: cannot be written (No such file or directory)\n",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == sentence


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"zppo \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("usage: zppo COMMAND")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["init", "--help"])
    assert capsys.readouterr().out.startswith("usage: zppo init [-h] [--like TOOL] [FILE]")
