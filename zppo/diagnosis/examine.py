"""The advisories of a run, live, finished or dead, from the files of its directory alone."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from zppo.diagnosis.evidence import Evidence
from zppo.diagnosis.rules import advisories
from zppo.records.summary import Record, read_lines, require_run, summarise, topology_value


def diagnosed(run_dir: Path) -> Record:
    """The summary of a run, with its advisories under the key `advice`.

    Raises UserError if the folder is no run.
    """
    summary = summarise(run_dir)
    evidence = Evidence.of(
        read_lines(run_dir / "metrics.jsonl"),
        ended=summary["verdict"] is not None,
        silent_windows=topology_value(
            require_run(run_dir), "run", "silent_teacher_windows", default=3
        ),
    )
    return {**summary, "advice": [structs.asdict(found) for found in advisories(evidence)]}
