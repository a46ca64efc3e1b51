"""The environment that actors are started with."""

from __future__ import annotations

import pytest

from zppo.plan.processes import ProcessEntry
from zppo_actors.supervisor.environment import KEEP_MEMORY, environment

PLAN = ProcessEntry(name="trainer", role="trainer", pool="trainer", threads=3)


def test_every_library_gets_the_threads_of_the_plan() -> None:
    found = environment(PLAN)
    names = [name for name in found if name.endswith("_NUM_THREADS")]
    assert "OMP_NUM_THREADS" in names
    assert {found[name] for name in names} == {"3"}


def test_freed_memory_is_kept_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert {name: environment(PLAN)[name] for name in KEEP_MEMORY} == KEEP_MEMORY
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert environment(PLAN)["MALLOC_TRIM_THRESHOLD_"] == "0"
