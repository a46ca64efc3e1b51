"""What a build kept, and what it dropped by which rule, with samples; as a value and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from zppo.curation.examples import RULES
from zppo.curation.ledger import Ledger
from zppo.curation.recipe import Recipe
from zppo.curation.shards import Shard
from zppo.errors import count_of, printable

MAX_NAMES = 100
"""Sub-datasets that are counted one by one for each rule; a column of other things than names could
have as many as rows."""


class SourceCount(Struct, frozen=True, kw_only=True):
    source: str
    files: int
    rows: int
    kept: int


class Kept(Struct, frozen=True, kw_only=True):
    """A sub-dataset of the corpus; `cap` is None where there is none."""

    source: str
    sub_dataset: str
    rows: int
    cap: int | None


class DropCount(Struct, frozen=True, kw_only=True):
    source: str
    sub_dataset: str
    rows: int


class Sample(Struct, frozen=True, kw_only=True):
    """A row that was dropped: where it stands, what it asks, and what is wrong with it."""

    place: str
    sub_dataset: str
    question: str
    detail: str


class Rule(Struct, frozen=True, kw_only=True):
    """What one rule dropped; `sub_datasets` are those with the most such rows."""

    rule: str
    meaning: str
    rows: int
    sub_datasets: list[DropCount]
    samples: list[Sample]


class Report(Struct, frozen=True, kw_only=True):
    """Every row is counted once: `rows` are those kept and those of `dropped`."""

    recipe: str
    rows: int
    kept: int
    sources: list[SourceCount]
    sub_datasets: list[Kept]
    dropped: list[Rule]


def make_report(name: str, recipe: Recipe, ledger: Ledger, shards: Sequence[Shard]) -> Report:
    """Of a build whose rows are chosen."""
    kept = ledger.kept()
    sources = [
        _source(source, ledger, shards, sum(rows for of, _, rows in kept if of == source))
        for source in recipe.sources
    ]
    return Report(
        recipe=name,
        rows=sum(source.rows for source in sources),
        kept=sum(source.kept for source in sources),
        sources=sources,
        sub_datasets=[
            Kept(source=source, sub_dataset=sub, rows=rows, cap=recipe.caps.get((source, sub)))
            for source, sub, rows in kept
        ],
        dropped=[rule for rule in (_rule(one, recipe, ledger) for one in RULES) if rule.rows],
    )


def _source(source: str, ledger: Ledger, shards: Sequence[Shard], kept: int) -> SourceCount:
    own = [index for index, shard in enumerate(shards) if shard.source == source]
    return SourceCount(source=source, files=len(own), rows=ledger.rows(own), kept=kept)


def _rule(rule: str, recipe: Recipe, ledger: Ledger) -> Rule:
    counts = [
        DropCount(source=source, sub_dataset=name, rows=rows)
        for found, source, name, rows in ledger.drops()
        if found == rule
    ]
    return Rule(
        rule=rule,
        meaning=RULES[rule],
        rows=sum(count.rows for count in counts),
        sub_datasets=sorted(counts, key=lambda count: -count.rows)[:MAX_NAMES],
        samples=[
            Sample(place=place, sub_dataset=name, question=question, detail=detail)
            for source in recipe.sources
            for place, name, question, detail in ledger.samples(rule, source)
        ],
    )


# ---- for people ----------------------------------------------------------------------------------


def report_text(report: Report) -> str:
    return "".join(f"{printable(line)}\n" for line in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.recipe}: {report.kept:,} of {count_of(report.rows, 'row')} kept"
    for source in report.sources:
        files = count_of(source.files, "file")
        yield f"  {source.source}: {source.kept:,} of {count_of(source.rows, 'row')} in {files}"
    yield ""
    yield "kept"
    for kept in report.sub_datasets:
        cap = "" if kept.cap is None else f", cap {kept.cap}"
        yield f"  {kept.rows:>9} {kept.source} {kept.sub_dataset}{cap}"
    for rule in report.dropped:
        yield ""
        yield f"dropped: {rule.rows} {rule.meaning} ({rule.rule})"
        for count in rule.sub_datasets:
            yield f"  {count.rows:>9} {count.source} {count.sub_dataset}"
        for sample in rule.samples:
            said = ": ".join(part for part in (sample.place, sample.detail) if part)
            yield f"    {said}{f' · {sample.question}' if sample.question else ''}"
