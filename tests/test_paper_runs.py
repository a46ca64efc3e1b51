"""The calls behind the paper's tables: each is one that `zppo compare` takes, each of its runs fits
on the described machines, and the page shows them."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import paper_runs  # noqa: E402

from zppo.algorithm.methods import method_names  # noqa: E402
from zppo.compare import _parser  # noqa: E402
from zppo.comparison import record  # noqa: E402
from zppo.config.load import load  # noqa: E402
from zppo.errors import UserError  # noqa: E402
from zppo.plan.machine import GIB  # noqa: E402
from zppo.plan.machines_file import Described  # noqa: E402
from zppo.plan.plan import Plan  # noqa: E402

PAGE = (ROOT / "docs/paper_runs.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    """The cells of a table of the page, heading left out."""
    text = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize(
    "call", list(paper_runs.calls()), ids=lambda call: f"{call.student}-{call.what}"
)
def test_every_run_of_a_call_fits(call: paper_runs.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = _parser().parse_args(call.arguments)
    assert record.parse_seeds(asked.seeds) == [0]
    topology = record.shared_topology(asked.topology, asked.set)
    for method in record.parse_methods(asked.methods):
        one = record.of_pair(topology, record.Pair(method, 0), Path(asked.out))
        assert one.student.model.endswith(call.student)
        plan, _ = paper_runs.planned([*call.overrides, f"method.name={method}"])
        assert plan.method.name == method and len(plan.hosts) == 8
        assert plan.windows.steps == paper_runs.STEPS


def test_the_page_has_the_calls_and_every_method_of_the_paper_is_in_one() -> None:
    assert paper_runs.table_of_calls() in PAGE, "run tools/paper_runs.py --write"
    assert {name for call in paper_runs.calls() for name in call.methods} == set(method_names())


@pytest.mark.parametrize("student", paper_runs.STUDENTS)
def test_one_node_has_room(student: str) -> None:
    overrides = [f"student.model=models/Qwen3.5-{student}", *paper_runs.node(student)]
    plan, _ = paper_runs.planned(overrides)
    (host,) = plan.hosts
    assert list(host.cards) == [f"cuda:{i}" for i in range(8)]
    if student == "2B":
        shown = re.search(r"--dry-run --machines \S+ \\\n(  --set .*?)```", PAGE, re.DOTALL)
        assert shown is not None
        words = shlex.split(shown[1].replace("\\\n", " "))
        assert [value for option, value in pairwise(words) if option == "--set"] == overrides


def one_card(student: str, *overrides: str) -> Plan:
    topology = load(
        ROOT / "examples/one_gpu.yaml", [f"student.model=models/Qwen3.5-{student}", *overrides]
    )
    return Described.of(topology, paper_runs.MACHINES, ROOT / "examples").plan()


def test_one_card_has_room_as_the_page_says() -> None:
    section = PAGE.partition("*One card.*")[2]
    shown = re.findall(r"\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", section)
    assert [row[0] for row in shown] == ["0.8B", "2B", "4B"]
    for student, *sizes in shown:
        (host,) = one_card(student).hosts
        needs = [need.device for need in host.needs if need.device]
        found = [f"{size / GIB:.1f}" for size in [*needs, host.cards["cuda:0"]]]
        assert found == sizes
    with pytest.raises(UserError, match=r"GiB on cuda:0 but 78\.0 GiB are free"):
        one_card("9B")
    smaller = re.search(r"takes ([\d.]+) GiB of a card of 24 GB with\n`--set (\S+)`", section)
    assert smaller is not None
    card = one_card("0.8B", smaller[2]).hosts[0].cards["cuda:0"]
    assert f"{card / GIB:.1f}" == smaller[1] and card < 23 * GIB


def test_the_page_s_costs_add_up() -> None:
    rows = table("costs")
    assert {row[0] for row in rows} == set(paper_runs.STUDENTS) and len(rows) == 15
    for row in rows:
        cards, seconds, hours, card_hours = (float(cell.replace(",", "")) for cell in row[2:6])
        assert hours == pytest.approx(paper_runs.STEPS * seconds / 3600, abs=0.1)
        assert card_hours == pytest.approx(cards * hours, rel=0.05, abs=4)
        asks = row[1].startswith(
            ("zppo", "off_distill")
        )  # else no engine of the teacher is started
        assert cards == (8 if "one node" in row[1] else 64 if asks else 48)


def test_speeds_follow_the_sizes() -> None:
    """Larger students are slower to sample and to train, in proportion where nothing else counts;
    a distribution of the teacher costs its forward pass."""
    speeds = [
        paper_runs.planned([f"student.model=models/Qwen3.5-{size}"])[1].speeds
        for size in paper_runs.STUDENTS
    ]
    sampled = [one.rollout.curve.seconds(64) for one in speeds]
    trained = [one.trainer.tokens_per_second for one in speeds]
    assert sampled == sorted(sampled) and trained == sorted(trained, reverse=True)
    # 24 cards at 40 % of 989e12 operations a second, 10 a parameter and token.
    assert trained[-1] == pytest.approx(24 * 0.4 * 989e12 / (10 * 9_409_813_744))
    model = "student.model=models/Qwen3.5-2B"
    _, distilled = paper_runs.planned([model, paper_runs.WHOLE_TEACHER, "method.name=on_distill"])
    whole = 8 * 2_213_241_664 + 2 * 27_356_728_560
    assert distilled.speeds.trainer.tokens_per_second == pytest.approx(24 * 0.4 * 989e12 / whole)


def test_a_cost_is_simulated_and_laid_to_all_steps() -> None:
    small = [
        "student.model=models/Qwen3.5-0.8B",
        *paper_runs.node("0.8B"),
        "scheduler.new_questions=8",
        "scheduler.max_staleness=0",
    ]
    found = paper_runs.cost(small, 4)
    assert found.cards == 8 and found.hours == pytest.approx(found.seconds / 18)
    assert found.student_tokens > 0 and found.teacher_tokens > 0


def test_a_table_takes_its_place_on_the_page() -> None:
    page = "a\n<!-- calls -->\nold\n<!-- end -->\nb\n<!-- costs -->\n<!-- end -->\n"
    once = paper_runs.replaced(page, "calls", "| x |")
    assert once == "a\n<!-- calls -->\n\n| x |\n<!-- end -->\nb\n<!-- costs -->\n<!-- end -->\n"
    assert paper_runs.replaced(once, "calls", "| x |") == once
