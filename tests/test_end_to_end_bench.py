"""The race against TRL: what both sides are given, how a run is read, and what is made of the
numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from zppo.config import load as topologies
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.grading import GRADERS
from zppo.grading.boxes import last_boxed

ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "examples" / "quickstart"


def load(name: str) -> Any:
    """A script of `benches/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benches" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench, other = load("end_to_end"), load("trl_grpo")


def options(*more: str) -> argparse.Namespace:
    command = ["--model", str(WORLD / "student"), "--data", str(WORLD / "train.jsonl")]
    parsed: argparse.Namespace = bench.parser().parse_args(
        [*command, "--templates", str(WORLD / "templates"), *more]
    )
    return parsed


def order(**changes: Any) -> Any:
    names = [name for name in bench.Order.__struct_fields__ if name not in ("model", "prompts")]
    given = {name: getattr(options(), name) for name in names} | {"model": "m", "prompts": "p"}
    return bench.Order(**given | changes)


def line(step: int, **changes: Any) -> dict[str, Any]:
    names = {"wall_seconds": 10.0 * (step + 1), "tokens/generated": 3072}
    names |= {"train/seconds_proximal": 1.0, "train/seconds_update": 2.0, "train/updates": 2.0}
    return {"step": step, **names, "accuracy/new": 0.5, "train/live_rollout_share": 0.75, **changes}


# ---- what both sides are given -------------------------------------------------------------------


def test_copy_of_the_model_never_ends_a_response(tmp_path: Path) -> None:
    folder = bench.endless_copy(WORLD / "student", tmp_path / "copy", "<unk>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = AutoTokenizer.from_pretrained(WORLD / "student")
    assert tokenizer.eos_token == "<unk>" != before.eos_token
    assert (
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        == tokenizer.eos_token_id
    )
    assert (folder / "model.safetensors").read_bytes() == (
        WORLD / "student" / "model.safetensors"
    ).read_bytes()
    text = "<bos> <user> 3 * 4 mod 23 ?"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.parametrize("flags", [[], ["--equal-lengths"]])
def test_lengths_are_the_models_own_unless_said_otherwise(flags: list[str]) -> None:
    with bench.prepared(options(*flags, "--end-token", "<unk>")) as made:
        assert (Path(made.model) == WORLD / "student") == (not flags)
        assert Path(made.prompts).is_file()


def test_unknown_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no special token '<never>'"):
        bench.endless_copy(WORLD / "student", tmp_path / "copy", "<never>")


def test_prompts_are_those_of_a_run(tmp_path: Path) -> None:
    out = bench.write_prompts(
        WORLD / "train.jsonl", WORLD / "templates", "Be brief.", tmp_path / "prompts.jsonl"
    )
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(rows) == len((WORLD / "train.jsonl").read_text().splitlines())
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "21 * 16 * 13 * 3 mod 23 ?\nanswer in \\boxed{ }"},
    ]
    assert rows[0]["gold"] == "17"


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_our_run_is_a_topology_with_room_to_drain(tmp_path: Path, engine: str) -> None:
    wanted = order(model=str(WORLD / "student"), steps=4, warmup=2)
    chosen = options("--engine", engine, "--staleness", "1")
    file = tmp_path / "race.yaml"
    file.write_text(json.dumps(bench.topology(wanted, chosen, tmp_path / "run")))
    topology = topologies.load(file)
    assert isinstance(topology, Topology)
    assert topology.run.steps == 4 + 2 + 2
    assert (topology.method.name, topology.method.group_size, topology.method.updates_per_step) == (
        "grpo",
        8,
        2,
    )
    assert topology.scheduler.new_questions == wanted.questions
    assert topology.student.sampling.max_new_tokens == wanted.tokens


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("1+1=2\n\\boxed{2}", "2"),
        ("\\boxed{3} no, \\boxed{ 2 }", "2"),
        ("\\boxed{2} no, \\boxed{3}", "2"),
        ("2", "2"),
        ("\\boxed{}", "2"),
    ],
)
def test_reward_of_the_other_side_is_our_exact_grader(text: str, gold: str) -> None:
    answer = last_boxed(text)
    assert other.reward(text, gold) == float(
        answer is not None and bool(GRADERS["exact"].quick(answer, gold))
    )


# ---- what is measured ----------------------------------------------------------------------------


def test_a_run_is_read_between_warm_up_and_drain() -> None:
    wanted = order(warmup=2, steps=3, questions=12)
    steps = [line(0), line(1), line(2), line(3), line(4), line(5, **{"tokens/generated": 10**9})]
    used = [50.0, 60.0, 75.0, 90.0, 108.0, 140.0]
    found = bench.measured(steps, wanted, used)
    assert (found.seconds, found.samples, found.tokens, found.updates) == (
        30.0,
        3 * 96,
        3 * 3072,
        6,
    )
    assert found.samples_per_second == 9.6
    assert found.seconds_training == 9.0
    assert found.processor_seconds == 48.0


def test_the_other_side_counts_whole_steps() -> None:
    clock = other.Clock()
    clock.ends = [(float(second), second / 2, second * 1.5) for second in range(1, 11)]
    clock.tokens, clock.rewards = [5, 5, 7, 7, 7], [1.0, 0.0]
    wanted = msgspec.to_builtins(order(warmup=2, steps=3, updates_per_step=2, questions=12))
    found = other.result(wanted, clock)
    assert (found["seconds"], found["seconds_generating"]) == (6.0, 3.0)
    assert found["processor_seconds"] == 9.0
    assert (found["updates"], found["samples"], found["tokens"]) == (6, 3 * 96, 21)


def test_rewards_are_noted_as_they_are_given() -> None:
    clock = other.Clock()
    completions = [[{"content": "\\boxed{1}"}], [{"content": "\\boxed{2}"}]]
    assert clock.score([None, None], completions, [[1, 2], [3]], gold=["1", "1"]) == [1.0, 0.0]
    assert clock.tokens == [3]
    assert clock.texts == [("\\boxed{1}", "1", 1.0), ("\\boxed{2}", "1", 0.0)]


def run_of(side: str, samples: int, seconds: float) -> Any:
    return bench.Measured(
        side=side,
        seconds=seconds,
        seconds_training=1.0,
        updates=2,
        samples=samples,
        tokens=32 * samples,
        accuracy=0.5,
        processor_seconds=2 * seconds,
    )


def test_ratio_is_that_of_the_medians() -> None:
    runs = [
        run_of("zppo", 60, 2.0),
        run_of("trl", 60, 6.0),
        run_of("zppo", 60, 3.0),
        run_of("trl", 60, 60.0),
    ]
    found = bench.summary([*runs, run_of("zppo", 60, 1.0), run_of("trl", 60, 12.0)])
    assert found["medians"]["zppo"]["samples_per_second"] == 30.0
    assert found["medians"]["trl"]["samples_per_second"] == 5.0
    names = ("samples_per_second", "tokens_per_second", "samples_per_processor_second")
    assert found["ratio"] == dict.fromkeys(names, 6.0)


def test_one_side_alone_has_no_ratio() -> None:
    assert "ratio" not in bench.summary([run_of("zppo", 60, 2.0)])


@pytest.mark.parametrize("words", [["--trl-batch", "32"], ["--warmup", "0"], ["--steps", "0"]])
def test_a_race_that_cannot_be_equal_is_refused(words: list[str]) -> None:
    bench.check(options())
    with pytest.raises(UserError, match=words[0]):
        bench.check(options(*words))


def test_sides_take_turns() -> None:
    seen: list[str] = []

    def side(name: str) -> Any:
        return lambda order, options: seen.append(name) or run_of(name, 1, 1.0)

    runs = list(bench.race(order(), options("--rounds", "2"), [side("zppo"), side("trl")]))
    assert seen == [run.side for run in runs] == ["zppo", "trl", "zppo", "trl"]
    assert all(run.load_before >= 0 for run in runs)


def test_a_grade_that_differs_stops_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "seconds": 1.0,
        "seconds_generating": 0.5,
        "processor_seconds": 2.0,
        "updates": 1,
        "samples": 1,
        "tokens": 1,
        "accuracy": 1.0,
    }
    found = result | {"texts": [["\\boxed{5}", "6", 1.0]]}
    monkeypatch.setattr(bench, "call", lambda command, verbose: "noise\n" + json.dumps(found))
    with pytest.raises(UserError, match="our grader says False"):
        bench.trl(order(), options("--trl-python", sys.executable))
    monkeypatch.setattr(
        bench,
        "call",
        lambda command, verbose: json.dumps(result | {"texts": [["\\boxed{6}", "6", 1.0]]}),
    )
    assert bench.trl(order(), options("--trl-python", sys.executable)).seconds_training == 0.5


def test_a_side_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="ended with exit code 3"):
        bench.call([sys.executable, "-c", "import sys; sys.exit(3)"], verbose=False)
