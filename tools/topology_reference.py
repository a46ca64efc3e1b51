"""Rewrite the table of settings in docs/topology.md from the configuration: `python
tools/topology_reference.py`."""

from __future__ import annotations

from pathlib import Path

from zppo.config.template import reference

PAGE = Path(__file__).parents[1] / "docs/topology.md"
HEADING = "## All settings\n"


def main() -> None:
    """Replace everything below the heading."""
    text = PAGE.read_text(encoding="utf-8")
    kept, heading, _ = text.partition(HEADING)
    PAGE.write_text(f"{kept}{heading or HEADING}\n{reference()}", encoding="utf-8")


if __name__ == "__main__":
    main()
