"""Samples and tokens per second of GRPO training: a whole run of ours against TRL's GRPOTrainer, in
turns.

    python -P benches/end_to_end.py --model models/smollm2-student --data
    examples/smollm2/train.jsonl \
        --templates examples/smollm2/templates --trl-python OTHER_VENV/bin/python [--rounds 2]
        [--json FILE]

Both sides train the same model on the same prompts: as many questions, rollouts of each, updates,
the same dtype, loss and cores, the same limit of tokens. Responses end where the model ends them or
at the limit; `--equal-lengths` gives both a copy of the model whose end token it never writes.
Rewards come from one rule, and a sample of TRL's texts is graded again by our grader. Ours runs
with all its processes, the journal and the rollouts on disk, but without checkpoints. The warm-up
is left out on both sides, and so are our last steps, in which nothing new is sampled. The clock
runs over whole steps: from the end of one update to the end of another. Processor time is that of
all processes of a side over the same steps; unlike seconds it can be compared on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.config.options import counting, finite, positive
from zppo.config.topology import DataConfig
from zppo.data.corpus import load_questions
from zppo.errors import Parser, UserError, run_command
from zppo.grading import GRADERS
from zppo.grading.boxes import last_boxed
from zppo.plan.model_folder import inspect_model
from zppo.prompting.prompts import PromptSet
from zppo_actors.supervisor.environment import KEEP_MEMORY
from zppo_actors.supervisor.vitals import children_by_parent, usage

TRL_SIDE = Path(__file__).with_name("trl_grpo.py")
END_TOKEN = "<empty_output>"
"""A token of SmolLM2 that a chat never holds."""


class Order(Struct, frozen=True, kw_only=True):
    """What both sides do in a run: `steps` measured steps of `questions` groups, each of
    `updates_per_step` updates."""

    model: str
    prompts: str
    questions: int
    group_size: int
    tokens: int
    updates_per_step: int
    steps: int
    warmup: int
    threads: int
    dtype: str
    learning_rate: float
    trl_batch: int
    trl_compile: bool
    trl_autocast: bool


class Measured(Struct, frozen=True, kw_only=True):
    """One run. `seconds_generating` is known where sampling and training take turns, as in TRL."""

    side: str
    seconds: float
    seconds_training: float
    updates: int
    samples: int
    tokens: int
    accuracy: float
    processor_seconds: float
    seconds_generating: float | None = None
    live_share: float | None = None
    load_before: float = 0.0

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


# ---- what both sides are given -------------------------------------------------------------------


def endless_copy(model: Path, out: Path, end_token: str) -> Path:
    """A folder with the same weights whose end token is `end_token`, so that responses run up to
    the limit."""
    out.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (out / file.name).symlink_to(file.resolve())
        elif file.is_file():
            shutil.copy(file, out / file.name)
    vocabulary = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    if end_token not in ids:
        raise UserError(f"--end-token: the tokenizer of {model} has no special token {end_token!r}")
    edit(out / "tokenizer_config.json", eos_token=end_token)
    for name in ("config.json", "generation_config.json"):
        edit(out / name, eos_token_id=ids[end_token])
    return out


def edit(file: Path, **values: Any) -> None:
    """Set values in a JSON file."""
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def write_prompts(data: Path, templates: Path | None, system_prompt: str | None, out: Path) -> Path:
    """The chat that a run of ours would send for each question, with its gold answer. Raises
    UserError."""
    prompts = PromptSet(templates, system_prompt)
    rows = []
    for question in load_questions(str(data), DataConfig(train=str(data)), Path.cwd()).questions:
        messages = prompts.plain(question).messages
        chat = [{"role": message.role, "content": message.content} for message in messages]
        rows.append({"prompt": chat, "gold": question.answer})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


# ---- our side ------------------------------------------------------------------------------------


def topology(order: Order, options: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The run as a topology. It is longer than what is measured by the steps that finish without
    new samples."""
    drain = options.staleness + 1
    engine_args = {
        "transformers": {"max_sequences": options.max_sequences, "max_length": 512},
        "vllm": {"max_num_seqs": options.max_sequences, "max_model_len": 512},
    }[options.engine]
    data = {"train": str(options.data.resolve()), "max_prompt_tokens": 400, "grader": "exact"}
    data |= {"templates": str(options.templates.resolve())} if options.templates else {}
    data |= {"system_prompt": options.system_prompt} if options.system_prompt else {}
    return {
        "run": {"name": "race", "directory": str(run), "steps": order.warmup + order.steps + drain},
        "method": {
            "name": "grpo",
            "group_size": order.group_size,
            "updates_per_step": order.updates_per_step,
            "advantage": "grpo",
        },
        "data": data,
        "student": {
            "model": order.model,
            "dtype": order.dtype,
            "sampling": {"max_new_tokens": order.tokens, "temperature": 1.0},
        },
        "scheduler": {"max_staleness": options.staleness, "new_questions": order.questions},
        "optimizer": {"learning_rate": order.learning_rate, "weight_decay": 0.0},
        "actors": {
            "rollout": {
                "count": options.rollouts,
                "engine": options.engine,
                "engine_args": engine_args,
                "threads": options.rollout_threads,
            },
            "trainer": {
                "micro_batch_tokens": options.micro_batch_tokens,
                "threads": options.trainer_threads,
                "measured_rollouts": options.measured_rollouts,
            },
        },
        "checkpoints": {"every": 1_000_000},
    }


