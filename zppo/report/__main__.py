"""`python -m zppo.report`."""

from zppo.report.cli import main

raise SystemExit(main())
