"""`python -m zppo.report`."""

import sys

from zppo.errors import run_command
from zppo.report.cli import main

sys.exit(run_command(main))
