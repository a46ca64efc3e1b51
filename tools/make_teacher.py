r"""Fine-tune a copy of a model on worked solutions, and write it as an ordinary Hugging Face
folder.

    python tools/make_teacher.py --model models/smollm2 --lessons models/arithmetic/lessons.jsonl
    --out models/teacher \
        --templates examples/smollm2/templates --heldout examples/smollm2/heldout.jsonl

Each line of the lessons has a `question` and a `solution`. The question goes through the plain
template and the model's chat template exactly as in a run; only the tokens of the solution and the
end token are in the loss. Lessons are packed end to end into rows and kept apart by an attention
mask. With `--lessons-used` and few `--epochs` the same tool makes the *student* of an example,
which knows the form of an answer but little of its content.

Invariant: model, lessons, seed and number of threads give the same weights; the folder is whole or
not there.

Shape legend: B rows, L positions of a row, R positions that predict a token of a solution, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zppo.config.options import counting, finite, positive
from zppo.config.topology import OptimizerConfig
from zppo.data.question import Question
from zppo.errors import Parser, UserError, run_command
from zppo.plan.machine import cpu_dtype
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_tokenizer
from zppo.training.layout import PAD_ID, attention_mask
from zppo.training.optimizer import AdamW, Gradients

IGNORED = -100
"""Label of a position that predicts nothing; `cross_entropy` leaves it out."""


class Row(Struct, frozen=True):
    """One line of the lessons; other columns are ignored."""

    question: str
    solution: str


class Lesson(NamedTuple):
    """Token ids of a prompt and of its solution with the end token."""

    prompt: list[int]
    solution: list[int]

    @property
    def width(self) -> int:
        return len(self.prompt) + len(self.solution)


class Recipe(Struct, frozen=True, kw_only=True):
    """`batch_lessons` lessons an update; the learning rate rises over `warmup` of all updates, then
    falls to 0 (cosine).
    """

    epochs: float = 2.0
    batch_lessons: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    row_width: int = 256
    rows_at_once: int = 8
    seed: int = 0


# ---- lessons -------------------------------------------------------------------------------------


def read_rows(path: Path, limit: int | None) -> list[Row]:
    """The first `limit` lines. Raises UserError naming file and line."""
    try:
        lines = path.read_bytes().splitlines()[:limit]
    except OSError as error:
        raise UserError(
            f"--lessons: {path} cannot be read ({error.strerror}); expected a JSONL file"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except msgspec.DecodeError as error:
            raise UserError(
                f"{path}:{number}: {error}; expected an object with question and solution"
            ) from None
    if not rows:
        raise UserError(f"{path} holds no lessons")
    return rows


def encode(rows: Sequence[Row], tokenizer: Any, prompts: PromptSet) -> list[Lesson]:
    """Prompts as a run would show them, solutions as the model should write them."""
    questions = [
        Question(id=str(index), text=row.question, answer="") for index, row in enumerate(rows)
    ]
    prompt_ids = encode_prompts(tokenizer, [prompts.plain(question) for question in questions])
    solutions = tokenizer([row.solution for row in rows], add_special_tokens=False)["input_ids"]
    return [
        Lesson(p, [*s, tokenizer.eos_token_id]) for p, s in zip(prompt_ids, solutions, strict=True)
    ]


def pack(lessons: Sequence[Lesson], width: int) -> list[list[Lesson]]:
    """Fill rows of at most `width` positions in the order given; a longer lesson has a row of its
    own."""
    rows: list[list[Lesson]] = []
    used = width
    for lesson in lessons:
        if used + lesson.width > width or not rows:
            rows.append([])
            used = 0
        rows[-1].append(lesson)
        used += lesson.width
    return rows


class Batch(NamedTuple):
    """`labels_BL`: what each position should predict, IGNORED outside solutions; `ends_BL`:
    where its lesson ends (`attention_mask`)."""

    ids_BL: Tensor
    positions_BL: Tensor
    ends_BL: Tensor
    labels_BL: Tensor


def collate(rows: Sequence[Sequence[Lesson]]) -> Batch:
    """Write packed rows into padded blocks, in which no lesson sees another."""
    shape = (len(rows), max(sum(lesson.width for lesson in row) for row in rows))
    ids, positions = np.full(shape, PAD_ID, np.int64), np.zeros(shape, np.int64)
    ends, labels = np.full(shape, shape[1], np.int64), np.full(shape, IGNORED, np.int64)
    for index, row in enumerate(rows):
        start = 0
        for lesson in row:
            first, end = start + len(lesson.prompt) - 1, start + lesson.width
            ids[index, start:end] = [*lesson.prompt, *lesson.solution]
            positions[index, start:end] = np.arange(lesson.width)
            ends[index, start:end] = end
            labels[index, first : end - 1] = lesson.solution
            start = end
    return Batch(*(torch.from_numpy(array) for array in (ids, positions, ends, labels)))


# ---- training ------------------------------------------------------------------------------------


def updates_of(lessons: Sequence[Lesson], recipe: Recipe) -> Iterator[list[Lesson]]:
    """The lessons of each update: shuffled passes, cut after `epochs` of them; every batch is
    full."""
    rng = np.random.default_rng(recipe.seed)
    total = max(1, round(recipe.epochs * len(lessons) / recipe.batch_lessons))
    queue: list[int] = []
    for _ in range(total):
        while len(queue) < recipe.batch_lessons:
            queue += rng.permutation(len(lessons)).tolist()
        chosen, queue = queue[: recipe.batch_lessons], queue[recipe.batch_lessons :]
        yield [lessons[index] for index in chosen]


def learning_rate(recipe: Recipe, update: int, total: int) -> float:
    """Linear rise, then a cosine down to 0; `update` counts from 0."""
    done = (update + 1) / (total + 1)
    if done < recipe.warmup:
        return recipe.learning_rate * done / recipe.warmup
    return (
        recipe.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup)))
    )


def solution_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the cross entropies of the solutions' tokens; only their positions go through the
    head."""
    hidden_BLH = model.base_model(
        input_ids=batch.ids_BL,
        position_ids=batch.positions_BL,
        attention_mask=attention_mask(batch.ends_BL, model.dtype),
        use_cache=False,
    ).last_hidden_state
    wanted_BL = batch.labels_BL != IGNORED
    logits_RV = model.get_output_embeddings()(hidden_BLH[wanted_BL])
    return nn.functional.cross_entropy(
        logits_RV.float(), batch.labels_BL[wanted_BL], reduction="sum"
    )


