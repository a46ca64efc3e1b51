"""Compare trainer and engine with transformers' own eager attention, for every decoder family:

    python tools/model_families.py                 all families; write docs/models.md as well
    python tools/model_families.py llama gemma2    these alone; print their rows

The reference is transformers with `attn_implementation="eager"`, in float32, one unpadded sequence
at a time. The trainer is given a window whose rows are padded and whose rollouts share their
prompts; the engine samples groups of unequal prompts in one batch. Each family has a process of its
own, with a time limit. The numbers are the largest differences of a token's log-prob.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_models import CONTEXT, TOKENIZER, VOCABULARY, families, save_tiny

from zppo.config.method import MethodConfig
from zppo.config.options import positive
from zppo.config.served import ServedModel
from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    ModelConfig,
    StudentConfig,
    Topology,
    TrainerConfig,
)
from zppo.errors import Parser, UserError, run_command
from zppo.plan.model_folder import inspect_model
from zppo.training.batch import assemble
from zppo.training.state import build_trainer, try_saving
from zppo.training.step import train_step
from zppo.training.trainer import Trainer
from zppo_actors.engines import EngineSpec, create
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.transformers import engine as own_engine
from zppo_actors.engines.transformers.models import context_length
from zppo_protocol.messages import GenerateTask, TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.values import ChatMessage, Prompt, Sampling

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
LIMIT_SECONDS = 120.0
LIMIT_BYTES = 12 << 30
HOLDS = 1e-3
"""Largest difference that counts as the same computation in float32."""


@dataclass(frozen=True)
class Verdict:
    """What one family gave: the largest difference of trainer and engine, or the sentence that
    refuses it. `failed` is a fault that no sentence covers."""

    family: str
    trainer: float | str = ""
    engine: float | str = ""
    failed: str = ""


# ---- one family ----------------------------------------------------------------------------------


def examine(family: str, **changes: Any) -> Verdict:
    """Build, train and sample a tiny model of the family; `changes` are settings of its
    configuration."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            save_tiny(folder, family, **changes)
        except Exception as error:
            return Verdict(family, failed=f"cannot be built tiny: {_short(error)}")
        return examine_folder(family, folder)


def examine_folder(family: str, folder: Path) -> Verdict:
    """The verdict on a model folder of the tiny vocabulary."""
    answers: list[float | str] = []
    faults = []
    for part, measure in (("trainer", trainer_difference), ("engine", engine_difference)):
        try:
            answers.append(measure(folder))
        except UserError as error:
            answers.append(str(error).replace(str(folder), "FOLDER"))
        except Exception as error:
            faults.append(f"{part}: {_short(error)}")
            answers.append("")
    return Verdict(family, *answers, failed="; ".join(faults))