def ours(order: Order, options: argparse.Namespace) -> Measured:
    """Launch a run and read what it measured of itself."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        file = Path(scratch) / "race.yaml"
        file.write_text(json.dumps(topology(order, options, run)), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "zppo.launch", "--topology", str(file)]
        with used_by_step(run / "metrics.jsonl") as used:
            call(command, options.verbose)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return measured([json.loads(line) for line in lines], order, used)


@contextmanager
def used_by_step(metrics: Path, every: float = 0.1) -> Iterator[list[float]]:
    """Processor seconds of all children of this process when each step of the run was seen in its
    `metrics`, which is looked at so often (seconds)."""
    used, over = list[float](), threading.Event()
    before = usage(os.getpid(), {})[0]

    def watch() -> None:
        while not over.wait(every):
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if steps > len(used):
                now = usage(os.getpid(), children_by_parent())[0] - before
                used.extend([now] * (steps - len(used)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield used
    finally:
        over.set()
        watcher.join()


def measured(steps: Sequence[dict[str, Any]], order: Order, used: Sequence[float]) -> Measured:
    """From the end of the warm-up to the end of the last measured step; `used`: processor seconds
    up to the end of each step."""
    chosen = steps[order.warmup : order.warmup + order.steps]

    def total(name: str) -> float:
        return float(sum(step[name] for step in chosen))

    seconds = chosen[-1]["wall_seconds"] - steps[order.warmup - 1]["wall_seconds"]
    return Measured(
        side="zppo",
        seconds=seconds,
        seconds_training=total("train/seconds_proximal") + total("train/seconds_update"),
        updates=round(total("train/updates")),
        samples=order.steps * order.questions * order.group_size,
        tokens=round(total("tokens/generated")),
        accuracy=total("accuracy/new") / len(chosen),
        processor_seconds=used[order.warmup + order.steps - 1] - used[order.warmup - 1],
        live_share=total("train/live_rollout_share") / len(chosen),
    )


# ---- TRL's side ----------------------------------------------------------------------------------


def trl(order: Order, options: argparse.Namespace) -> Measured:
    """Run the other side in its own Python, with as many threads as it is given."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "order.json"
        file.write_bytes(msgspec.json.encode(order))
        # -P: the folder of the script has a kernels.py, which would hide the package of that name
        # from transformers.
        printed = call([str(options.trl_python), "-P", str(TRL_SIDE), str(file)], options.verbose)
        found = json.loads(printed.splitlines()[-1])
    for text, gold, reward in found.pop("texts"):
        answer = last_boxed(text)
        right = answer is not None and bool(GRADERS["exact"].quick(answer, gold))
        if right != bool(reward):
            raise UserError(
                f"TRL's side gave {reward} to {text!r} with the answer {gold!r}, our grader says "
                f"{right}"
            )
    return Measured(
        side="trl", seconds_training=found["seconds"] - found["seconds_generating"], **found
    )


# ---- the race ------------------------------------------------------------------------------------


def call(command: Sequence[str], verbose: bool) -> str:
    """Standard output of a command. Leaves with its last lines if it fails.

    Both sides get what our launcher sets for its own processes: a C library that keeps freed
    memory.
    """
    environment = (
        os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | KEEP_MEMORY
    )
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode:
        tail = "\n".join(((done.stdout or "") + (done.stderr or "")).splitlines()[-30:])
        raise UserError(
            f"{' '.join(command[:4])} … ended with exit code {done.returncode}:\n{tail}"
        )
    return done.stdout


Side = Callable[[Order, argparse.Namespace], Measured]


def race(order: Order, options: argparse.Namespace, sides: Sequence[Side]) -> Iterator[Measured]:
    """Each side once a round, in the same order; the load is that of one minute before the
    start."""
    for _ in range(options.rounds):
        for side in sides:
            load = os.getloadavg()[0]
            yield msgspec.structs.replace(side(order, options), load_before=load)


