"""docs/from_trl.md and docs/from_verl.md: every topology on them loads, their rewards agree with the
originals, their tables are those of the code, and TRL knows the names."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from zppo import launch
from zppo.config.counterparts import COUNTERPARTS, TOOLS, Tool
from zppo.config.load import load
from zppo.config.template import names_of, topology_like

DOCS = Path(__file__).parents[3] / "docs"
NOT_OF_GRPO_CONFIG = {
    *("model", "train_dataset", "eval_dataset", "reward_funcs"),  # of GRPOTrainer
    *("model_name_or_path", "dtype", "torch_dtype", "dataset_name"),  # of its command line
    "max_staleness",  # of the asynchronous trainers
    *("max_prompt_length", "epsilon_low"),  # of earlier versions
}
LAPTOP = (
    "data.train=train.jsonl",
    "data.heldout=heldout.jsonl",
    "student.model=student",
    "student.sampling={max_new_tokens: 8}",
    "data.max_prompt_tokens=48",
    "actors.rollout={}",
    "actors.trainer.device=cpu",
    "scheduler.new_questions=2",
    "sinks.wandb=null",
)
"""The page's topology with the model of the tests, on a CPU."""
ROWS: dict[Tool, dict[str, Any]] = {
    "trl": {"prompt": [{"role": "user", "content": "2 + 3 = ?"}], "solution": "$5$"},
    "verl": {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "2 + 3 = ?"}],
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"index": 0},
    },
}


def blocks(tool: Tool, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (DOCS / f"from_{tool}.md").read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


def functions(source: str) -> dict[str, Any]:
    """What the functions of a block do, without the rest of it."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {}
    exec(compile(tree, "page", "exec"), names)
    return names


@pytest.mark.parametrize("tool", TOOLS)
def test_every_topology_of_a_page_loads(tool: Tool, tmp_path: Path) -> None:
    (topology,) = blocks(tool, "yaml")
    (tmp_path / "t.yaml").write_text(topology)
    assert load(tmp_path / "t.yaml").method.name == "grpo"


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_the_topologies_pass_all_checks_of_a_launch(
    tool: Tool, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the page with its own rewards, and that of `zppo init --like`; with rows in the
    tool's format and a small model."""
    (page,) = blocks(tool, "yaml")
    rewards = blocks(tool, "python")[-1]
    (small / rewards.splitlines()[0].removeprefix("# ")).write_text(rewards)
    row = json.dumps(ROWS[tool])
    rows = [row.replace("2 + 3", f"{number} + 3") + "\n" for number in range(6)]
    (small / "train.jsonl").write_text("".join(rows[:4]))
    (small / "heldout.jsonl").write_text("".join(rows[4:]))
    given = [part for setting in LAPTOP for part in ("--set", setting)]
    for text in (page, topology_like(tool)):
        (small / "topology.yaml").write_text(text)
        code = launch.main(["topology.yaml", "--dry-run", *given])
        assert code == 0, capsys.readouterr().err


def test_the_rewards_of_the_pages_are_the_originals() -> None:
    script, ours = map(functions, blocks("trl", "python"))
    (verl,) = map(functions, blocks("verl", "python"))
    for response in ("Step 1: add.", "5"):
        (theirs,) = script["has_steps"]([[{"role": "assistant", "content": response}]])
        assert ours["has_steps"]("2 + 3 = ?", response, {}) == theirs
        found = verl["reward"]("2 + 3 = ?", response, ROWS["verl"])
        assert found == verl["compute_score"]("sums", response, "5")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tables_of_names_are_up_to_date(tool: Tool) -> None:
    text = (DOCS / f"from_{tool}.md").read_text(encoding="utf-8")
    assert text.endswith("## Names\n\n" + names_of(tool)), "run tools/topology_reference.py"


def test_what_the_command_of_verl_sets_is_in_the_table() -> None:
    (command,) = blocks("verl", "bash")
    typed = set(re.findall(r"^ +([a-z_.]+)=", command, re.MULTILINE))
    assert len(typed) == command.count("=")
    known = {name for one in COUNTERPARTS for name in one.names("verl")}
    assert typed - known == {
        "algorithm.use_kl_in_reward",  # off: there is no such thing here
        "custom_reward_function.name",  # a part of data.reward
    }


@pytest.mark.slow
@pytest.mark.peers
def test_trl_knows_its_names() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    fields = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
    named = {name for one in COUNTERPARTS for name in one.names("trl")}
    assert named - set(fields) == NOT_OF_GRPO_CONFIG
    (call,) = [
        node
        for node in ast.walk(ast.parse(blocks("trl", "python")[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "GRPOConfig"
    ]
    assert {keyword.arg for keyword in call.keywords} <= set(fields)


@pytest.mark.slow
@pytest.mark.peers
def test_trls_defaults_are_those_of_the_template() -> None:
    """Where both count in the same unit and have the same type."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    theirs = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    ours = yaml.safe_load(topology_like("trl"))
    compared = 0
    for one in COUNTERPARTS:
        name = next(iter(one.names("trl")), None)
        value = ours
        for key in one.ours.split(".") if name in theirs and not one.note else ():
            value = value[key]
        if isinstance(value, int | float) and isinstance(theirs.get(name), int | float):
            assert value == theirs[name], name
            compared += 1
    assert compared > 10