def eager_log_probs(folder: Path, prompt: np.ndarray, response: np.ndarray, model: Any) -> Tensor:
    """Log-probs of the response [T] by one unpadded pass of the reference."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


def reference_of(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def largest_difference(
    samples: Sequence[GroupSamples], found: Sequence[Tensor], folder: Path
) -> float:
    """Between `found`, log-probs [T] of each group, and the reference."""
    model, differences = reference_of(folder), [0.0]
    for group, log_probs_T in zip(samples, found, strict=True):
        expected_T = torch.cat(
            [
                eager_log_probs(folder, group.prompt_ids, response, model)
                for response in np.split(group.token_ids, group.offsets[1:-1])
            ]
        )
        differences.append(float((expected_T - log_probs_T).abs().max()))
    return max(differences) if all(map(np.isfinite, differences)) else float("nan")


# ---- the trainer ---------------------------------------------------------------------------------


def trainer_difference(folder: Path) -> float:
    """Log-probs of a window as the loss uses them; then one whole step, which must make an
    update."""
    facts = inspect_model(folder, "student.model")
    trainer = build_trainer(_topology(folder), time.perf_counter)
    window = window_within(min(facts.context, CONTEXT))
    found_T = trainer_log_probs(trainer, window)
    samples = [group.samples for group in window.groups]
    parts = found_T.split([len(one.token_ids) for one in samples])
    difference = largest_difference(samples, parts, folder)
    try_saving(trainer, folder, str(folder))
    if train_step(trainer, window)["updates"] != 1.0:
        raise RuntimeError("the step made no update")
    return difference


def trainer_log_probs(trainer: Trainer, window: TrainWindow) -> Tensor:
    """Log-probs [T] of the window's tokens under the trainer's weights."""
    rollouts = assemble(window, max_staleness=0, device=trainer.policy.device, reach=trainer.reach)
    found_T = torch.full((rollouts.tokens,), torch.nan)
    for batch in trainer.micro_batches(rollouts, np.arange(rollouts.sequences)):
        found_T[batch.tokens_R], _ = trainer.policy.log_probs(
            batch, rollouts.token_ids_T[batch.tokens_R], temperature=1.0
        )
    return found_T


def window_within(context: int) -> TrainWindow:
    """Groups of short and long prompts and responses, none longer than `context` tokens."""
    random = np.random.default_rng(0)
    groups = []
    for index, (prompt, lengths) in enumerate(
        [(2, [3, context - 2, 7]), (context // 3, [5, context // 2, 1]), (context - 9, [2, 9, 4])]
    ):
        total = sum(lengths)
        samples = GroupSamples(
            prompt_ids=random.integers(3, VOCABULARY, prompt).astype(np.int32),
            token_ids=random.integers(3, VOCABULARY, total).astype(np.int32),
            log_probs=np.full(total, -3.0, np.float32),
            offsets=np.array([0, *itertools.accumulate(lengths)], np.int32),
            version_spans=np.array([[total, 0]], np.int32),
            texts=[],
            finish_reasons=["stop"] * len(lengths),
        )
        groups.append(
            TrainGroup(
                group_id=f"g{index}",
                question_id=f"q{index}",
                kind="plain",
                samples=samples,
                rewards=np.array([1.0, 0.0, 0.0], np.float32),
            )
        )
    return TrainWindow(step=0, groups=groups)


def _topology(folder: Path) -> Topology:
    return Topology(
        data=DataConfig(train="none"),
        student=StudentConfig(
            model=str(folder), dtype="float32", sampling=Sampling(max_new_tokens=8)
        ),
        actors=ActorsConfig(trainer=TrainerConfig(micro_batch_tokens=4 * CONTEXT)),
        method=MethodConfig(updates_per_step=1),
    )


# ---- the engine ----------------------------------------------------------------------------------


def engine_difference(folder: Path) -> float:
    """Log-probs that the engine gives with groups it samples in one batch."""
    inspect_model(folder, "student.model")
    spec = EngineSpec(
        served=ServedModel(
            role="rollout",
            model=ModelConfig(model=str(folder), dtype="float32"),
            actor=ActorConfig(engine_args={"max_sequences": 16}),
            model_path="student.model",
            actor_path="actors.rollout",
        )
    )
    plain = PromptTokenizer(str(folder / TOKENIZER), "student.model")
    with mock.patch.object(own_engine, "PromptTokenizer", lambda *_: plain):
        engine = create(spec)
    context = min(context_length(AutoConfig.from_pretrained(folder).get_text_config()), CONTEXT)
    lengths = (2, context // 4, context // 2, context - 3)
    samples = asyncio.run(_sampled(engine, lengths))
    return largest_difference(samples, [torch.from_numpy(one.log_probs) for one in samples], folder)


async def _sampled(engine: Any, lengths: Sequence[int]) -> list[GroupSamples]:
    tasks = [_task(length, index) for index, length in enumerate(lengths)]
    try:
        return list(await asyncio.gather(*(engine.generate(task) for task in tasks)))
    finally:
        await engine.close()


def _task(length: int, seed: int) -> GenerateTask:
    text = " ".join(f"w{3 + (seed + 7 * i) % (VOCABULARY - 3)}" for i in range(length))
    return GenerateTask(
        task_id=f"t{seed}",
        kind="plain",
        prompt=Prompt(messages=[ChatMessage(role="user", content=text)]),
        n=3,
        sampling=Sampling(max_new_tokens=CONTEXT),
        seed=seed,
    )


# ---- all families --------------------------------------------------------------------------------


def examine_all(names: Sequence[str], processes: int) -> Iterator[Verdict]:
    """Verdicts as they come, each from a process of its own that is killed at the time limit."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < processes:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_guarded, args=(waiting[-1], theirs))
            process.start()
            theirs.close()
            running[ours] = (waiting.pop(), process, time.monotonic() + LIMIT_SECONDS)
        multiprocessing.connection.wait(list(running), timeout=1.0)
        for pipe, (name, process, deadline) in list(running.items()):
            if pipe.poll():
                yield _received(name, pipe)
            elif time.monotonic() > deadline:
                process.kill()
                yield Verdict(name, failed=f"nothing after {LIMIT_SECONDS:.0f} s")
            else:
                continue
            process.join()
            del running[pipe]


