"""The table of a search: one setting, the same methods, seeds and steps for every value, or a
refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_worlds import MadeUpRun, write_comparison
from msgspec.structs import replace

from zppo.comparison.record import Pair, Record, read_record, write_record

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import search_page

PAGE = "# Results\n\n<!-- begin search -->\n<!-- end search -->\n\nBy hand.\n"
GAINS = {3e-4: {"grpo": 0.02, "zppo": 0.03}, 1e-4: {"grpo": 0.01, "zppo": 0.04}}
"""A made-up run ends at 0.3 + 10 gain + 0.002 seed."""


def edit(folder: Path, change: Callable[[Record], Record]) -> None:
    write_record(folder, change(read_record(folder)))


def with_rate(rate: float) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        optimizer = replace(record.topology.optimizer, learning_rate=rate)
        return replace(record, topology=replace(record.topology, optimizer=optimizer))

    return change


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two rates, the larger with one seed more."""
    made = []
    for rate, gains in GAINS.items():
        folder = tmp_path / f"rate-{rate:g}"
        write_comparison(folder, gains, [0, 4] if rate == 3e-4 else [0])
        edit(folder, with_rate(rate))
        made.append(folder)
    return made


def run(page: Path, folders: list[Path]) -> int:
    return search_page.main(
        ["--page", str(page), "--section", "search", "--comparisons", *map(str, folders)]
    )


def test_values_rise_shared_seeds_count_and_the_best_is_bold(
    tmp_path: Path, folders: list[Path]
) -> None:
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    assert run(page, folders) == 0
    text = page.read_text()
    assert "### Held-out accuracy after 10 steps by `optimizer.learning_rate`" in text
    assert "| method | 0.0001 | 0.0003 |" in text
    assert "| GRPO | 40 % | **50 %** |" in text  # 50.4 % would be the mean with seed 4
    assert "| ZPPO | **70 %** | 60 % |" in text
    assert "seed 0, every other setting shared" in text
    assert text.count("python -m zppo.compare --topology world.yaml --methods grpo,zppo") == 2
    assert text.endswith("<!-- end search -->\n\nBy hand.\n")
    assert run(page, folders) == 0 and page.read_text() == text


def drop_method(record: Record) -> Record:
    return replace(record, methods=["grpo"])


def with_rho(record: Record) -> Record:
    scheduler = replace(record.topology.scheduler, rho_replay=0.25)
    return replace(record, topology=replace(record.topology, scheduler=scheduler))


def with_argument(record: Record) -> Record:
    rollout = replace(record.topology.actors.rollout, engine_args={"max_length": 5})
    return replace(
        record,
        topology=replace(record.topology, actors=replace(record.topology.actors, rollout=rollout)),
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_setting_that_only_one_folder_has_is_a_difference(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str], which: int
) -> None:
    edit(folders[which], with_argument)
    check_refused(tmp_path, folders, capsys, "--comparisons: the folders differ in ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_method, "--comparisons: not every folder has zppo; expected the same methods in all"),
        (
            lambda record: replace(record, corpus="other"),
            "--comparisons: the folders are about other questions",
        ),
        (
            with_rate(1e-4),
            (
                "--comparisons: the folders differ in nothing; expected one setting, and each "
                "value once"
            ),
        ),
        (
            with_rho,
            (
                "--comparisons: the folders differ in scheduler.rho_replay, "
                "optimizer.learning_rate; expected one setting"
            ),
        ),
    ],
)
def test_what_is_no_search_is_refused(
    tmp_path: Path,
    folders: list[Path],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Record], Record],
    said: str,
) -> None:
    edit(folders[0], change)
    check_refused(tmp_path, folders, capsys, said)


def test_runs_of_other_lengths_are_refused(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "longer"
    write_comparison(longer, GAINS[3e-4], [0], steps=20)
    edit(longer, with_rate(6e-4))
    short = read_record(folders[0]).topology.run
    edit(longer, lambda record: replace(record, topology=replace(record.topology, run=short)))
    check_refused(
        tmp_path,
        [folders[1], longer],
        capsys,
        "--comparisons: the runs end after 10, 20 steps; expected",
    )


def test_a_seed_that_is_not_finished_everywhere_does_not_count(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folders[1], lambda record: replace(record, seeds=[4]))
    for method in ("grpo", "zppo"):
        MadeUpRun(folders[1], Pair(method, 4)).write()
    edit(folders[0], lambda record: replace(record, seeds=[0]))
    check_refused(
        tmp_path,
        folders,
        capsys,
        "--comparisons: no seed is finished for every method with every value",
    )


def test_one_folder_is_no_search(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(
        tmp_path,
        folders[:1],
        capsys,
        "--comparisons: one folder is no search; expected two or more",
    )


def check_refused(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str], said: str
) -> None:
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    assert run(page, folders) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1
    assert page.read_text() == PAGE


def test_curves_show_every_evaluation_and_differences_by_seed(tmp_path: Path) -> None:
    """The made-up gain of GRPO is 0.01 a step at one rate and 0.02 at the other, of any seed."""
    folders = [tmp_path / f"{rate:g}" for rate in GAINS]
    for folder, (rate, gains) in zip(folders, GAINS.items(), strict=True):
        write_comparison(folder, gains, [0, 4])
        edit(folder, with_rate(rate))
    page = tmp_path / "filled.md"
    page.write_text(PAGE)
    options = ["--page", str(page), "--section", "search", "--curves", "--comparisons"]
    assert search_page.main([*options, *map(str, folders)]) == 0
    lines = page.read_text().splitlines()
    assert "### Held-out accuracy of grpo by `optimizer.learning_rate`" in lines
    assert "| after steps | 0.0001 | 0.0003 | 0.0001 − 0.0003, points |" in lines
    # The accuracies of seeds 0 and 4 are 0.8 points apart, which Student's 12.706 makes ± 5.1.
    assert "| 10 | 40.4 % ± 5.1 | 50.4 % ± 5.1 | -10.0 ± 0.0 |" in lines
