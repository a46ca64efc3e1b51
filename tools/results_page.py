"""Puts a comparison into `docs/results.md`: its text between two marks, its figures beside the
page.

    python -m zppo.compare … --out runs/compare-quickstart python tools/results_page.py --comparison
    runs/compare-quickstart --section quickstart [--figures accuracy,fates]

The page holds `<!-- begin quickstart -->` and `<!-- end quickstart -->`; what stands between them
is replaced, the rest is written by people. Figures become PNGs with 256 colours in
`docs/images/results/quickstart`.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from zppo.config.options import several
from zppo.errors import Parser, UserError, run_command

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
IMAGE = re.compile(
    r"!\[(?P<title>[^\]]*)\]\(figures/(?P<name>\w+)\.png\)\n\n(?P<caption>\*[^\n]+)\n*"
)


def section(comparison: Path, folder: str, figures: Sequence[str] | None) -> str:
    """The text of `results.md` with the chosen figures, all unless given, referred to below
    `folder`."""
    file = comparison / "results.md"
    if not file.is_file():
        raise UserError(
            f"--comparison: {comparison} holds no results.md; expected a folder written by "
            "zppo.compare"
        )
    text = file.read_text(encoding="utf-8")
    there = [match["name"] for match in IMAGE.finditer(text)]
    for name in figures or ():
        if name not in there:
            raise UserError(
                f"--figures: there is no figure {name!r}; expected some of {', '.join(there)}"
            )

    def chosen(match: re.Match[str]) -> str:
        if figures is not None and match["name"] not in figures:
            return ""
        return f"![{match['title']}]({folder}/{match['name']}.png)\n\n{match['caption']}\n\n"

    return IMAGE.sub(chosen, text).strip()


def replace_section(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`. Raises UserError without both marks, in
    order."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(
            f"--section: the page has no lines {begin!r} and {end!r}; expected both, in this order"
        )
    return f"{before}{begin}\n{text}\n{end}{after}"


def small_png(file: Path) -> bytes:
    """The picture with 256 colours, which a chart does not miss."""
    small = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
    return small.getvalue()


def write(page: Path, comparison: Path, name: str, figures: Sequence[str] | None) -> None:
    """Replace the section and its figures. Raises UserError."""
    if not page.is_file():
        raise UserError(f"--page: there is no file {page}")
    folder = f"images/results/{name}"
    text = section(comparison, folder, figures)
    replaced = replace_section(page.read_text(encoding="utf-8"), name, text)
    shown = re.findall(rf"\({folder}/(\w+)\.png\)", text)
    try:
        pictures = {
            f"{name}.png": small_png(comparison / "figures" / f"{name}.png") for name in shown
        }
    except OSError as error:
        raise UserError(f"--comparison: a figure cannot be read ({error})") from None
    target = page.parent / folder
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, content in pictures.items():
        (target / name).write_bytes(content)
    page.write_text(replaced, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comparison", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--section", required=True, help="name in the marks of the page")
    parser.add_argument("--figures", type=several(str), help="names with commas between")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        write(options.page, options.comparison, options.section, options.figures)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
