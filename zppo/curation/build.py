"""A build from its order to the finished corpus, in two passes: every row is looked at, then the
chosen ones are read again and written.

The invariant: what is in the folder follows from the recipe and what is in the rows. Their order,
the files that they are spread over, and where a build was stopped and went on, change no byte of
rows, pictures and manifest; the report's samples name places, which do differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.curation.examples import (
    RULES,
    Dropped,
    canonical_name,
    identity,
    pictures_of,
    words_of,
)
from zppo.curation.folder import Folder, Hopeless
from zppo.curation.ledger import Chosen, Ledger
from zppo.curation.recipe import Recipe
from zppo.curation.report import Report, make_report
from zppo.curation.shards import Shard, find_shards
from zppo.curation.sieve import PromptLengths, Sieve
from zppo.data.media import MEDIA
from zppo.data.sources.built import Manifest
from zppo.errors import UserError, count_of, nearest, printable

BATCH = 256
"""Rows of one transaction."""
NEWS = 20_000
"""Rows after which it is said how far the build is."""
_PICTURES = tuple(RULES)[tuple(RULES).index("unreadable_picture") :]
"""The rules that only a row whose words are good comes to."""

Say = Callable[[str], None]


class Order(Struct, frozen=True, kw_only=True):
    """What to build: `folders` are those of the sources, `lengths` measures prompts where the
    recipe has a limit."""

    name: str
    recipe: Recipe
    folders: dict[str, Path]
    lengths: PromptLengths | None
    out: Path

    @property
    def prompt_digest(self) -> str:
        return self.lengths.digest if self.lengths else ""


def build(order: Order, say: Say) -> Report:
    """Build, or go on with what is in the folder. Raises UserError; what was done is then kept,
    unless nothing could come of it."""
    _refuse_within(order)
    say = _printing(say)
    folder = Folder(order.out)
    manifest = folder.manifest(order.name, order.recipe.digest, order.prompt_digest)
    if manifest is not None:
        rows = count_of(manifest.rows, "row")
        say(f"{order.out}: holds this corpus already, {rows}; nothing to do")
        return folder.report()
    shards = [
        shard
        for source, config in order.recipe.sources.items()
        for shard in find_shards(source, config, order.folders[source])
    ]
    with folder.work(order.name, order.recipe.digest, order.prompt_digest, shards) as ledger:
        before = ledger.rows(range(len(shards)))
        begins = f"goes on behind {count_of(before, 'row')}" if before else "begun"
        say(f"{order.out}: {begins}")
        if ledger.fact("chosen") is None:
            _scan(order, ledger, shards, say)
            ledger.choose(order.recipe.caps)
        _write(order, ledger, shards, folder, say)
        return _finish(order, ledger, shards, folder)


def _printing(say: Say) -> Say:
    """Names of files are whatever a data set's maker wrote, marks that move a cursor included."""
    return lambda line: say(printable(line))


def _refuse_within(order: Order) -> None:
    """What is written must not be read as rows of a source."""
    for source, folder in order.folders.items():
        if order.out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--out {order.out}: lies in {folder}, the source {source}, and would be read as "
                "rows of it; expected a folder elsewhere"
            )


# ---- the first pass ------------------------------------------------------------------------------


def _scan(order: Order, ledger: Ledger, shards: list[Shard], say: Say) -> None:
    """Look at every row that was not looked at. Raises Hopeless."""
    taken: frozenset[str] = frozenset()
    for source in order.recipe.sources:
        for index, shard in enumerate(shards):
            if shard.source == source:
                sieve = Sieve(
                    recipe=order.recipe,
                    lengths=order.lengths,
                    shard=shard,
                    index=index,
                    taken=taken,
                )
                _scan_shard(sieve, ledger, say)
        _refuse_unreadable(source, ledger)
        taken |= ledger.names(source)
    _refuse_nothing(order, ledger, shards)


def _scan_shard(sieve: Sieve, ledger: Ledger, say: Say) -> None:
    done, whole = ledger.done(sieve.index)
    if whole:
        return
    rows = sieve.shard.rows(done)
    looked = ((number, sieve.look(number, row)) for number, row in rows)
    while batch := list(islice(looked, BATCH)):
        before, done = done, batch[-1][0]
        ledger.record(sieve.index, sieve.weigh([one for _, one in batch]), done)
        if before // NEWS < done // NEWS:
            say(f"{sieve.shard.place(done)}: looked at")
    ledger.record(sieve.index, [], done, whole=True)
    say(f"{sieve.shard.file}: looked at, {count_of(ledger.rows([sieve.index]), 'row')}")