def _received(name: str, pipe: Any) -> Verdict:
    try:
        return Verdict(**pipe.recv())
    except EOFError:
        return Verdict(name, failed="its process died")


def _guarded(name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(vars(examine(name)))


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# ---- the page ------------------------------------------------------------------------------------

HEAD = """# Models

Generated by `python tools/model_families.py`; do not edit by hand.

Every family that `AutoModelForCausalLM` of transformers {version} knows, as a tiny random model in
float32. The numbers are the largest difference of a token's log-prob from transformers' own eager
attention, one sequence at a time without padding: for the trainer over a window with padding and,
where the model allows it, shared prompts; for the engine `transformers` over groups sampled in one
batch. Where there is no number, the model is refused with the sentence. vLLM (docs/vllm.md) serves
families of its own.

The engine holds recurrent states and the inputs of convolutions in its slots beside keys and
values: it reads prompts of such models in passes of one length, because padding would stay in the
states, and the trainer gives them one rollout a row, padded on the right. The largest numbers of
the delta rule (Qwen3.5, Qwen3-Next) are rounding: its chunks and its steps differ as much in
transformers' own cache.

A folder with a tower for pictures (`architectures` in its config.json says so) is opened whole by
trainer and engine. The tower is not trained by text, and saved as it was read. The rows are of what
`AutoModelForCausalLM` makes of a family: of Qwen3.5, Llama 4, Emu3 and Mllama it is the text half
alone. Families that it does not know, such as Qwen3-VL, Mistral 3, InternVL and LLaVA, have no row:
trainer and engine examine them when they are loaded, as they do every model.

{held} of {built} families hold in both, and {trained} can be trained.

| family | trainer | engine `transformers` |
|---|---|---|
"""
REST = """
Not examined: transformers or this tool cannot make a small one here, or not in time.

| family | why |
|---|---|
"""


def page(verdicts: Sequence[Verdict]) -> str:
    """The text of docs/models.md."""
    verdicts = sorted(verdicts, key=lambda verdict: verdict.family)
    built = [verdict for verdict in verdicts if not verdict.failed]
    head = HEAD.format(
        version=transformers.__version__,
        held=sum(_holds(one.trainer) and _holds(one.engine) for one in built),
        trained=sum(_holds(one.trainer) for one in built),
        built=len(built),
    )
    rest = "".join(f"| {one.family} | {one.failed} |\n" for one in verdicts if one.failed)
    return head + "".join(f"{line(one)}\n" for one in built) + REST + rest


def line(verdict: Verdict) -> str:
    """One row of the table."""
    cells = [verdict.family, _cell(verdict.trainer), _cell(verdict.engine)]
    return "| " + " | ".join(cells + [verdict.failed] * bool(verdict.failed)) + " |"


def _holds(found: float | str) -> bool:
    return isinstance(found, float) and found < HOLDS


def _cell(found: float | str) -> str:
    if isinstance(found, str):
        found = found.removeprefix("student.model: ").replace("'FOLDER'", "it")
        return found.replace("'FOLDER/config.json'", "its config.json").replace("|", "/")
    return f"{found:.0e}" if _holds(found) else f"**{found:.0e}**"


def main() -> None:
    """See the module."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--processes", type=positive, default=2)
    given = parser.parse_args()
    verdicts = []
    for verdict in examine_all(given.families or families(), given.processes):
        print(line(verdict), flush=True)
        verdicts.append(verdict)
    if not given.families:
        PAGE.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
