"""Make the picture world of the example: pictures, questions, tokenizer, student and teacher.

    python tools/make_picture_world.py --out examples/pictures

The templates in ``OUT/templates`` are read, not written; everything else is a function of the seed
and of them. Data files are the same bytes everywhere; weights only on the same kind of processor
with the same torch build.

Both models see with the same tower. It learns first, by itself, to say what is in each cell; then
each model learns to answer, from its belief, the prompts that a run shows it
(``picture_corpus.py``).

Legend: B batch, T tokens, C cells of a picture, D width of the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from picture_corpus import Corpus, Example
from picture_world import (
    ANSWERS,
    CELL,
    CELLS,
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    THINGS,
    Fact,
    Pixels,
    Thing,
    draw,
    draw_things,
    facts_of,
    misprinted_belief,
    question_text,
    true_belief,
)

from zppo.config.options import counting
from zppo.errors import Parser, run_command

FEATURES = CELLS**2
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
PICTURE_MARKS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
WORDS = (
    *("what", "colour", "is", "the", "where", "which", "digit", "how", "many", "are"),
    *("?", ";", ",", "\\boxed{", "}", "<candidate>", "</candidate>"),
    *("answer", "in", "one", "candidate", "correct", "and", "wrong", "all"),
    *(*SHAPES, *COLOURS, *PLACES, *ANSWERS["digit"]),
)
CHAT_TEMPLATE = (
    "<bos> {% for message in messages %}<{{ message['role'] }}> "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRAIN_PICTURES, HELD_OUT_PICTURES, QUESTIONS = 384, 120, 5
SEED = 48
EMBEDDING_STD = 0.3
SEEING = ("model.vision_model.", "model.connector.", "model.text_model.embed_tokens.")
PARTS = ("data", "tower", "student", "teacher")


class Recipe(NamedTuple):
    """``steps`` optimizer steps on ``batch`` examples of each shape. Kinds of questions take turns;
    one that is named twice has two."""

    steps: int
    batch: dict[str, int]
    learning_rate: float = 3e-3
    warmup: int = 20
    kinds: tuple[str, ...] = tuple(ANSWERS)


TOWER = Recipe(250, {"plain": 128}, learning_rate=2e-3)
TEACHER = (
    Recipe(260, {"plain": 96}),
    Recipe(260, {"plain": 96}, learning_rate=2e-3),
    Recipe(300, {"plain": 96}, 2e-3, kinds=("colour", "place", *2 * ("digit",), *4 * ("count",))),
)
"""One stage after the other, each with an optimizer of its own. Counting is learnt last."""
STUDENT = tuple(stage._replace(batch={"plain": 64, "bcq": 24, "ncq": 12}) for stage in TEACHER[:2])
"""As the teacher, but for its last stage, and with prompts of all shapes."""


# ---- models --------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: one token a word, words apart by white space."""
    words = dict.fromkeys((*SPECIALS, *PICTURE_MARKS, *WORDS))
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
        additional_special_tokens=["<user>", "<assistant>", *PICTURE_MARKS],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    size = {"longest_edge": SIDE}
    pictures = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    return Idefics3Processor(
        pictures, tokenizer, image_seq_len=FEATURES, chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Idefics3ForConditionalGeneration:
    """A fresh Idefics3 of half a million parameters whose tower cuts a picture into its cells."""
    vision = Idefics3VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=CELL,
    )
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **words,
    )
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    # transformers' default of 0.02 is made for wider models; with it the first steps learn nothing.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = EMBEDDING_STD if "embed_tokens" in name else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std)
    return model


def pixel_values(pictures: list[Pixels]) -> Tensor:
    """[B, 1, 3, 48, 48] float32, as the processor makes them of pictures of this very size."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.5).div(0.5)[:, None]


# ---- training ------------------------------------------------------------------------------------


def encode(tokenizer: Any, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 (B, T), labels (B, T), -100 outside the answers, and pixel values; padded on the
    right."""
    picture = (
        f"<fake_token_around_image><global-img>{'<image>' * FEATURES}<fake_token_around_image>"
    )
    prompts = [f"<bos> <user> {picture} {one.prompt} <assistant>" for one in examples]
    answers = [f"{one.answer} <eos>" for one in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True))
    tokens_BT = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(examples), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(prompt) + len(answer)
        tokens_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return tokens_BT, labels_BT, pixel_values([one.picture for one in examples])


