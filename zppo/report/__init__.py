"""The report of a run: `python -m zppo.report RUN` makes one self-contained HTML page from the run
directory."""
