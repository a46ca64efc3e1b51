"""The scripted engine: its answers, its clock, its faults, and the sentences about bad scripts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import completions, make_task, versions
from hypothesis import given, settings
from hypothesis import strategies as st
from served import student_of
from support_helpers import task_with_support

from zppo.config.topology import StudentSampling
from zppo.errors import UserError
from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.simulated import Behaviour, Script, SimulatedEngine, read_script
from zppo_actors.weights import PublicationRefused, shared_memory
from zppo_protocol.samples import GroupSamples

QUESTIONS = {
    "3 * 17": {
        "answer": "5",
        "accuracy": 0.25,
        "accuracy_bcq": 1.0,
        "wrong": ["7", "9"],
        "tokens": 12,
    }
}


def build(tmp_path: Path, script: Any, **engine_args: Any) -> SimulatedEngine:
    path = tmp_path / "script.json"
    path.write_text(script if isinstance(script, str) else json.dumps(script))
    served = student_of("unused", engine="simulated", script=str(path), **engine_args)
    engine = create(EngineSpec(served=served))
    assert isinstance(engine, SimulatedEngine)
    return engine


def sample(engine: SimulatedEngine, *args: Any, **kwargs: Any) -> GroupSamples:
    return asyncio.run(engine.generate(make_task(*args, **kwargs)))


def test_answers_follow_the_script(tmp_path: Path) -> None:
    engine = build(tmp_path, {"questions": QUESTIONS})
    plain = sample(engine, "what is 3 * 17 ?", n=400, seed=1)
    answers = [
        text.removeprefix("The answer is \\boxed{").removesuffix("}") for text in plain.texts
    ]
    assert set(answers) == {"5", "7", "9"} and 60 < answers.count("5") < 140
    assert (
        all(len(token_ids) == 12 for token_ids in completions(plain)) and plain.token_ids.max() < 16
    )
    assert set(plain.finish_reasons) == {"stop"}
    bcq = sample(engine, "what is 3 * 17 ?", n=50, seed=1, kind="bcq")
    assert set(bcq.texts) == {"The answer is \\boxed{5}"}
    other = sample(engine, "what is 2 * 2 ?", n=50, seed=1)
    assert set(other.texts) == {"The answer is \\boxed{0}", "The answer is \\boxed{1}"}


def test_longest_key_wins() -> None:
    long, short = Behaviour(answer="long"), Behaviour(answer="short")
    assert Script(questions={"3 *": short, "3 * 17": long}).behaviour("3 * 17 mod 23") is long


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), n=st.integers(1, 9))
def test_everything_follows_from_the_seed(seed: int, n: int) -> None:
    first, second = (sample(SimulatedEngine(Script(), 64), "q", n=n, seed=seed) for _ in range(2))
    assert first.texts == second.texts and completions(first) == completions(second)


def test_supports_are_what_the_tokens_were_drawn_from() -> None:
    sampling = StudentSampling(max_new_tokens=8, top_k=6, top_p=0.5)
    task = task_with_support("q", sampling, n=40)
    samples = asyncio.run(SimulatedEngine(Script(), 64).generate(task))
    assert samples.support is not None and samples.support.ids.tolist() == [0, 1, 2] * 320
    assert set(samples.token_ids.tolist()) == {0, 1, 2}
    assert samples.log_probs.tolist() == pytest.approx([-np.log(3)] * 320)
    plain = asyncio.run(SimulatedEngine(Script(), 64).generate(make_task("q", n=40, top_p=0.5)))
    assert plain.support is None and set(plain.token_ids.tolist()) == set(range(16))


def test_limit_cuts_the_response(tmp_path: Path) -> None:
    samples = sample(build(tmp_path, {"questions": QUESTIONS}), "3 * 17", n=2, max_new_tokens=5)
    assert samples.finish_reasons == ["length", "length"] and samples.offsets.tolist() == [0, 5, 10]


def test_compression_keeps_the_last_answer(tmp_path: Path) -> None:
    engine = build(tmp_path, {})
    text = "Shorten: so \\boxed{ 3 } or rather \\boxed{\\frac12 x}. End inside \\boxed{}."
    assert sample(engine, "so \\boxed{ 4 } it is", kind="compress").texts == [
        "In short: \\boxed{4}"
    ]
    assert sample(engine, text, kind="compress").texts == ["In short: \\boxed{\\frac12 x}"]
    assert sample(engine, "nothing", kind="compress").texts == ["In short: no answer"]


def test_versions_change_in_mid_sentence(tmp_path: Path) -> None:
    engine = build(tmp_path, {"default": {"tokens": 30}, "seconds_per_token": 0.02})

    async def work() -> GroupSamples:
        await engine.load_policy(shared_memory.publish({"a": torch.ones(3)}, 2, tmp_path))
        manifest = shared_memory.publish({"a": torch.zeros(3)}, 3, tmp_path)
        running = asyncio.create_task(engine.generate(make_task("q", n=2, max_new_tokens=30)))
        while engine.progress < 10:
            await asyncio.sleep(0.001)
        assert await engine.load_policy(manifest) == manifest.digest
        return await running

    samples = asyncio.run(work())
    stamped = versions(samples)
    assert stamped == sorted(stamped[:30]) * 2 and set(stamped) == {2, 3} and engine.progress == 60


def test_bad_policy_is_refused(tmp_path: Path) -> None:
    engine = build(tmp_path, {})
    manifest = shared_memory.publish({"a": torch.ones(3)}, 2, tmp_path)
    shared_memory.remove(tmp_path, 2)
    with pytest.raises(PublicationRefused, match="No such file"):
        asyncio.run(engine.load_policy(manifest))
    assert engine.policy_version == -1


def test_faults_of_the_script(tmp_path: Path) -> None:
    engine = build(tmp_path, {"questions": {"bad": {"fail": "too tired"}, "stuck": {"hang": True}}})
    with pytest.raises(EngineError, match="too tired") as caught:
        sample(engine, "a bad question")
    assert caught.value.retryable
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(engine.generate(make_task("stuck")), 0.01))
    assert engine.progress == 0


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            {"questions": {"q": {"acuracy": 1}}},
            "{path}, question 'q': unknown key 'acuracy' (did you mean 'accuracy'?)",
        ),
        (
            {"default": {"accuracy": 2}},
            "is not a script of the simulated engine: Expected `float` <= 1.0",
        ),
        ("{", "is not a script of the simulated engine: Input data was truncated"),
        (
            {"defaults": {}},
            "is not a script of the simulated engine: Object contains unknown field `defaults`",
        ),
    ],
)
def test_bad_scripts_are_user_errors(script: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, script)
    assert str(caught.value).startswith("actors.rollout.engine_args.script: ")
    assert sentence.format(path=tmp_path / "script.json") in str(caught.value)


def test_missing_script_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_script(tmp_path / "none.json", "actors.rollout.engine_args.script")
    expected = f"cannot read {str(tmp_path / 'none.json')!r} (No such file or directory)"
    assert str(caught.value) == f"actors.rollout.engine_args.script: {expected}"


@pytest.mark.slow
def test_needs_no_torch() -> None:
    code = (
        "import sys, zppo_actors.sampler.teacher, zppo_actors.engines.simulated; sys.exit('torch' "
        "in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
