"""What a quickstart model knows: accuracy on plain questions, and how much it believes each class
of facts.

    python tools/probe_quickstart.py examples/quickstart/student

Works on any folder that `AutoModelForCausalLM` loads, such as ``checkpoints/step-80/model`` of a
run. With ``--candidates`` the hard questions are also asked as BCQ and NCQ.

Legend: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_quickstart_models import SEED
from quickstart_corpus import load_templates
from quickstart_world import MODULUS, World, compressed_text, make_world

from zppo.config.options import counting, positive
from zppo.errors import Parser, run_command
from zppo.plan.model_class import SEEING
from zppo.plan.model_folder import inspect_model

ANSWER_TOKENS = 24


class Row(NamedTuple):
    question: str
    answer: str

    @property
    def factors(self) -> list[int]:
        return [int(f) for f in self.question.removesuffix(f" mod {MODULUS}").split(" * ")]


class Probe:
    """Asks one model at temperature 1, several times a prompt."""

    def __init__(self, folder: Path, templates: Path, group_size: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.templates = load_templates(templates)
        self._group_size = group_size

    def render(self, shape: str, row: Row, **variables: object) -> list[int]:
        """Token ids of a whole prompt, ready to be answered."""
        prompt = self.templates[shape].render(question=row.question, **variables)
        return self.tokenizer.encode(f"<bos> <user> {prompt} <assistant>")

    def answers(self, prompts: list[list[int]]) -> list[list[str]]:
        """``group_size`` texts for each prompt; prompts of one length share a batch, so nothing is
        padded."""
        texts: list[list[str]] = [[] for _ in prompts]
        for length in sorted({len(prompt) for prompt in prompts}):
            where = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            tokens_NT = torch.tensor([prompts[index] for index in where]).repeat_interleave(
                self._group_size, dim=0
            )
            out_NT = self.model.generate(
                tokens_NT,
                attention_mask=torch.ones_like(tokens_NT),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=ANSWER_TOKENS,
            )
            decoded = self.tokenizer.batch_decode(out_NT[:, length:], skip_special_tokens=True)
            for place, text in zip(np.repeat(where, self._group_size), decoded, strict=True):
                texts[place].append(text)
        return texts


def boxed_value(text: str) -> str:
    """The content of the last box, or nothing."""
    return text.rpartition("\\boxed{")[2].partition("}")[0].strip() if "\\boxed{" in text else ""


def accuracies(rows: list[Row], texts: list[list[str]]) -> np.ndarray:
    """Mean accuracy of each group, float64 (N,)."""
    return np.array(
        [
            np.mean([boxed_value(t) == row.answer for t in group])
            for row, group in zip(rows, texts, strict=True)
        ]
    )


def step_values(text: str) -> np.ndarray:
    """The step values of an answer, as its compressed form shows them; malformed steps are left
    out."""
    values = [part.rpartition("=")[2].strip() for part in text.split(";") if "=" in part]
    return np.array([int(value) for value in values if value.isdigit()] or [0])


def true_values(row: Row) -> np.ndarray:
    """The step values of the right answer."""
    return np.array(
        [int(np.prod(row.factors[: n + 1]) % MODULUS) for n in range(1, len(row.factors))]
    )


def candidate_accuracies(probe: Probe, rows: list[Row], texts: list[list[str]]) -> dict[str, float]:
    """BCQ and NCQ accuracy on the given rows; candidates are compressed by rule, the right one is
    the true chain."""
    bcq: list[list[int]] = []
    ncq: list[list[int]] = []
    for row, group in zip(rows, texts, strict=True):
        wrong = [text for text in group if boxed_value(text) != row.answer]
        shown = [compressed_text(step_values(text)) for text in wrong]
        pair = [compressed_text(true_values(row)), shown[0]]
        bcq.append(probe.render("bcq", row, candidates=pair[:: 1 if len(bcq) % 2 else -1]))
        answers = list(dict.fromkeys(boxed_value(text) for text in wrong))
        ncq.append(probe.render("ncq", row, candidates=shown, wrong_answers=answers))
    return {
        name: float(accuracies(rows, probe.answers(p)).mean())
        for name, p in (("BCQ", bcq), ("NCQ", ncq))
    }


def fact_class(world: World, a: int, b: int) -> str:
    """How the student's corpus prints a fact."""
    belief_V = world.misprinted_VVV[a, b]
    share = belief_V[world.truth_VV[a, b]]
    if share == 1.0:
        return "right"
    if (belief_V > 0).sum() == 2:
        return "ambiguous"
    return f"misprinted, true share {share}" if share < 0.1 else "misprinted, true share 0.1-0.5"