def train(model: Any, lessons: Sequence[Lesson], recipe: Recipe) -> None:
    """AdamW as in the trainer of a run (bf16 weights are rounded stochastically); prints a line
    every ten updates."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = OptimizerConfig(
        learning_rate=recipe.learning_rate, weight_decay=0.0, state_dtype="float32"
    )
    optimizer, gradients = AdamW(parameters, config, seed=recipe.seed), Gradients(parameters)
    updates = list(updates_of(lessons, recipe))
    begin = time.perf_counter()
    for number, chosen in enumerate(updates):
        optimizer.config = msgspec.structs.replace(
            config, learning_rate=learning_rate(recipe, number, len(updates))
        )
        loss = accumulate(model, chosen, recipe, gradients)
        gradients.clip(gradients.norm(), config.gradient_clip)
        optimizer.step(gradients.tensors())
        if (number + 1) % 10 == 0 or number + 1 == len(updates):
            seconds = time.perf_counter() - begin
            left = seconds / (number + 1) * (len(updates) - number - 1)
            print(
                (
                    f"update {number + 1}/{len(updates)}  loss {loss:.4f}  {seconds:.0f} s, "
                    f"{left:.0f} s left"
                ),
                flush=True,
            )


def accumulate(
    model: Any, lessons: Sequence[Lesson], recipe: Recipe, gradients: Gradients
) -> float:
    """Gradients of the mean loss over all solution tokens of `lessons`; returns that mean."""
    gradients.clear()
    rows, tokens = pack(lessons, recipe.row_width), sum(len(lesson.solution) for lesson in lessons)
    total = 0.0
    for start in range(0, len(rows), recipe.rows_at_once):
        loss = solution_loss(model, collate(rows[start : start + recipe.rows_at_once])) / tokens
        loss.backward()
        total += float(loss.detach())
    return total


# ---- the command ---------------------------------------------------------------------------------


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Written aside and renamed."""
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


