"""What a recipe says: the sources in order of their rank, which columns hold what, which
sub-datasets are taken and how much of each, and what a row must meet (docs/corpus.md).

A recipe is a YAML file; those in the folder `recipes` ship with the package and go by their names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, field

from zppo.config.base import Config, NonNegative, Positive, Share
from zppo.config.explain import explain
from zppo.config.strict_yaml import Document, parse
from zppo.errors import UserError, first_line, nearest
from zppo.grading import GRADERS
from zppo.prompting.picture_tokens import PictureTokens

SHIPPED = Path(__file__).parent / "recipes"
OPTIONS = ("recipe", "show-recipe", "tokenizer", "templates", "out", "help", "json")
"""Names that the command line has other uses for."""
_SOURCE = re.compile(r"[a-z][a-z0-9_]{0,39}")

C = TypeVar("C", bound=Config)
Column: TypeAlias = Annotated[str, Meta(min_length=1)]
Names: TypeAlias = Column | Annotated[list[Column], Meta(min_length=1)]
"""One column, or several of which a row's first that is not null counts; nested ones by path."""


class ColumnsConfig(Config, frozen=True, kw_only=True):
    """Which columns hold what; every column that is named must be there."""

    question: Names
    """the text, or messages, of which the last is the question"""
    answer: Names
    """the gold answer"""
    images: Names | None = None
    """pictures: paths, bytes, {bytes, path}, or a list of these"""
    sub_dataset: Names | None = None
    """the name of the row's sub-dataset; null: all rows are one, with the name of the source"""
    reward_type: Names | None = None
    """how the row is to be graded; translated by `graders` of the source"""
    pass_rate: Names | None = None
    """how often a model solved it, from 0 to 1"""

    @property
    def named(self) -> dict[str, list[str]]:
        """Field -> its columns, for the fields that have any."""
        values: Mapping[str, Names | None] = msgspec.structs.asdict(self)
        return {
            name: [value] if isinstance(value, str) else value
            for name, value in values.items()
            if value
        }


class SourceConfig(Config, frozen=True, kw_only=True):
    """One data set; its folder is given on the command line, as `--NAME FOLDER`."""

    columns: ColumnsConfig
    files: list[str] = field(default_factory=lambda: ["*"])
    """patterns of the files that are read, from the folder on; `*` goes across folders"""
    leave_out: list[str] = field(default_factory=list)
    """patterns of files that are not"""
    grader: str = "math"
    """the grader of rows without a reward type"""
    graders: dict[str, str] = field(default_factory=dict)
    """reward type -> grader; a row of another type is dropped"""


class NamesConfig(Config, frozen=True, kw_only=True):
    """How names of sub-datasets become canonical."""

    prefixes: list[str] = field(default_factory=list)
    """beginnings that are taken off, with the underscore behind them"""
    suffixes: list[str] = field(default_factory=list)
    """ends that are taken off, with the underscore before them"""
    aliases: dict[str, str] = field(default_factory=dict)
    """what is left -> the canonical name, where it is another"""

    def canonical(self, name: str) -> str:
        """`FineVision-ai2d_merged` -> `ai2d`."""
        text = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
        for prefix in self.prefixes:
            text = text.removeprefix(f"{prefix}_")
        for suffix in self.suffixes:
            text = text.removesuffix(f"_{suffix}")
        return self.aliases.get(text, text)


class TierConfig(Config, frozen=True, kw_only=True):
    """Sub-datasets of one cap."""

    cap: Positive
    """most rows of each sub-dataset"""
    sub_datasets: dict[str, list[str]]
    """source -> canonical names"""


class FiltersConfig(Config, frozen=True, kw_only=True):
    """What a row must meet; null: no such limit."""

    max_pass_rate: Share | None = None
    """a row with a higher pass rate is dropped"""
    max_answer_characters: Positive | None = None
    """longest gold answer"""
    min_pictures: NonNegative = 0
    """fewest pictures of a row"""
    min_picture_side: Positive = 1
    """shortest side of a picture in pixels"""
    max_prompt_tokens: Positive | None = None
    """longest prompt: question, pictures and closing instruction, in tokens of --tokenizer"""


