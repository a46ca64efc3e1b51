"""What other systems call a metric: the table of the documentation and the one in use are one."""

from __future__ import annotations

from pathlib import Path

from zppo.records.aliases import ALIASES, with_aliases
from zppo.records.metrics import STEP_METRICS
from zppo.training.metrics import TRAINER_METRICS

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
COLUMNS = {"verl": 1, "trl": 2, "prime_rl": 3}


def test_the_documented_table_has_every_alias() -> None:
    text = DOCS.read_text("utf-8").partition("### What other systems call it")[2]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    for alias in ALIASES:
        [row] = [row for row in rows if all(f"`{name}`" in row[0] for name in alias.ours)]
        assert f"`{alias.name}`" in row[COLUMNS[alias.tool]]
        assert row[0].strip().startswith("1 − ") == alias.complement


def test_aliases_are_of_metrics_that_there_are() -> None:
    known = {metric.name for metric in STEP_METRICS}
    known |= {f"train/{metric.name}" for metric in TRAINER_METRICS}
    known |= {"audit/plain/mixed", "reward/plain"}  # of families
    assert {name for alias in ALIASES for name in alias.ours} <= known
    assert not {alias.name for alias in ALIASES} & known


def test_what_was_not_measured_has_no_alias() -> None:
    line = {"step": 3, "train/clip_low_share": 0.25, "train/clip_high_share": 0.5, "train/loss": 2}
    assert with_aliases(line, ["verl"]) == {
        **line,
        "actor/pg_loss": 2,
        "actor/pg_clipfrac": 0.75,
    }
    assert with_aliases(line, []) == line


def test_what_is_earned_goes_before_what_is_right() -> None:
    line = {"accuracy/plain": 0.5, "reward/plain": 0.75, "reward_part/math": 0.5}
    assert with_aliases(line, ["trl"]) == {**line, "reward": 0.75, "rewards/math/mean": 0.5}
    assert with_aliases({"accuracy/plain": 0.5}, ["trl"])["reward"] == 0.5