def summary(runs: Sequence[Measured]) -> dict[str, Any]:
    """Medians of each side and their ratio."""
    sides = sorted({run.side for run in runs})
    medians = {
        side: {
            "samples_per_second": statistics.median(
                run.samples_per_second for run in runs if run.side == side
            ),
            "tokens_per_second": statistics.median(
                run.tokens_per_second for run in runs if run.side == side
            ),
            "samples_per_processor_second": statistics.median(
                run.samples / run.processor_seconds for run in runs if run.side == side
            ),
        }
        for side in sides
    }
    if len(sides) < 2:
        return {"medians": medians}
    ratio = {name: medians["zppo"][name] / medians["trl"][name] for name in medians["zppo"]}
    return {"medians": medians, "ratio": ratio}


def describe(run: Measured) -> str:
    live = (
        ""
        if run.live_share is None
        else f", {100 * run.live_share:.0f} % of rollouts with an advantage"
    )
    sampling = "beside it" if run.seconds_generating is None else f"{run.seconds_generating:.1f}"
    return (
        f"{run.side:4}  {run.samples_per_second:6.2f} samples/s  {run.tokens_per_second:7.1f} "
        "tokens/s  "
        f"{run.seconds:6.1f} s, {run.processor_seconds:.1f} s of processor time, for {run.updates} "
        f"updates (training {run.seconds_training:.1f}, "
        f"sampling {sampling}), accuracy {run.accuracy:.2f}{live}, load {run.load_before:.1f}"
    )


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Order]:
    """The copy of the model and the prompts, in a folder that goes away again."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = set(Order.__struct_fields__) - {"model", "prompts"}
        model = options.model.resolve()
        inspect_model(model, "--model")
        if options.equal_lengths:
            model = endless_copy(model, folder / "model", options.end_token)
        yield Order(
            model=str(model),
            prompts=str(
                write_prompts(
                    options.data, options.templates, options.system_prompt, folder / "prompts.jsonl"
                )
            ),
            **{name: getattr(options, name) for name in names},
        )


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    made.add_argument("--templates", type=Path)
    made.add_argument("--system-prompt")
    made.add_argument(
        "--end-token", default=END_TOKEN, help="a special token that the model never writes"
    )
    made.add_argument(
        "--equal-lengths", action="store_true", help="every response runs up to the limit"
    )
    made.add_argument(
        "--trl-python", type=Path, help="Python with TRL; without it our side runs alone"
    )
    made.add_argument("--trl-only", action="store_true", help="run TRL's side alone")
    made.add_argument("--rounds", type=positive, default=2)
    made.add_argument("--questions", type=positive, default=12, help="questions of a step")
    made.add_argument("--group-size", type=positive, default=8)
    made.add_argument("--tokens", type=positive, default=48, help="most tokens of a response")
    made.add_argument("--updates-per-step", type=positive, default=2)
    made.add_argument("--steps", type=positive, default=4, help="measured steps of a run")
    made.add_argument(
        "--warmup",
        type=positive,
        default=1,
        help="steps before them, at least one",
    )
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    made.add_argument("--learning-rate", type=finite, default=1e-5)
    made.add_argument("--threads", type=positive, default=2, help="threads of TRL's process")
    made.add_argument(
        "--trl-batch", type=positive, default=8, help="rollouts in one forward pass of TRL"
    )
    made.add_argument("--trl-compile", action="store_true", help="TRL with torch.compile")
    made.add_argument(
        "--trl-autocast", action="store_true", help="TRL with fp32 weights and bf16 autocast"
    )
    made.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    made.add_argument("--rollouts", type=positive, default=1, help="our rollout processes")
    made.add_argument("--rollout-threads", type=positive, default=1, help="threads of each of them")
    made.add_argument("--trainer-threads", type=positive, default=1)
    made.add_argument(
        "--max-sequences", type=positive, default=96, help="sequences sampled at once"
    )
    made.add_argument("--micro-batch-tokens", type=positive, default=2048)
    made.add_argument(
        "--measured-rollouts", default="trained", choices=("all", "sample", "trained")
    )
    made.add_argument("--staleness", type=counting, default=1)
    made.add_argument("--json", type=Path, help="write all numbers to this file")
    made.add_argument("--verbose", action="store_true")
    return made


def check(options: argparse.Namespace) -> None:
    """Both sides must be able to do the same. Raises UserError."""
    samples = options.questions * options.group_size
    if samples % (options.updates_per_step * options.trl_batch):
        raise UserError(
            f"--trl-batch {options.trl_batch}: {samples} rollouts do not split into "
            f"{options.updates_per_step} updates "
            "of whole batches; expected a divisor of the rollouts of an update"
        )


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check(options)
    sides: list[Side] = [] if options.trl_only else [ours]
    sides += [trl] if options.trl_python else []
    runs = []
    with prepared(options) as order:
        for run in race(order, options, sides):
            runs.append(run)
            print(describe(run), flush=True)
    found = summary(runs)
    print(json.dumps(found, indent=2))
    if options.json:
        kept = {"order": msgspec.to_builtins(order), "runs": msgspec.to_builtins(runs), **found}
        options.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
