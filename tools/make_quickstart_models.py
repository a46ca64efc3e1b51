"""Make the quickstart world: tokenizer, student, teacher, training and held-out questions.

    python tools/make_quickstart_models.py --out examples/quickstart

The templates in ``OUT/templates`` are read, not written; everything else is a function of the seed
and of them. Data files are the same bytes everywhere; weights only on the same kind of processor
with the same torch build. Each model is trained with one thread, so the number of cores does not
matter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quickstart_corpus import Corpus, Example
from quickstart_world import (
    MODULUS,
    Floats,
    Ints,
    distinct_questions,
    make_world,
    question_text,
    true_answers,
)

from zppo.config.options import counting
from zppo.errors import Parser, run_command

WORDS = [
    "*",
    "=",
    ";",
    "?",
    ",",
    "mod",
    "\\boxed{",
    "}",
    "<candidate>",
    "</candidate>",
    "answer",
    "in",
    "one",
    "candidate",
    "is",
    "correct",
    "and",
    "wrong",
    "all",
    "keep",
    "the",
    "values",
]
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "<bos> {% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor "
    "%}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRAIN_QUESTIONS = 2560
HELD_OUT_QUESTIONS = 256
SEED = 23
PARTS = ("data", "student", "teacher")


class Stage(NamedTuple):
    """``steps`` optimizer steps on ``batch`` examples of each shape."""

    steps: int
    batch: dict[str, int]


class Recipe(NamedTuple):
    """How one model is pre-trained: first mostly the facts, on short prompts, then every shape of
    prompt."""

    stages: tuple[Stage, ...]
    learning_rate: float = 2e-3
    warmup: int = 50


STUDENT = Recipe(
    (
        Stage(320, {"plain": 192, "bcq": 24, "ncq": 12}),
        Stage(400, {"plain": 96, "bcq": 64, "ncq": 64}),
    )
)
TEACHER = Recipe(
    (Stage(500, {"plain": 192, "compress": 32}), Stage(200, {"plain": 128, "compress": 64}))
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: one token a word, numbers 0..23 included, words apart by white
    space."""
    words = [*SPECIALS, *WORDS, *(str(n) for n in range(MODULUS + 1))]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of 0.34 M parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.0,
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Tokens int64 (B, T) and labels (B, T), -100 outside the answers; padded on the right."""
    prompts = [f"<bos> <user> {example.prompt} <assistant>" for example in examples]
    answers = [f"{example.answer} <eos>" for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True))
    tokens_BT = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(examples), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(prompt) + len(answer)
        tokens_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return tokens_BT, labels_BT


def batches(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, recipe: Recipe
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One list of micro-batches a step, each of one shape so that little is padded."""
    for stage in recipe.stages:
        for _ in range(stage.steps):
            yield [
                encode(tokenizer, corpus.draw(shape, count)) for shape, count in stage.batch.items()
            ]


def answer_loss(model: Qwen3ForCausalLM, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross-entropy of the answers.

    There is no attention mask: padding is on the right, where causal attention never sees it.
    """
    hidden_BTD = model.model(input_ids=tokens_BT).last_hidden_state[:, :-1]
    wanted = labels_BT[:, 1:] != -100
    logits_NV = model.lm_head(hidden_BTD[wanted])
    return torch.nn.functional.cross_entropy(logits_NV, labels_BT[:, 1:][wanted], reduction="sum")


def train_step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, parts: list[tuple[Tensor, Tensor]]
) -> list[float]:
    """One optimizer step on the mean over all answer tokens of the batch; returns the mean loss of
    each micro-batch."""
    counts = [int((labels_BT != -100).sum()) for _, labels_BT in parts]
    losses = []
    for (tokens_BT, labels_BT), count in zip(parts, counts, strict=True):
        loss = answer_loss(model, tokens_BT, labels_BT)
        (loss / sum(counts)).backward()
        losses.append(float(loss.detach()) / count)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    recipe: Recipe,
    name: str,
) -> None:
    """AdamW, linear warm-up and decay, in place. Prints losses by shape and the processor time
    spent."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    started = time.process_time()
    total = sum(stage.steps for stage in recipe.stages)
    for step, parts in enumerate(batches(tokenizer, corpus, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min((step + 1) / recipe.warmup, 1.0 - step / total)
        losses = train_step(model, optimizer, parts)
        if step % 50 == 49 or step == 0:
            shown = "  ".join(
                f"{shape} {loss:.3f}"
                for shape, loss in zip(recipe.stages[0].batch, losses, strict=True)
            )
            seconds = time.process_time() - started
            print(
                f"{name} step {step + 1}/{total}  loss {shown}  {seconds:.0f} processor seconds",
                flush=True,
            )


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder: bfloat16 weights, to stay small, and a config that has them
    loaded as float32."""
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_questions(path: Path, prefix: str, factors_BF: Ints) -> None:
    """JSONL rows ``{"id", "question", "answer"}``."""
    answers = true_answers(factors_BF)
    rows = [
        {"id": f"{prefix}-{row:04d}", "question": question_text(factors_F), "answer": str(answer)}
        for row, (factors_F, answer) in enumerate(zip(factors_BF, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(out: Path, seed: int, part: str) -> None:
    """Write one part (``data``, ``student`` or ``teacher``) below ``out``."""
    world = make_world(np.random.default_rng(seed))
    questions = distinct_questions(
        TRAIN_QUESTIONS + HELD_OUT_QUESTIONS, np.random.default_rng(seed + 1)
    )
    train, held_out = questions[:TRAIN_QUESTIONS], questions[TRAIN_QUESTIONS:]
    if part == "data":
        write_questions(out / "train.jsonl", "train", train)
        write_questions(out / "heldout.jsonl", "heldout", held_out)
    elif part == "student":
        make_folder(out, part, STUDENT, world.misprinted_VVV, held_out, seed)
    else:
        make_folder(out, part, TEACHER, world.clean_VVV, held_out, seed + 1)


def make_folder(
    out: Path, name: str, recipe: Recipe, belief_VVV: Floats, held_out: Ints, seed: int
) -> None:
    """Pre-train one model on a belief and save it as ``out/name``."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    corpus = Corpus(belief_VVV, out / "templates", held_out, np.random.default_rng(seed + 2))
    pretrain(model, tokenizer, corpus, recipe, name)
    save_model(model, tokenizer, out / name)


def make_all(out: Path, seed: int) -> int:
    """Make every part, each in a process with one thread of its own. Returns the first exit status
    that is not 0."""
    command = [sys.executable, __file__, "--out", str(out), "--seed", str(seed), "--part"]
    processes = [subprocess.Popen([*command, part]) for part in PARTS]
    return max(process.wait() for process in processes)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that holds templates/ and receives the rest"
    )
    parser.add_argument("--seed", type=counting, default=SEED)
    parser.add_argument("--part", choices=PARTS, help="make one part alone")
    options = parser.parse_args()
    if not (options.out / "templates" / "plain.j2").is_file():
        parser.error(
            f"--out {options.out}: has no templates/plain.j2; expected a folder with the "
            "quickstart's templates"
        )
    if options.part is None:
        return make_all(options.out, options.seed)
    torch.set_num_threads(1)
    make(options.out, options.seed, options.part)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
