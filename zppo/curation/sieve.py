"""Raw rows → what becomes of each: a candidate, or a drop with its rule. Pure but for the picture
files that rows name.

The rules come in the order of their cost: what the names tell, what the words tell, then the
pictures, and the length of the prompt at last, for a batch of rows at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from zppo.curation.examples import (
    Dropped,
    Picture,
    Words,
    canonical_name,
    identity,
    pictures_of,
    words_of,
)
from zppo.curation.ledger import Candidate, Drop
from zppo.curation.recipe import Recipe
from zppo.curation.rules import (
    check_length,
    check_listed,
    check_pictures,
    check_words,
    tokens_of,
)
from zppo.curation.shards import Shard
from zppo.data.places import IMAGE
from zppo.data.question import Question
from zppo.errors import UserError, first_line, sendable
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_tokenizer

SHOWN = 120
"""Characters of a question in the report."""
_TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "chat_template.*")


class PromptLengths(Struct, frozen=True, kw_only=True):
    """How many tokens of text a prompt has: the question and the closing instruction as the model
    will read them, through its chat template."""

    prompts: PromptSet
    tokenizer: Any
    folder: Path

    @classmethod
    def of(cls, folder: Path, templates: Path | None) -> PromptLengths:
        """Raises UserError for a folder without a tokenizer, and for broken templates."""
        prompts = PromptSet(templates)
        prompts.validate()
        return cls(
            prompts=prompts,
            tokenizer=load_tokenizer(str(folder), "--tokenizer"),
            folder=folder,
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what the lengths depend on: the closing instruction and the files of the
        tokenizer."""
        sha = hashlib.sha256(_asked(self.prompts, "@question").messages[-1].content.encode())
        for file in sorted({one for kind in _TOKENIZER_FILES for one in self.folder.glob(kind)}):
            sha.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
        return sha.hexdigest()

    def measure(self, questions: Sequence[str]) -> list[int]:
        """Tokens of each prompt, pictures left out. Raises UserError for a chat template that
        fails."""
        prompts = [_asked(self.prompts, question) for question in questions]
        try:
            return [len(ids) for ids in encode_prompts(self.tokenizer, prompts)]
        except Exception as error:  # a template may raise whatever Jinja2 can
            raise UserError(
                f"--tokenizer {self.folder}: its chat template fails ({first_line(error)})"
            ) from None


def _asked(prompts: PromptSet, question: str) -> Any:
    return prompts.plain(Question(id="row", text=question, answer=""))


class Passed(Struct, frozen=True, kw_only=True):
    """A row that passes all rules of one row but for the length of its prompt."""

    row: int
    words: Words
    pictures: tuple[Picture, ...]


class Sieve(Struct, frozen=True, kw_only=True):
    """The rules of a recipe for the rows of one file. `taken` are the sub-datasets of earlier
    sources."""

    recipe: Recipe
    lengths: PromptLengths | None
    shard: Shard
    index: int
    taken: frozenset[str]

    def look(self, number: int, row: dict[str, Any] | str) -> Passed | Drop:
        """One row, up to its pictures, whose bytes are let go."""
        name, filters = "", self.recipe.filters
        try:
            if isinstance(row, str):
                raise Dropped("bad_row", row)
            name = canonical_name(row, self.shard, self.recipe)
            check_listed(self.shard.source, name, self.recipe, self.taken)
            words = words_of(row, name, self.shard, self.recipe)
            check_words(words, filters)
            pictures = tuple(picture for picture, _ in pictures_of(row, self.shard))
            check_pictures(pictures, filters)
        except Dropped as dropped:
            shown = self.shard.value(row, "question") if isinstance(row, dict) else None
            return self._drop(number, name, dropped, shown)
        return Passed(row=number, words=words, pictures=pictures)

    def weigh(self, looked: Sequence[Passed | Drop]) -> list[Candidate | Drop]:
        """The length of the prompts of a batch."""
        passed = [one for one in looked if isinstance(one, Passed)]
        questions = [one.words.question.replace(IMAGE, "") for one in passed]
        texts = self.lengths.measure(questions) if self.lengths else [0] * len(passed)
        weighed = iter([self._weigh(one, text) for one, text in zip(passed, texts, strict=True)])
        return [one if isinstance(one, Drop) else next(weighed) for one in looked]

    def _weigh(self, one: Passed, text: int) -> Candidate | Drop:
        try:
            tokens = text + tokens_of(one.pictures, self.recipe.picture_tokens)
            check_length(tokens, self.recipe.filters)
        except Dropped as dropped:
            return self._drop(one.row, one.words.name, dropped, one.words.question)
        same = identity(one.words, one.pictures)
        return Candidate(
            identity=same,
            rank=self._rank(one.words),
            lot=_sha(str(self.recipe.seed), same.hex()),
            source=self.shard.source,
            name=one.words.name,
            shard=self.index,
            row=one.row,
            place=self.shard.place(one.row),
        )

    def _rank(self, words: Words) -> bytes:
        """What two rows of one identity go by: the source's place, then what they say."""
        place = list(self.recipe.sources).index(self.shard.source)
        said = _sha(words.name, words.question, words.answer, words.grader)
        return place.to_bytes(2) + said

    def _drop(self, number: int, name: str, dropped: Dropped, shown: object) -> Drop:
        question = sendable(" ".join(str(shown or "").split()))[:SHOWN]
        return Drop(
            rule=dropped.rule,
            source=self.shard.source,
            name=name,
            detail=sendable(dropped.detail),
            place=self.shard.place(number),
            question=question,
            lot=_sha(str(self.recipe.seed), dropped.rule, name, question, dropped.detail),
        )


def _sha(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()