@torch.no_grad()
def fact_beliefs(probe: Probe, world: World) -> dict[str, tuple[int, float]]:
    """Number of facts and mean probability of the true value by class, each fact asked as a
    question's first step."""
    pairs = [(a, b) for a in range(2, MODULUS) for b in range(a, MODULUS)]
    prefixes = [
        probe.render("plain", Row(f"{a} * {b} * 5 mod {MODULUS}", ""))
        + probe.tokenizer.encode(f"{a} * {b} =")
        for a, b in pairs
    ]
    probabilities_NV = probe.model(torch.tensor(prefixes)).logits[:, -1].softmax(-1)
    by_class: dict[str, list[float]] = defaultdict(list)
    for (a, b), probabilities_V in zip(pairs, probabilities_NV, strict=True):
        true_token = probe.tokenizer.convert_tokens_to_ids(str(a * b % MODULUS))
        by_class[fact_class(world, a, b)].append(float(probabilities_V[true_token]))
    return {
        name: (len(shares), float(np.mean(shares))) for name, shares in sorted(by_class.items())
    }


def read_rows(path: Path) -> list[Row]:
    return [
        Row(row["question"], row["answer"])
        for row in map(json.loads, path.read_text().splitlines())
    ]


def report(probe: Probe, rows: list[Row], candidates: bool) -> Iterable[str]:
    """The lines that are printed."""
    texts = probe.answers([probe.render("plain", row) for row in rows])
    accuracy_N = accuracies(rows, texts)
    yield (
        f"plain accuracy {accuracy_N.mean():.3f}, never right {np.mean(accuracy_N == 0):.3f} of "
        f"{len(rows)} questions"
    )
    hard = [index for index, value in enumerate(accuracy_N) if value < 0.5]
    if candidates and hard:
        yield f"hard questions {len(hard)}, plain accuracy on them {accuracy_N[hard].mean():.3f}"
        found = candidate_accuracies(probe, [rows[i] for i in hard], [texts[i] for i in hard])
        yield from (f"{name} accuracy on them {value:.3f}" for name, value in found.items())
    for name, (count, share) in fact_beliefs(
        probe, make_world(np.random.default_rng(SEED))
    ).items():
        yield f"{count:4d} facts {name}: model believes the true value with {share:.3f}"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=Path, default=Path("examples/quickstart"))
    parser.add_argument("--group-size", type=positive, default=8)
    parser.add_argument("--seed", type=counting, default=0)
    parser.add_argument(
        "--candidates", action="store_true", help="also ask the hard questions as BCQ and NCQ"
    )
    options = parser.parse_args()
    if inspect_model(options.model, "MODEL").opened_by == SEEING:
        parser.error(f"{options.model} is a model of pictures")
    if not (options.world / "templates" / "plain.j2").is_file():
        parser.error(f"--world {options.world}: has no templates/plain.j2")
    torch.manual_seed(options.seed)
    probe = Probe(options.model, options.world / "templates", options.group_size)
    for line in report(probe, read_rows(options.world / "heldout.jsonl"), options.candidates):
        print(line)


if __name__ == "__main__":
    sys.exit(run_command(main))
