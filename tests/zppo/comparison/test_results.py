"""From run directories to numbers, tables and sentences, on made-up runs whose numbers are
known."""

from __future__ import annotations

import csv
import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from compare_worlds import QUESTIONS, MadeUpRun, record, write_comparison
from PIL import Image

from zppo.comparison import figures, panels, report, results, sentences, tables
from zppo.comparison.record import Pair, Record, read_record, write_record
from zppo.comparison.results import Results, load_results
from zppo.comparison.statistics import Interval
from zppo.errors import UserError
from zppo.records.flops import Sizes

METHODS = {"grpo": 0.01, "grpo_replay": 0.012, "zppo": 0.02}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, two seeds; accuracy of seed s after n steps is 0.3 + gain n + 0.002 s."""
    out = tmp_path_factory.mktemp("three") / "c"
    write_comparison(out, METHODS, [0, 1])
    return out


@pytest.fixture
def world(three: Path) -> Results:
    return load_results(three, read_record(three))


def method(world: Results, name: str) -> results.MethodResult:
    return next(one for one in world.methods if one.name == name)


# ---- equal budgets -------------------------------------------------------------------------------


def test_accuracy_at_equal_steps(world: Results) -> None:
    assert world.step == 10
    interval = method(world, "zppo").interval(world.at_steps)
    assert interval == Interval(pytest.approx(0.501), pytest.approx(0.5), pytest.approx(0.502), 2)  # type: ignore[arg-type]


def test_equal_steps_are_those_that_every_run_has_evaluated(tmp_path: Path) -> None:
    comparison = record(["grpo", "zppo"], [0])
    MadeUpRun(tmp_path, Pair("grpo", 0)).write(steps=7, verdict="finished: 7 of 7 steps")
    MadeUpRun(tmp_path, Pair("zppo", 0)).write()
    world = load_results(tmp_path, comparison)
    assert world.step == 5
    assert world.methods[1].finished[0].accuracy_at(5) == pytest.approx(0.4)


def test_accuracy_at_equal_compute_is_interpolated(world: Results) -> None:
    # GRPO: 16 groups of 110 tokens a step, 2N sampling + 2N proximal + 6N update = 10 N, N = 100,
    # 10 steps.
    assert world.cost == pytest.approx(10 * 16 * 110 * 10 * 100)
    run = method(world, "zppo").finished[0]
    spent, accuracies = run.evaluated_flops()
    assert spent[-1] > world.cost
    below = np.searchsorted(spent, world.cost) - 1
    share = (world.cost - spent[below]) / (spent[below + 1] - spent[below])
    expected = accuracies[below] + share * (accuracies[below + 1] - accuracies[below])
    assert world.at_cost(run) == pytest.approx(expected)
    assert world.at_cost(run) < world.at_steps(run)  # type: ignore[operator]


def test_the_teacher_is_paid_for(world: Results) -> None:
    parts = method(world, "zppo").finished[0].parts
    assert parts is not None
    assert parts["teacher_draws"] == 2 * 1000 * 450 * 10
    assert parts["teacher_other"] == 2 * 1000 * 390 * 10
    assert method(world, "grpo").finished[0].parts["teacher_draws"] == 0  # type: ignore[index]


def test_compute_is_not_compared_when_a_working_teacher_has_no_size(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "c", METHODS, [0])
    comparison.sizes = Sizes(student=100)
    world = load_results(tmp_path / "c", comparison)
    assert world.cost is None and world.step == 10
    assert method(world, "grpo").finished[0].flops_after is not None
    assert any(
        sentence.startswith("Compute is not compared") for sentence in sentences.sentences(world)
    )
    assert "FLOPs" not in " ".join(tables.accuracies(world).header)  # type: ignore[union-attr]


def test_outside_of_its_evaluations_a_run_has_no_accuracy(world: Results) -> None:
    run = method(world, "grpo").finished[0]
    assert run.accuracy_at(11) is None and run.accuracy_at(-1) is None
    assert run.accuracy_for(1e18) is None


# ---- differences ---------------------------------------------------------------------------------


def test_differences_are_paired_by_seed(world: Results) -> None:
    """The seeds differ by 0.2 points in every method, and the paired difference does not see
    that."""
    difference = world.difference(method(world, "zppo"), world.at_steps)
    assert difference is not None and difference.low is not None and difference.high is not None
    assert difference.value == pytest.approx(0.1)
    assert difference.high - difference.low == pytest.approx(0.0, abs=1e-12)


def test_only_shared_seeds_are_paired(tmp_path: Path) -> None:
    comparison = record(["grpo", "zppo"], [0, 1])
    for pair in (Pair("grpo", 0), Pair("zppo", 0), Pair("zppo", 1)):
        MadeUpRun(tmp_path, pair, gain=0.01).write()
    difference = load_results(tmp_path, comparison).difference
    world = load_results(tmp_path, comparison)
    assert difference(world.methods[1], world.at_steps) == Interval(
        pytest.approx(0.0), None, None, 1
    )  # type: ignore[arg-type]


def test_differences_by_question(world: Results) -> None:
    interval = world.question_difference(method(world, "zppo"))
    right = [
        [round((0.3 + gain * 10 + 0.002 * s) * QUESTIONS) for s in (0, 1)] for gain in (0.02, 0.01)
    ]
    expected = (sum(right[0]) - sum(right[1])) / (2 * QUESTIONS)
    assert interval is not None and interval.value == pytest.approx(expected)
    assert interval.low is not None and interval.low < expected < (interval.high or 0)


def test_without_recorded_answers_there_is_no_difference_by_question(world: Results) -> None:
    for run in world.runs:
        for line in run.the_data.heldout:
            del line["by_question"]
    assert world.question_difference(method(world, "zppo")) is None
    assert "paired by question" not in " ".join(tables.accuracies(world).header)  # type: ignore[union-attr]


# ---- the buffer ----------------------------------------------------------------------------------


def test_graduations_are_pooled_over_seeds(world: Results) -> None:
    replayed = method(world, "zppo")
    admitted = results.fate_counts(replayed, "admitted", 0.375)
    graduated = results.fate_counts(replayed, "graduated", 0.375)
    assert admitted == [10, 10]
    share = results.graduation(replayed, 0.375)
    assert share is not None and share.value == sum(graduated) / 20
    assert results.entries(world.methods) == [0.0, 0.125, 0.25, 0.375]
    assert results.graduation(method(world, "grpo")) is None


def test_kinds_are_found_not_listed(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "c", {"grpo": 0.01, "hint": 0.01, "zppo": 0.01}, [0])
    assert results.kinds(load_results(tmp_path / "c", comparison)) == {
        "bcq": "BCQ",
        "hint": "hint",
        "ncq": "NCQ",
    }


# ---- what did not finish -------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Results:
    """ZPPO: seed 0 finished, seed 1 failed after 6 steps, seed 2 never began."""
    comparison = record(["grpo", "zppo"], [0, 1, 2], failures={"zppo-seed1": "trainer was killed"})
    for seed in (0, 1, 2):
        MadeUpRun(tmp_path, Pair("grpo", seed)).write()
    MadeUpRun(tmp_path, Pair("zppo", 0)).write()
    MadeUpRun(tmp_path, Pair("zppo", 1)).write(steps=6)
    write_record(tmp_path, comparison)
    return load_results(tmp_path, comparison)


def test_runs_that_did_not_finish_are_shown(broken: Results) -> None:
    table = tables.unfinished(broken)
    assert table is not None
    assert table.rows == [
        ["ZPPO", "1", "failed", "6", "trainer was killed"],
        ["ZPPO", "2", "not begun", "0", tables.ABSENT],
    ]
    assert table in tables.tables(broken)
    assert tables.accuracies(broken).rows[1][1] == "1 of 3"  # type: ignore[union-attr]
    said = " ".join(sentences.sentences(broken))
    assert "4 of 6 runs finished" in said
    assert "Some runs failed (zppo)" in said


def test_runs_that_did_not_finish_do_not_count(broken: Results) -> None:
    assert broken.step == 10
    interval = broken.methods[1].interval(broken.at_steps)
    assert interval is not None and interval.count == 1
    states = [(row["method"], row["seed"], row["state"]) for row in tables.run_rows(broken)]
    assert states[3:] == [("zppo", 0, "finished"), ("zppo", 1, "failed"), ("zppo", 2, "not begun")]


def test_a_comparison_without_a_finished_run_still_gives_a_page(tmp_path: Path) -> None:
    comparison = record(["grpo", "zppo"], [0])
    MadeUpRun(tmp_path, Pair("grpo", 0)).write(steps=2)
    written = report.write_report(tmp_path, comparison)
    assert not [path for path in written if path.suffix == ".png"]
    page = (tmp_path / "comparison.html").read_text("utf-8")
    assert "No finished run has a held-out evaluation" in page
    assert "Runs that did not finish" in page


def test_a_damaged_run_is_one_sentence(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "c", {"grpo": 0.01}, [0])
    file = tmp_path / "c/runs/grpo-seed0/metrics.jsonl"
    file.write_bytes(b"nonsense\n" + file.read_bytes())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: is not a JSON object"):
        load_results(tmp_path / "c", comparison)


# ---- words and cells -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "share", "points"),
    [
        (Interval(0.5, None, None, 1), "50.0 %", "+50.0"),
        (Interval(0.853, 0.831, 0.872, 3), "85.3 % [83.1, 87.2]", "+85.3 [+83.1, +87.2]"),
        (Interval(-0.01, -0.02, 0.004, 3), "-1.0 % [-2.0, 0.4]", "-1.0 [-2.0, +0.4]"),
    ],
)
def test_cells(interval: Interval, share: str, points: str) -> None:
    assert (tables.share_text(interval), tables.points_text(interval)) == (share, points)


@pytest.mark.parametrize(
    ("value", "text"), [(1.2e12, "1.20 × 10¹²"), (0.05, "5.00 × 10⁻²"), (9.999e9, "1.00 × 10¹⁰")]
)
def test_scientific_numbers(value: float, text: str) -> None:
    assert tables.scientific(value) == text


@pytest.mark.parametrize(
    ("differences", "end"),
    [
        # Mean 0.07, standard deviation 0.01: t = 4.303 · 0.01 / √3 = 0.0248.
        (
            [0.06, 0.07, 0.08],
            "+7.0 [+6.0, +8.0] points of held-out accuracy (3 seeds; by Student's t ±2.5).",
        ),
        # The bootstrap alone would call this a difference: standard deviation 0.02, t = 0.0497.
        (
            [0.01, 0.03, 0.05],
            "+3.0 [+1.0, +5.0] points of held-out accuracy (3 seeds; by Student's t ±5.0; an "
            "interval contains 0, so no difference is shown).",
        ),
        ([0.07], "+7.0 points of held-out accuracy (one seed, no interval)."),
    ],
)
def test_findings(world: Results, differences: list[float], end: str) -> None:
    said = sentences.finding(method(world, "zppo"), world.baseline, differences, "80 steps")
    assert said == f"ZPPO − GRPO at 80 steps: {end}"


def test_few_seeds_are_called_few(world: Results) -> None:
    assert any("in about 50 % of all cases" in sentence for sentence in sentences.sentences(world))


@pytest.mark.parametrize(
    ("budget", "at"), [("steps", "at 10 steps"), ("compute", "at equal compute")]
)
def test_the_budget_decides_what_comes_first(tmp_path: Path, budget: str, at: str) -> None:
    comparison = write_comparison(tmp_path / "c", METHODS, [0], budget=budget)
    world = load_results(tmp_path / "c", comparison)
    found = [sentence for sentence in sentences.sentences(world) if "ZPPO − GRPO " in sentence]
    assert len(found) == 1 and at in found[0]
    expected = world.at_cost if budget == "compute" else world.at_steps
    difference = world.difference(method(world, "zppo"), expected)
    assert difference is not None and tables.points_text(difference) in found[0]


def test_the_command_is_given(world: Results) -> None:
    world.record.overrides.append("optimizer.learning_rate=1e-4")
    assert sentences.command(world) == (
        "python -m zppo.compare --topology world.yaml --methods grpo,grpo_replay,zppo --seeds 0,1 "
        "--baseline grpo --set optimizer.learning_rate=1e-4"
    )


# ---- files ---------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags of a page and everything it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]


EVERY_FIGURE = [
    "accuracy", "differences", "accuracy_steps", "accuracy_flops", "graduated_share", "graduations",
    "fates", "occupancy", "rollout_accuracy", "composition", "accuracy_bcq", "accuracy_ncq",
    "positive_advantage", "entropy", "loss", "compute", "tokens",
]  # fmt: skip


@pytest.fixture(scope="module")
def written(three: Path) -> tuple[Path, Record]:
    comparison = read_record(three)
    report.write_report(three, comparison)
    return three, comparison


@pytest.mark.slow
def test_every_figure_is_a_png(written: tuple[Path, Record]) -> None:
    out, _ = written
    assert {path.stem for path in (out / "figures").iterdir()} == set(EVERY_FIGURE)
    for path in (out / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 900 and image.height >= 200, path
            low, high = image.convert("L").getextrema()
            assert low < 100 and high == 255, path  # type: ignore[operator]


@pytest.mark.slow
def test_the_page_needs_nothing_else(written: tuple[Path, Record]) -> None:
    text = (written[0] / "comparison.html").read_text("utf-8")
    page = Page(text)
    assert page.tags.count("img") == len(EVERY_FIGURE)
    assert "script" not in page.tags
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert re.search(r"default-src 'none'", text)


@pytest.mark.slow
def test_the_markdown_refers_to_figures_that_exist(written: tuple[Path, Record]) -> None:
    out, _ = written
    text = (out / "results.md").read_text("utf-8")
    assert text.startswith("## Comparison on `world.yaml`\n")
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(images) == len(EVERY_FIGURE)
    assert all((out / image).is_file() for image in images)
    assert str(out) not in text
    assert "student with 100 parameters, teacher with 1,000 parameters" in text
    rows = [line for line in text.splitlines() if line.startswith("| ZPPO |")]
    assert len(rows) == 3  # accuracy, graduations, cost


@pytest.mark.slow
def test_csv_files_hold_the_numbers_of_the_tables(written: tuple[Path, Record]) -> None:
    out, comparison = written

    def rows(name: str) -> list[dict[str, str]]:
        with (out / name).open(newline="") as file:
            return list(csv.DictReader(file))

    world = load_results(out, comparison)
    runs = {(row["method"], row["seed"]): row for row in rows("runs.csv")}
    assert len(runs) == 6
    assert float(runs["zppo", "1"]["accuracy_equal_steps"]) == pytest.approx(0.502)
    assert float(runs["zppo", "1"]["flops"]) == results.total_flops(method(world, "zppo").runs[1])
    by_name = {row["method"]: row for row in rows("methods.csv")}
    assert float(by_name["zppo"]["difference_equal_steps"]) == pytest.approx(0.1)
    assert by_name["grpo"]["graduation_share"] == ""
    assert len(rows("evaluations.csv")) == 6 * 3
    assert {row["entry_accuracy"] for row in rows("graduations.csv")} == {
        "0",
        "0.125",
        "0.25",
        "0.375",
    }


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(written: tuple[Path, Record]) -> None:
    out, comparison = written
    names = ("results.md", "methods.csv", "figures/accuracy.png", "comparison.html")
    before = {name: (out / name).read_bytes() for name in names}
    report.write_report(out, comparison)
    assert {name: (out / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = "</style><script>alert(1)</script> | x"
    comparison = record(["grpo"], [0], failures={"grpo-seed0": hostile})
    comparison.source = f"{hostile}.yaml"
    report.write_report(tmp_path, comparison)
    page = Page((tmp_path / "comparison.html").read_text("utf-8"))
    assert "script" not in page.tags
    assert "\\| x |" in (tmp_path / "results.md").read_text("utf-8")


def test_an_out_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    (tmp_path / "comparison.html").mkdir()
    with pytest.raises(UserError, match=r"^--out '.*': cannot be written \("):
        report.write_report(tmp_path, record(["grpo"], [0]))


# ---- panels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns"),
    [(1, 1), (3, 3), (4, 4), (5, 5), (6, 3), (7, 4), (8, 4), (9, 3), (10, 5), (12, 4), (13, 5)],
)
def test_grids_leave_few_places_empty(count: int, columns: int) -> None:
    assert panels.columns_for(count) == columns


@pytest.mark.slow
def test_many_methods_get_a_panel_each(tmp_path: Path) -> None:
    names = ["grpo", "grpo_replay", "zppo", "hint", "prefix", "on_distill", "off_distill"]
    world = load_results(
        tmp_path / "c", write_comparison(tmp_path / "c", dict.fromkeys(names, 0.01), [0], steps=4)
    )
    picture = figures.over_steps(world)
    assert picture is not None and picture.wide
    visible = [axes for axes in picture.figure.axes if axes.get_visible()]
    assert len(visible) == 7
    assert [axes.get_title(loc="left") or axes.get_title() for axes in visible][2] == "ZPPO"
    assert all(len(axes.lines) == 7 for axes in visible)