def answer_loss(model: Any, tokens_BT: Tensor, labels_BT: Tensor, pixels: Tensor) -> Tensor:
    """Summed cross-entropy of the answers; padding on the right is never seen by causal
    attention."""
    hidden_BTD = model.model(input_ids=tokens_BT, pixel_values=pixels).last_hidden_state[:, :-1]
    wanted = labels_BT[:, 1:] != -100
    logits_NV = model.lm_head(hidden_BTD[wanted])
    return nn.functional.cross_entropy(logits_NV, labels_BT[:, 1:][wanted], reduction="sum")


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Linear warm-up and decay."""
    for group in optimizer.param_groups:
        rise, fall = (step + 1) / recipe.warmup, 1.0 - step / recipe.steps
        group["lr"] = recipe.learning_rate * min(rise, fall)


def learn_to_see(model: Any, tokenizer: Any, recipe: Recipe, rng: np.random.Generator) -> None:
    """The tower and the connector learn to say of every cell what is there, its colour and its
    place: what they make of it is nearest to the embeddings of these words. A picture then is to
    the language model as words would be."""
    embeddings_VD = model.get_input_embeddings().weight.detach() / EMBEDDING_STD
    scale = EMBEDDING_STD * embeddings_VD.shape[1] ** 0.5
    nothing = ("<unk>",)
    words = [
        embeddings_VD[tokenizer.convert_tokens_to_ids([*group])]
        for group in ((*nothing, *THINGS), (*nothing, *COLOURS), PLACES)
    ]
    seeing = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    optimizer = torch.optim.AdamW(seeing, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.steps):
        schedule(optimizer, recipe, step)
        boards = [draw_things(rng) for _ in range(recipe.batch["plain"])]
        found = model.model.get_image_features(pixel_values([draw(board) for board in boards]))
        features_BCD = found if isinstance(found, Tensor) else found.pooler_output
        losses = [
            nn.functional.cross_entropy(
                (features_BCD @ words_WD.T / scale).flatten(0, 1), labels.flatten()
            )
            for words_WD, labels in zip(words, torch.tensor(labels_of(boards)), strict=True)
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 or step == 0:
            shown = "  ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"tower step {step + 1}/{recipe.steps}  loss {shown}", flush=True)


def labels_of(boards: list[list[Thing]]) -> np.ndarray:
    """[3, B, C] int64: thing and colour of every cell, counted from 1, 0 where there is none, and
    its place."""
    labels_3BC = np.zeros((3, len(boards), FEATURES), np.int64)
    labels_3BC[2] = np.arange(FEATURES)
    for row, board in enumerate(boards):
        for thing in board:
            labels_3BC[0, row, thing.cell] = THINGS.index(thing.name) + 1
            labels_3BC[1, row, thing.cell] = list(COLOURS).index(thing.colour) + 1
    return labels_3BC


def learn_to_answer(model: Any, tokenizer: Any, corpus: Corpus, recipe: Recipe, name: str) -> None:
    """AdamW on everything but the tower, in place. Prints losses by shape and the processor time
    spent."""
    for part in (model.model.vision_model, model.model.connector):
        part.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.process_time()
    for step in range(recipe.steps):
        schedule(optimizer, recipe, step)
        parts = [encode(tokenizer, corpus.draw(*one, recipe.kinds)) for one in recipe.batch.items()]
        counts = [int((labels_BT != -100).sum()) for _, labels_BT, _ in parts]
        losses = []
        for part, count in zip(parts, counts, strict=True):
            loss = answer_loss(model, *part)
            (loss / sum(counts)).backward()
            losses.append(float(loss.detach()) / count)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24 or step == 0:
            told = zip(recipe.batch, losses, strict=True)
            shown = "  ".join(f"{shape} {loss:.3f}" for shape, loss in told)
            seconds = time.process_time() - started
            print(f"{name} step {step + 1}/{recipe.steps}  {shown}  {seconds:.0f} s", flush=True)


# ---- files ---------------------------------------------------------------------------------------


@torch.no_grad()
def round_as_saved(model: Any) -> None:
    """Parameters become the float32 numbers that are read back from bfloat16. Buffers stay exact:
    the frequencies of the positions are not saved, but computed anew."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder: bfloat16 weights, to stay small, and a config that has them loaded as
    float32."""
    model.bfloat16()
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config["text_config"], config["vision_config"]):
        section["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def asked_about(facts: list[Fact], rng: np.random.Generator) -> list[Fact]:
    """The facts of one picture that are asked about, in order. All kinds that it has weigh the same
    in each draw, because most facts of a picture are counts."""
    kinds = Counter(fact.kind for fact in facts)
    shares = np.array([1 / kinds[fact.kind] for fact in facts]) / len(kinds)
    drawn = rng.choice(len(facts), size=min(QUESTIONS, len(facts)), replace=False, p=shares)
    return [facts[index] for index in sorted(drawn.tolist())]


def write_data(out: Path, seed: int) -> None:
    """Pictures as PNG, and JSONL rows ``{"id", "question", "answer", "images"}``."""
    rng = np.random.default_rng(seed + 1)
    (out / "media").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAIN_PICTURES), ("heldout", HELD_OUT_PICTURES)):
        rows = []
        for number in range(count):
            things = draw_things(rng)
            file = f"media/{name}-{number:03d}.png"
            Image.fromarray(draw(things)).quantize(8).save(out / file, optimize=True)
            facts = facts_of(things)
            for fact in asked_about(facts, rng):
                rows.append(
                    {
                        "id": f"{name}-{number:03d}-{fact.kind}-{fact.subject}",
                        "question": question_text(fact),
                        "answer": fact.truth,
                        "images": file,
                    }
                )
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(out: Path, seed: int, part: str) -> None:
    """Write one part below ``out``; models need the tower, which is removed by `make_all`."""
    tower = out / "tower.safetensors"
    tokenizer = make_tokenizer()
    if part == "data":
        write_data(out, seed)
        return
    model = make_model(tokenizer, seed)
    if part == "tower":
        learn_to_see(model, tokenizer, TOWER, np.random.default_rng(seed + 2))
        seen = {k: v for k, v in model.state_dict().items() if k.startswith(SEEING)}
        save_file(seen, tower)
        return
    model.load_state_dict(load_file(tower), strict=False)
    belief = misprinted_belief(np.random.default_rng(seed)) if part == "student" else true_belief()
    for stage, recipe in enumerate(STUDENT if part == "student" else TEACHER):
        corpus = Corpus(belief, out / "templates", np.random.default_rng(seed + 3 + stage))
        learn_to_answer(model, tokenizer, corpus, recipe, part)
        round_as_saved(model)
    save_model(model, tokenizer, out / part)


def make_all(out: Path, seed: int) -> int:
    """Data and tower, then both models side by side, each in a process with one thread. Returns the
    first exit status that is not 0."""
    command = [sys.executable, "-P", __file__, "--out", str(out), "--seed", str(seed), "--part"]
    for stage in (PARTS[:2], PARTS[2:]):
        processes = [subprocess.Popen([*command, part]) for part in stage]
        if status := max(process.wait() for process in processes):
            return status
    (out / "tower.safetensors").unlink()
    return 0


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that holds templates/")
    parser.add_argument("--seed", type=counting, default=SEED)
    parser.add_argument("--part", choices=PARTS, help="make one part alone")
    options = parser.parse_args()
    if not (options.out / "templates" / "plain.j2").is_file():
        parser.error(f"--out {options.out}: has no templates/plain.j2")
    if options.part is None:
        return make_all(options.out, options.seed)
    torch.set_num_threads(1)
    make(options.out, options.seed, options.part)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
