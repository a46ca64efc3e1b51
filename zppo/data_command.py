"""`zppo data DATA`: what a source of questions holds, and what a model would see of it.

DATA is a source as `data.train` names it, or a topology, whose section `data` is then read. Nothing
is written. Exit codes: 0 a run could start on it, 1 it could not (bad rows, prompts that are too
long, questions that are held out too), 2 a user error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from zppo.config.load import load
from zppo.config.options import counting, data_settings, pair
from zppo.config.served import ServedModel, served_student
from zppo.config.topology import ActorConfig, DataConfig, ModelConfig, is_procedural
from zppo.data.corpus import Corpus, load_questions
from zppo.data.question import Question
from zppo.data.survey import Lengths, Shown, Survey, lengths_of, spread, survey, survey_text
from zppo.errors import EXIT_FAILED, EXIT_USER_ERROR, Parser, UserError, run_command
from zppo.evaluation.order import locate_model, served_as
from zppo.grading import shown_gold
from zppo.plan.picture_checks import layout_of
from zppo.plan.prompt_checks import Reader
from zppo.prompting.chat_template import for_template
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts
from zppo_protocol.places import in_words

TOPOLOGIES = (".yaml", ".yml")
ANY = 2**62
"""Bad rows are what this command is for, so none is too many to go on."""
BATCH = 1024
"""Prompts tokenised at once."""
OF_DATA = ("field", "grader", "templates", "system_prompt", "max_bad_rows")
"""Options that a topology answers itself."""


class Order(Struct, frozen=True, kw_only=True):
    """What to look at: `data` with its two sources, and the model that reads it, if any."""

    data: DataConfig
    base: Path
    served: ServedModel | None
    show: int
    json: bool


class Eyes(Struct, frozen=True, kw_only=True):
    """How a model reads prompts; without one they are messages, and lengths are characters."""

    prompts: PromptSet
    reader: Reader | None
    tokenizer: Any = None

    @classmethod
    def of(cls, order: Order) -> Eyes:
        """Raises UserError for broken templates or a folder that is no model."""
        prompts = PromptSet.of(order.data)
        prompts.validate()
        if order.served is None:
            return cls(prompts=prompts, reader=None)
        reader = Reader.of(order.served)
        return cls(prompts=prompts, reader=reader, tokenizer=reader.load_tokenizer())

    def lengths(self, questions: Sequence[Question], limit: int) -> Lengths:
        if self.reader is None:
            return lengths_of("characters", [one.characters for one in questions], None)
        batches = (questions[i : i + BATCH] for i in range(0, len(questions), BATCH))
        found = [
            length
            for batch in batches
            for length in self.reader.lengths(
                self.tokenizer, [self.prompts.plain(one) for one in batch]
            )
        ]
        return lengths_of("tokens", found, limit)

    def shown(self, question: Question) -> Shown:
        """The plain prompt: the very tokens as text, or the messages under their roles. The tokens
        that stand for features of a picture are one mark where they follow each other."""
        prompt = self.prompts.plain(question)
        if self.reader is None:
            turns = [f"[{turn.role}]\n{turn.content}" for turn in prompt.messages]
            text = in_words("\n".join(turns), prompt.media)
        else:
            served = self.reader.served
            own = for_template(prompt, served.model.chat_template_kwargs)
            pictures = layout_of(served, self.tokenizer)
            [ids] = encode_prompts(self.tokenizer, [own], pictures)
            marks = frozenset[int]() if pictures is None else pictures.marks
            shown = [
                one for before, one in pairwise([None, *ids]) if one not in marks or before != one
            ]
            text = self.tokenizer.decode(shown)
        gold = shown_gold(question.answer, question.grader)
        return Shown(id=question.id, gold=gold, prompt=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        order = read_order(_parser().parse_args(argv))
        found = look(order)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    text = msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"
    print(text if order.json else survey_text(found), end="")
    return 0 if found.usable else EXIT_FAILED


def look(order: Order) -> Survey:
    """Read both sources and count. Raises UserError for one that cannot be read at all."""
    data, eyes = order.data, Eyes.of(order)
    corpus = _load(data.train, order)
    heldout = _load(data.heldout, order) if data.heldout is not None else None
    return survey(
        data.train,
        corpus,
        heldout,
        measured=eyes.lengths(corpus.questions, data.max_prompt_tokens),
        shown=[eyes.shown(one) for one in spread(corpus.questions, order.show)],
        max_bad_rows=data.max_bad_rows,
    )


def _load(source: str, order: Order) -> Corpus:
    return load_questions(source, replace(order.data, max_bad_rows=ANY), order.base)


# ---- the order -----------------------------------------------------------------------------------


def read_order(arguments: argparse.Namespace) -> Order:
    """The order that the command line gives. Raises UserError."""
    if Path(arguments.data).suffix in TOPOLOGIES:
        return _of_topology(arguments)
    if is_procedural(arguments.data) and (arguments.field or arguments.grader):
        raise UserError(
            f"DATA is {arguments.data!r}, which brings its own grader; expected no --grader or "
            "--field"
        )
    given = {
        "train": arguments.data,
        "heldout": arguments.heldout,
        "fields": dict(pair(text, "--field") for text in arguments.field),
        "grader": arguments.grader or "math",
        "templates": arguments.templates,
        "system_prompt": arguments.system_prompt,
        "max_bad_rows": arguments.max_bad_rows or 0,
    }
    return Order(
        data=data_settings(given),
        base=Path.cwd(),
        served=_model(arguments.model, {}),
        show=arguments.show,
        json=arguments.json,
    )


def _of_topology(arguments: argparse.Namespace) -> Order:
    given = next((name for name in OF_DATA if getattr(arguments, name)), None)
    if given is not None:
        raise UserError(
            f"--{given.replace('_', '-')} is given with a topology; expected it in the section "
            f"data of {arguments.data}"
        )
    topology = load(Path(arguments.data))
    data, student = topology.data, served_student(topology)
    if arguments.heldout is not None:
        data = replace(data, heldout=arguments.heldout)
    # A topology may name a model that is yet to be fetched; its questions can be looked at now.
    there = student if student.folder.is_dir() else None
    return Order(
        data=data,
        base=Path.cwd(),
        served=_model(arguments.model, student.model.chat_template_kwargs) or there,
        show=arguments.show,
        json=arguments.json,
    )


def _model(path: Path | None, variables: Mapping[str, Any]) -> ServedModel | None:
    if path is None:
        return None
    model = ModelConfig(model=str(locate_model(path).folder), chat_template_kwargs=dict(variables))
    return served_as("--model", model, ActorConfig())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo data",
        description="What a source of questions holds, and what a model would see of it.",
        epilog="exit codes: 0 a run could start on it, 1 it could not, 2 user error (docs/data.md)",
    )
    parser.add_argument(
        "data", metavar="DATA", help="file, folder, reasoning_gym:TASK?…, or a topology (.yaml)"
    )
    parser.add_argument(
        "--heldout", metavar="SOURCE", help="questions that must not be in DATA as well"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model folder or run, whose tokens and chat template are used",
    )
    parser.add_argument(
        "--show", type=counting, default=20, metavar="N", help="questions to print (20)"
    )
    parser.add_argument(
        "--field", action="append", default=[], metavar="FIELD=COLUMN", help="e.g. question=problem"
    )
    parser.add_argument("--grader", help="math (default), exact, choice or judge")
    parser.add_argument(
        "--templates", metavar="FOLDER", help="folder with plain.j2 (docs/templates.md)"
    )
    parser.add_argument("--system-prompt", metavar="TEXT")
    parser.add_argument(
        "--max-bad-rows", type=counting, metavar="N", help="rows that may be left out (0)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