def accuracy(model: Path, options: argparse.Namespace) -> str:
    """Greedy held-out accuracy with its interval, measured by `zppo.evaluate` as for any model."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "zppo.evaluate",
        "--model",
        str(model),
        "--data",
        str(options.heldout),
    ]
    command += [
        "--samples",
        "1",
        "--temperature",
        "0",
        "--top-p",
        "1",
        "--top-k",
        "0",
        "--presence-penalty",
        "0",
    ]
    command += ["--max-new-tokens", str(options.max_new_tokens), "--json"]
    command += ["--templates", str(options.templates)] if options.templates else []
    command += ["--system-prompt", options.system_prompt] if options.system_prompt else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["the evaluation failed"])[-1])
    found = json.loads(done.stdout)
    mean, low, high = (100 * found["pass_at_1"][key] for key in ("value", "low", "high"))
    return (
        f"{mean:.1f} % (95 % interval {low:.1f} to {high:.1f}) of {found['questions']} held-out "
        "questions, greedy"
    )


def make(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train and save; with `--heldout` say what the model knew before and after. Raises
    UserError."""
    if options.out.exists():
        raise UserError(f"--out: {options.out} exists already; expected a new folder")
    rows = read_rows(options.lessons, options.lessons_used)
    prompts = PromptSet(options.templates, options.system_prompt)
    tokenizer = load_tokenizer(str(options.model), "--model")
    lessons = encode(rows, tokenizer, prompts)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model: cannot load {str(options.model)!r} ({str(error).splitlines()[0]})"
        ) from error
    if options.heldout:
        print(f"before: {accuracy(options.model, options)}", flush=True)
    train(model, lessons, recipe)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, options.out)
    if options.heldout:
        print(f"after: {accuracy(options.out, options)}", flush=True)
    print(f"{options.out} holds {options.model} after {len(lessons)} lessons")


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument(
        "--model", type=Path, required=True, help="model folder to start from; it is not changed"
    )
    made.add_argument(
        "--lessons", type=Path, required=True, help="JSONL with question and solution"
    )
    made.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    made.add_argument("--lessons-used", type=positive, metavar="N", help="only the first N lessons")
    made.add_argument(
        "--templates", type=Path, help="folder with plain.j2, as data.templates of the run"
    )
    made.add_argument("--system-prompt", help="as data.system_prompt of the run")
    made.add_argument(
        "--heldout", type=Path, help="questions to measure the accuracy on, before and after"
    )
    made.add_argument(
        "--max-new-tokens", type=positive, default=64, help="longest answer when measuring (64)"
    )
    made.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=cpu_dtype(),
        help="default: bfloat16, or float32 where the processor is slow in it",
    )
    made.add_argument("--threads", type=positive, help="CPU threads")
    made.add_argument("--epochs", type=finite, default=2.0, help="passes over the lessons (2)")
    made.add_argument("--batch-lessons", type=positive, default=32, help="lessons an update (32)")
    made.add_argument(
        "--learning-rate", type=finite, default=1e-4, help="highest learning rate (1e-4)"
    )
    made.add_argument("--seed", type=counting, default=0)
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    names = ("epochs", "batch_lessons", "learning_rate", "seed")
    try:
        for name in ("epochs", "learning_rate"):
            if getattr(options, name) <= 0:
                raise UserError(
                    f"--{name.replace('_', '-')}: is {getattr(options, name)}; expected a number "
                    "above 0"
                )
        if options.threads:
            torch.set_num_threads(options.threads)
        make(options, Recipe(**{name: getattr(options, name) for name in names}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
