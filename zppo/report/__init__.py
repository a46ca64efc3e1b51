"""The report of a run: `python -m zppo.report RUN` makes one self-contained HTML page from the run
directory."""

from __future__ import annotations

import logging

# Else its first words would be about where it keeps its fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
