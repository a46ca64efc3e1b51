"""Rewrite the tables of the documentation that come from the configuration: that of all settings in
docs/topology.md, and those of names in docs/from_trl.md and docs/from_verl.md.

    python tools/topology_reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from zppo.config.counterparts import TOOLS
from zppo.config.template import names_of, reference
from zppo.errors import Parser, run_command

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "topology.md"
HEADING = "## All settings\n"
NAMES = "## Names\n"


def main() -> None:
    """Replace everything below the headings."""
    Parser(description=(__doc__ or "").splitlines()[0]).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    kept, heading, _ = text.partition(HEADING)
    PAGE.write_text(f"{kept}{heading or HEADING}\n{reference()}", encoding="utf-8")
    for tool in TOOLS:
        page = DOCS / f"from_{tool}.md"
        kept, heading, _ = page.read_text(encoding="utf-8").partition(NAMES)
        page.write_text(f"{kept}{heading or NAMES}\n{names_of(tool)}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
