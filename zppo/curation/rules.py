"""The limits of a recipe, each a pure function of what a row is: None where it is met, else what is
wrong. The first that is not met drops the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zppo.curation.examples import Dropped, Picture, Words
from zppo.curation.recipe import FiltersConfig, Recipe
from zppo.prompting.picture_tokens import PictureTokens, picture_tokens


def solved_too_often(words: Words, filters: FiltersConfig) -> str | None:
    rate, most = words.pass_rate, filters.max_pass_rate
    return f"pass rate {rate:g}" if most is not None and rate is not None and rate > most else None


def long_answer(words: Words, filters: FiltersConfig) -> str | None:
    length, most = len(words.answer), filters.max_answer_characters
    return f"{length} characters" if most is not None and length > most else None


def few_pictures(pictures: Sequence[Picture], filters: FiltersConfig) -> str | None:
    found = len(pictures)
    return f"{found}" if found < filters.min_pictures else None


def small_picture(pictures: Sequence[Picture], filters: FiltersConfig) -> str | None:
    least = filters.min_picture_side
    small = next((one for one in pictures if min(one.width, one.height) < least), None)
    return None if small is None else f"{small.width} × {small.height} pixels"


OF_WORDS: dict[str, Callable[[Words, FiltersConfig], str | None]] = {
    "pass_rate": solved_too_often,
    "long_answer": long_answer,
}
OF_PICTURES: dict[str, Callable[[Sequence[Picture], FiltersConfig], str | None]] = {
    "few_pictures": few_pictures,
    "small_picture": small_picture,
}


def check_words(words: Words, filters: FiltersConfig) -> None:
    """Raises Dropped."""
    for rule, check in OF_WORDS.items():
        if (detail := check(words, filters)) is not None:
            raise Dropped(rule, detail)


def check_pictures(pictures: Sequence[Picture], filters: FiltersConfig) -> None:
    """Raises Dropped."""
    for rule, check in OF_PICTURES.items():
        if (detail := check(pictures, filters)) is not None:
            raise Dropped(rule, detail)


def check_listed(source: str, name: str, recipe: Recipe, taken: frozenset[str]) -> None:
    """`taken` are the names of earlier sources. Raises Dropped."""
    if not recipe.takes(source, name):
        raise Dropped("not_listed", repr(name)[:60])
    if name in taken:
        raise Dropped("earlier_source", repr(name)[:60])


def tokens_of(pictures: Sequence[Picture], settings: PictureTokens) -> int:
    """Tokens of all pictures of a row. Raises Dropped for one that the processor refuses."""
    try:
        return sum(picture_tokens(one.width, one.height, settings) for one in pictures)
    except ValueError as error:
        raise Dropped("long_picture", str(error)) from None


def check_length(tokens: int, filters: FiltersConfig) -> None:
    """`tokens` are those of the whole prompt. Raises Dropped."""
    most = filters.max_prompt_tokens
    if most is not None and tokens > most:
        raise Dropped("long_prompt", f"{tokens} tokens")
