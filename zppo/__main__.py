"""`python -m zppo` is the console script `zppo`."""

from __future__ import annotations

import sys

from zppo.cli import console

sys.exit(console())