def _refuse_unreadable(source: str, ledger: Ledger) -> None:
    """One picture that cannot be read is a row less; if no row of a source has any other, the data
    set is not whole."""
    looked = {
        rule: sum(rows for found, of, _, rows in ledger.drops() if found == rule and of == source)
        for rule in _PICTURES
    }
    unreadable = looked["unreadable_picture"]
    if unreadable and sum(looked.values()) + ledger.candidates(source) == unreadable:
        place, _, _, detail = ledger.samples("unreadable_picture", source)[0]
        raise Hopeless(
            f"{source}: no row has pictures that can be read, {unreadable} were tried, among them "
            f"{place}: {detail}; expected the picture files beside the rows, as the data set has "
            "them"
        )


def _refuse_nothing(order: Order, ledger: Ledger, shards: list[Shard]) -> None:
    sources = order.recipe.sources
    if any(ledger.candidates(source) for source in sources):
        return
    counts: Counter[str] = Counter()
    for rule, _, _, rows in ledger.drops():
        counts[rule] += rows
    why = ", ".join(f"{rows} {RULES[rule]}" for rule, rows in counts.items())
    rows = ledger.rows(range(len(shards)))
    raise Hopeless(
        f"the recipe {order.name} keeps none of {rows} rows{f': {why}' if why else ''}"
        f"{_unlisted(order.recipe, ledger)}; expected a recipe that fits the data"
    )


def _unlisted(recipe: Recipe, ledger: Ledger) -> str:
    """A name that no tier lists, with the nearest that one does."""
    found = next((name for rule, _, name, _ in ledger.drops() if rule == "not_listed"), None)
    if found is None:
        return ""
    return f", for example {found!r}{nearest(found, {name for _, name in recipe.caps})}"


# ---- the second pass -----------------------------------------------------------------------------


def _write(order: Order, ledger: Ledger, shards: list[Shard], folder: Folder, say: Say) -> None:
    for index, shard in enumerate(shards):
        lines = _lines(order.recipe, ledger.unwritten(index), shard, folder)
        written = 0
        while batch := list(islice(lines, BATCH)):
            ledger.write(batch)
            written += len(batch)
        if written:
            say(f"{shard.file}: written, {count_of(written, 'row')}")


def _lines(
    recipe: Recipe, chosen: Iterator[Chosen], shard: Shard, folder: Folder
) -> Iterator[tuple[bytes, bytes]]:
    """(identity, line of the corpus) of the chosen rows of a file; their pictures are kept."""
    wanted = next(chosen, None)
    if wanted is None:
        return
    for number, row in shard.rows(wanted.row - 1):
        if number == wanted.row:
            yield wanted.identity, _line(recipe, wanted, shard, row, folder)
            wanted = next(chosen, None)
            if wanted is None:
                return
    raise _changed(shard)


def _line(
    recipe: Recipe, chosen: Chosen, shard: Shard, row: dict[str, Any] | str, folder: Folder
) -> bytes:
    try:
        if isinstance(row, str):
            raise Dropped("bad_row", row)
        words = words_of(row, canonical_name(row, shard, recipe), shard, recipe)
        held = list(pictures_of(row, shard))
    except Dropped:
        raise _changed(shard) from None
    pictures = tuple(picture for picture, _ in held)
    if identity(words, pictures) != chosen.identity:
        raise _changed(shard)
    for picture, data in held:
        folder.keep(picture, data)
    line = {
        "id": f"{words.name}-{chosen.identity.hex()[:16]}",
        "question": words.question,
        "answer": words.answer,
        "images": [f"{MEDIA}/{picture.file}" for picture in pictures],
        "grader": words.grader,
        "source": words.source,
        "sub_dataset": words.name,
    }
    return msgspec.json.encode(line) + b"\n"


def _changed(shard: Shard) -> UserError:
    return UserError(
        f"{shard.file}: has changed while the corpus was built, it or a picture of it; expected "
        "the same data, or another --out to begin again"
    )


def _finish(order: Order, ledger: Ledger, shards: list[Shard], folder: Folder) -> Report:
    """Rows and report, then the manifest, which makes the corpus whole."""
    rows, sha256 = folder.write_rows(ledger.lines())
    report = make_report(order.name, order.recipe, ledger, shards)
    folder.write_report(report)
    folder.write_manifest(
        Manifest(
            recipe=order.name,
            recipe_sha256=order.recipe.digest,
            prompt_sha256=order.prompt_digest,
            rows=rows,
            pictures=folder.pictures(),
            sha256=sha256,
        )
    )
    return report
