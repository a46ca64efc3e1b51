"""Writes what a comparison found: `comparison.html`, `results.md`, CSV files, and every figure as a
PNG.

Each file is written whole or not at all. The page needs no other file and fetches nothing; its
content security policy forbids scripts. `results.md` refers to the figures by relative paths.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

from zppo.comparison.figures import draw_all
from zppo.comparison.panels import Picture, to_png
from zppo.comparison.record import Record
from zppo.comparison.results import Results, load_results
from zppo.comparison.sentences import command, sentences
from zppo.comparison.tables import (
    Table,
    evaluation_rows,
    graduation_rows,
    method_rows,
    run_rows,
    tables,
)
from zppo.errors import UserError
from zppo.records.atomic_file import written_whole
from zppo.records.flops import Sizes
from zppo.report import plots
from zppo.report.frame import ASSETS as REPORT_ASSETS
from zppo.report.frame import digest, environment, flatten

ASSETS = Path(__file__).parent


def write_report(out: Path, record: Record) -> list[Path]:
    """Write all files and return their paths. Raises UserError if nothing can be read or
    written."""
    results = load_results(out, record)
    pictures = draw_all(results)
    files = {
        "comparison.html": render_page(results, pictures, out.name).encode(),
        "results.md": render_markdown(results, pictures).encode(),
        "runs.csv": to_csv(run_rows(results)),
        "methods.csv": to_csv(method_rows(results)),
        "evaluations.csv": to_csv(evaluation_rows(results)),
        "graduations.csv": to_csv(graduation_rows(results)),
        **{f"figures/{picture.name}.png": to_png(picture.figure) for picture in pictures},
    }
    try:
        return [_write(out / name, content) for name, content in files.items()]
    except OSError as error:
        raise UserError(f"--out {str(out)!r}: cannot be written ({error.strerror})") from None


def render_page(results: Results, pictures: Sequence[Picture], title: str) -> str:
    """The page as text."""
    style = (REPORT_ASSETS / "page.css").read_text("utf-8")
    with plots.look():
        return (
            environment(ASSETS)
            .get_template("page.html.j2")
            .render(
                title=title,
                sentences=sentences(results),
                sections=_sections(pictures),
                tables=tables(results),
                command=command(results),
                settings=list(flatten(msgspec.to_builtins(results.record.topology))),
                uri=plots.to_uri,
                style=Markup(style),
                style_digest=digest(style),
            )
        )


def render_markdown(results: Results, pictures: Sequence[Picture]) -> str:
    """A section for `docs/results.md`."""
    parts = [f"## Comparison on `{Path(results.record.source).name}`"]
    parts += [f"```\n{command(results)}\n```", *sentences(results)]
    for table in tables(results):
        parts.append(f"### {table.title}\n\n{markdown_table(table)}")
    parts.append("Brackets: 95 % bootstrap interval over seeds. " + _formula(results.record.sizes))
    for picture in pictures:
        parts.append(
            f"![{picture.title}](figures/{picture.name}.png)\n\n*{picture.title}.* "
            f"{picture.caption}"
        )
    return "\n\n".join(parts) + "\n"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """All columns that any row has; what a row lacks is empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _formula(sizes: Sizes) -> str:
    teacher = "of unknown size" if sizes.teacher is None else f"with {sizes.teacher:,} parameters"
    return (
        "FLOPs: 2N for each token that a model reads or writes and for each token of the proximal "
        "pass, 6N for each "
        f"token of an update; student with {sizes.student:,} parameters, teacher {teacher}, an "
        "input embedding that "
        "does not multiply left out. A prompt counts once for each group, and every token of a "
        "group in the loss, also "
        "where the trainer saves a pass; attention's products with itself, evaluations and work "
        "lost with a process are left out."
    )


def _sections(pictures: Sequence[Picture]) -> list[tuple[str, list[Picture]]]:
    return [
        (name, list(group))
        for name, group in groupby(pictures, key=lambda picture: picture.section)
    ]


def markdown_table(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(content)
    return path