class Recipe(Config, frozen=True, kw_only=True, dict=True):
    """The whole table."""

    sources: dict[str, SourceConfig]
    """in order of their rank: the first that has a sub-dataset keeps it"""
    seed: NonNegative = 0
    """which rows a cap leaves"""
    names: NamesConfig = NamesConfig()
    """how names of sub-datasets become canonical"""
    tiers: list[TierConfig] = field(default_factory=list)
    """which sub-datasets are taken, and how much of each; none: all rows of all"""
    filters: FiltersConfig = FiltersConfig()
    """what a row must meet"""
    picture_mark: str = ""
    """what stands in questions where a picture belongs; `<image>` if empty"""
    picture_tokens: PictureTokens = PictureTokens()
    """how the model's processor resizes pictures"""

    @cached_property
    def caps(self) -> dict[tuple[str, str], int]:
        """(source, canonical name) -> most rows."""
        return {
            (source, name): tier.cap
            for tier in self.tiers
            for source, names in tier.sub_datasets.items()
            for name in names
        }

    def takes(self, source: str, name: str) -> bool:
        """Whether rows of this sub-dataset may be kept."""
        return not self.tiers or (source, name) in self.caps

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything it says, the order of the sources included."""
        told = msgspec.json.encode([list(self.sources), self], order="deterministic")
        return hashlib.sha256(told).hexdigest()


def shipped() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, or of a file. Raises UserError."""
    file = SHIPPED / f"{name}.yaml" if name in shipped() else Path(name)
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"--recipe is {name!r}; expected a file, or the name of a recipe that ships"
            f"{nearest(name, shipped())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--recipe {name}: cannot be read ({first_line(error)}); expected a YAML file"
        ) from None


def read_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or a file. Raises UserError with the line of a mistake."""
    document = parse(recipe_text(name), name)
    data = {} if document.data is None else document.data
    # One by one, because of a mapping msgspec does not say in which value the mistake is.
    sources = data.get("sources") if isinstance(data, dict) else None
    for source, config in (sources if isinstance(sources, dict) else {}).items():
        _converted(name, document, config, SourceConfig, f"sources.{source}")
    recipe = _converted(name, document, data, Recipe)
    _check_sources(name, recipe)
    _check_tiers(name, recipe)
    tokens = recipe.picture_tokens
    if tokens.min_pixels > tokens.max_pixels:
        raise UserError(
            f"{name}: picture_tokens.min_pixels is {tokens.min_pixels}; expected at most "
            f"{tokens.max_pixels}, the max_pixels"
        )
    return recipe


def _converted(where: str, document: Document, data: Any, kind: type[C], path: str = "") -> C:
    """The part `path` of the recipe, typed. Raises UserError with the line of a mistake."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        mistake = explain(str(error), data, kind, path)
        place = ".".join(part for part in (path, mistake.path) if part)
        line = document.lines.get(place)
        raise UserError(f"{where}{f':{line}' if line else ''}: {mistake.sentence}") from None


def _check_sources(where: str, recipe: Recipe) -> None:
    if not recipe.sources:
        raise UserError(f"{where}: sources is empty; expected at least one source of rows")
    for source, config in recipe.sources.items():
        if not _SOURCE.fullmatch(source) or source.replace("_", "-") in OPTIONS:
            raise UserError(
                f"{where}: sources has {source!r}; expected a name of small letters, digits and "
                f"underscores other than {', '.join(OPTIONS)}"
            )
        for grader in [config.grader, *config.graders.values()]:
            if grader not in GRADERS:
                raise UserError(
                    f"{where}: sources.{source}: there is no grader {grader!r}"
                    f"{nearest(grader, GRADERS)}"
                )
        if config.graders and config.columns.reward_type is None:
            raise UserError(
                f"{where}: sources.{source}.graders translates reward types; expected "
                f"sources.{source}.columns.reward_type to name their column"
            )
        if recipe.filters.min_pictures and config.columns.images is None:
            raise UserError(
                f"{where}: filters.min_pictures is {recipe.filters.min_pictures}; expected "
                f"sources.{source}.columns.images to name the column of the pictures"
            )


def _check_tiers(where: str, recipe: Recipe) -> None:
    seen: set[tuple[str, str]] = set()
    for number, tier in enumerate(recipe.tiers):
        for source, names in tier.sub_datasets.items():
            place = f"{where}: tiers[{number}].sub_datasets"
            if source not in recipe.sources:
                raise UserError(
                    f"{place}: there is no source {source!r}{nearest(source, recipe.sources)}"
                )
            _check_names(f"{place}.{source}", source, names, recipe.names, seen)


def _check_names(
    place: str,
    source: str,
    names: Sequence[str],
    rules: NamesConfig,
    seen: set[tuple[str, str]],
) -> None:
    for name in names:
        canonical = rules.canonical(name)
        if canonical != name:
            raise UserError(
                f"{place} has {name!r}, which no row can be called; expected its canonical name "
                f"{canonical!r}"
            )
        if (source, name) in seen:
            raise UserError(f"{place} has {name!r} a second time; expected each name in one tier")
        seen.add((source, name))
