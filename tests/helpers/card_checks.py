"""What the trainer and the engine 'transformers' do on a card, against what they do on a CPU: a script for
`card.py`, which prints a JSON object of failures by the name of the check.

`python tests/helpers/card.py --build FOLDER; python tests/helpers/card.py FOLDER/card.so
tests/helpers/card_checks.py NAME …`; without names all of them, which takes minutes, because the
Triton kernels are interpreted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from card import max_bytes, on_card
from engine_helpers import make_model, make_task, save, words
from served import student_of
from support_helpers import task_with_support
from training_cases import (
    OPTIMIZER,
    VOCABULARY,
    gemma2_with_soft_cap,
    group,
    llama,
    method,
    mixed_window,
    qwen3,
    settings_of,
    trainer_of,
    window,
)

from zppo.config.topology import (
    ActorsConfig,
    DataConfig,
    StudentConfig,
    StudentSampling,
    Topology,
    TrainerConfig,
)
from zppo.errors import UserError
from zppo.training.state import load_optimizer, save_share
from zppo.training.step import train_step
from zppo_actors.engines import EngineSpec, create
from zppo_actors.process import ActorContext
from zppo_actors.trainer import rank
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import ScoreTask, TrainWindow
from zppo_protocol.samples import TokenScores
from zppo_protocol.support import Support

SMALL = window(group("a", [1.0, 0.0], lengths=[5, 4], alphabet=2), group("b", [0.0, 1.0, 1.0]))
LONG = window(
    group("long", [1.0, 0.0, 1.0, 0.0], lengths=[530, 520, 510, 500], alphabet=2),
    group("short", [1.0, 0.0], lengths=[9, 8]),
)
CLOSE = 1e-4


def supported(task: TrainWindow) -> TrainWindow:
    """The window as if its tokens had been drawn from a few of the vocabulary."""
    random, groups = np.random.default_rng(3), []
    for one in task.groups:
        rows = [
            sorted({int(token), *map(int, random.integers(0, VOCABULARY, 3))})
            for token in one.samples.token_ids
        ]
        support = Support(
            ids=np.array([one for row in rows for one in row], np.int32),
            offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        )
        samples = msgspec.structs.replace(one.samples, support=support)
        groups.append(msgspec.structs.replace(one, samples=samples))
    return window(*groups)


def scored(task: TrainWindow, most: int = 4) -> TrainWindow:
    """The window with the most probable tokens of a teacher that is elsewhere."""
    random, groups = np.random.default_rng(1), []
    for one in task.groups:
        count = len(one.samples.token_ids)
        ids = [random.permutation(VOCABULARY)[:most] for _ in range(count)]
        shares = np.sort(random.dirichlet(np.ones(most + 3), count)[:, :most], 1)[:, ::-1]
        scores = TokenScores(
            token_ids=np.array(ids, np.int32), log_probs=np.log(shares).astype(np.float32)
        )
        groups.append(msgspec.structs.replace(one, scores=scores))
    return window(*groups)


def said(**changes: Any) -> dict[str, Any]:
    return settings_of(method(**changes))


def divergence(beta: float) -> dict[str, Any]:
    return {"objective": "jsd", "method": method(jsd_beta=beta, updates_per_step=1)}


def wide_teacher() -> Any:
    return llama(seed=7, hidden_size=24)


BF16_STATES = {"optimizer": msgspec.structs.replace(OPTIMIZER, state_dtype="bfloat16")}
Case = tuple[Callable[[], Any], TrainWindow, dict[str, Any]]
CASES: dict[str, Case] = {
    "clip": (llama, SMALL, {}),
    "bf16 states": (qwen3, mixed_window(), BF16_STATES),
    "soft cap": (gemma2_with_soft_cap, supported(mixed_window()), {}),
    "recomputed": (llama, mixed_window(), {"recompute": True}),
    "supports": (llama, supported(SMALL), {}),
    "long rows": (llama, LONG, {}),
    "sequence": (llama, mixed_window(), said(ratio_level="sequence", correction_level="sequence")),
    "entropies": (llama, mixed_window(), said(entropy_quantile=0.4)),
    "kl": (
        llama,
        mixed_window(),
        {"reference": lambda: llama(seed=1), **said(kl_coefficient=0.1, entropy_coefficient=0.01)},
    ),
    "jsd": (llama, SMALL, {"teacher": wide_teacher, **divergence(0.5)}),
    "jsd of few": (llama, scored(SMALL), divergence(0.5)),
    **{
        name: (llama, SMALL, said(surrogate=name))
        for name in ("cispo", "sapo", "dppo_tv", "dppo_kl")
    },
}


def step_like_a_cpu(case: Case) -> None:
    """One step leaves the weights and metrics that it leaves on a CPU; the weights can be published
    and saved, and the moments loaded again."""
    make, task, changes = case
    steps = []
    for device in ("cpu", "cuda"):
        given = {name: of().to(device) if callable(of) else of for name, of in changes.items()}
        trainer = trainer_of(make().to(device), **given)
        steps.append((trainer, train_step(trainer, task)))
    (own, expected), (trainer, found) = steps
    for name, value in expected.items():
        if not name.startswith("seconds"):
            assert np.isclose(found[name], value, rtol=CLOSE, atol=CLOSE), (
                name,
                found[name],
                value,
            )
    for name, parameter in own.policy.parameters().items():
        there = trainer.policy.parameters()[name].detach()
        assert there.is_cuda
        assert torch.allclose(there.cpu(), parameter, atol=CLOSE), name
    with tempfile.TemporaryDirectory() as folder:
        manifest = shared_memory.publish_each(trainer.policy.weights(), 1, Path(folder))
        published = shared_memory.open_policy(manifest)
        for name, tensor in trainer.policy.weights():
            assert torch.equal(published[name], tensor.cpu()), name
        (Path(folder) / "share").mkdir()
        save_share(trainer, Path(folder) / "share", step=1, weights=published)
        assert load_optimizer(trainer.optimizer, Path(folder) / "share").step == 1


def engine_like_a_cpu() -> None:
    """The same tokens, log-probs and scores, before and after new weights."""
    with tempfile.TemporaryDirectory() as base:
        folder, other = save(make_model(), Path(base) / "model"), make_model(seed=5)
        manifest = shared_memory.publish(other.state_dict(), 3, Path(base))
        answers = [asyncio.run(_answers(folder, device, manifest)) for device in ("cpu", "cuda")]
    for expected, found in zip(*answers, strict=True):
        assert np.array_equal(found.token_ids, expected.token_ids), (found, expected)
        assert np.allclose(found.log_probs, expected.log_probs, atol=CLOSE)


async def _answers(folder: Path, device: str, manifest: Any) -> list[Any]:
    engine = create(EngineSpec(served=student_of(folder), device=device))
    truncated = StudentSampling(max_new_tokens=6, top_k=5, top_p=0.9)
    tasks = [
        make_task(words(9), n=3, task_id="a", max_new_tokens=6, presence_penalty=0.5),
        task_with_support(words(7), truncated, n=2, task_id="b"),
    ]
    try:
        found: list[Any] = []
        for _ in range(2):
            found += await asyncio.gather(*(engine.generate(task) for task in tasks))
            await engine.load_policy(manifest)
        of = found[0]
        asked = ScoreTask(
            task_id="s",
            prompt_ids=of.prompt_ids,
            token_ids=of.token_ids,
            offsets=of.offsets,
            top_k=5,
        )
        return [*found, await engine.score(asked)]
    finally:
        await engine.close()


def full_card() -> None:
    """A model without room, and a trainer whose moments have none, are a sentence each."""
    with tempfile.TemporaryDirectory() as base:
        folder = save(make_model(), Path(base) / "model")
        max_bytes[0] = 100
        try:
            create(EngineSpec(served=student_of(folder), device="cuda:0"))
        except UserError as error:
            assert str(error) == (
                f"actors.rollout.devices: {str(folder)!r} does not fit on 'cuda:0' (CUDA out of "
                "memory. Tried to allocate 5120 bytes.); expected a card with more free memory"
            ), error
        else:
            raise AssertionError("it fits")
        # Of the vocabulary's 40 rows of 32 numbers: twice 2 bytes for weights, not 4 for moments.
        max_bytes[0] = 40 * 32 * 3
        topology = Topology(
            data=DataConfig(train="x"),
            student=StudentConfig(model=str(folder), dtype="bfloat16"),
            actors=ActorsConfig(trainer=TrainerConfig(device="cuda:0")),
            optimizer=OPTIMIZER,
        )
        context = ActorContext(*(Path(base), Path(base), "rank-0", "rank", 0, topology, "run", 0))
        assert rank.main(context) == 1
        max_bytes[0] = 1 << 40


def refusals() -> None:
    """What CUDA refuses, the card refuses."""
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    for wrong in (
        lambda: there @ here,
        lambda: there.gather(1, torch.zeros(2, 2, dtype=torch.int64)),
        lambda: there.index_select(0, torch.zeros(1, dtype=torch.int64)),
        lambda: torch.cat([there, here]),
        lambda: there.numpy(),
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("it was taken")
    assert there[torch.zeros(1, dtype=torch.int64)].is_cuda and (there * here.sum()).is_cuda


CHECKS: dict[str, Callable[[], None]] = {
    "refusals": refusals,
    "full card": full_card,
    "engine": engine_like_a_cpu,
    **{name: lambda case=case: step_like_a_cpu(case) for name, case in CASES.items()},
}


def threads_too() -> None:
    """What the engine's thread makes may lie on the card as well."""
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with on_card() if thread.name == "decode" else contextlib.nullcontext():
            run(thread)

    threading.Thread.run = within  # type: ignore[method-assign,assignment]


def main(names: list[str]) -> None:
    threads_too()
    failures = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
        except Exception:
            failures[name] = traceback.format_exc()[-6000:]
    print(json.dumps(failures))


if __name__ == "__card__":
    main(sys.argv[1:])
