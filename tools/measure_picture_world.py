"""What the models of the picture world know: the share of drawn plain questions that each answers
right, by kind.

    python tools/measure_picture_world.py examples/pictures/teacher examples/pictures/student

Answers are sampled greedily. Questions and boards are drawn from a seed of their own, as many of
each kind, and are the same for every model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_picture_world import encode
from picture_corpus import Corpus, Example
from picture_world import ANSWERS, true_belief

from zppo.errors import Parser, run_command
from zppo.plan.model_class import SEEING
from zppo.plan.model_folder import inspect_model

QUESTIONS = 240
SEED = 4800


def answers_right(folder: Path, examples: list[Example]) -> list[bool]:
    """Whether the model in ``folder`` writes the answer of each example, word for word. A word that
    the model says greedily is right exactly if it is the likeliest after the right words before
    it, so one pass over prompts with their answers tells."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokens_BT, labels_BT, pixels = encode(tokenizer, examples)
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BT, pixel_values=pixels).logits
    said_BT, wanted_BT = logits_BTV[:, :-1].argmax(-1), labels_BT[:, 1:]
    return ((said_BT == wanted_BT) | (wanted_BT == -100)).all(1).tolist()


def shares_by_kind(folder: Path, templates: Path, questions: int = QUESTIONS) -> dict[str, float]:
    """Kind of question -> share of its ``questions / 4`` drawn questions that are answered
    right."""
    corpus = Corpus(true_belief(), templates, np.random.default_rng(SEED))
    examples = corpus.draw("plain", questions, tuple(ANSWERS))
    right = np.array(answers_right(folder, examples))
    return {kind: float(right[turn :: len(ANSWERS)].mean()) for turn, kind in enumerate(ANSWERS)}


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders beside templates/")
    options = parser.parse_args()
    for folder in options.models:
        if inspect_model(folder, "MODELS").opened_by != SEEING:
            parser.error(f"{folder} sees no pictures")
        if not (folder.resolve().parent / "templates" / "plain.j2").is_file():
            parser.error(f"{folder}: has no templates/plain.j2 beside it")
    torch.set_num_threads(1)
    print(f"| | {' | '.join(ANSWERS)} |\n|---|{'---|' * len(ANSWERS)}")
    for folder in options.models:
        shares = shares_by_kind(folder, folder.resolve().parent / "templates")
        print(f"| {folder.name} | {' | '.join(f'{share:.2f}' for share in shares.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
