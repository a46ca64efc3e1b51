from __future__ import annotations

import base64
import copy
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as parquet
import pytest
from markupsafe import Markup

from zppo.algorithm.window import Window
from zppo.data.question import Question
from zppo.records import rollouts
from zppo.report import browser, figures, load, plots, sentences
from zppo.report.audit_table import audit_table
from zppo.report.cli import main
from zppo.report.frame import ASSETS, digest, environment
from zppo.report.page import browser_note, render_page, tiles
from zppo.scheduling.filling import plain_part
from zppo_protocol.values import Grade

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 & \\boxed{7}"
EVERY_FIGURE = [
    "Held-out accuracy", "Batch composition", "Training dynamics", "Loss and reformulated prompts",
    "What still carries a signal", "What replies do with candidates",
    "Graduations by entry accuracy", "Graduation and eviction", "Buffer occupancy", "Fate by number of visits",
    "Graduates per bin", "Staleness", "Off-policy distance", "Throughput and waiting",
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """The elements of a page, the text of its scripts, and every attribute that could act or
    fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.sources: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")
            self._in_script = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def write_window(run_dir: Path, window: Window, step: int = 4) -> None:
    rollouts.write_step(run_dir / "rollouts", step, window, {"q-0000": "admitted"}, set())


def rename(window: Window, text: str) -> None:
    """Put a text wherever a run may carry one."""
    for visit in window.visits:
        visit.question = Question(id=f"{visit.question.id}{text}", text=text, answer=text)
        for group in (visit.plain, *(r.group for r in visit.reformulations)):
            assert group is not None and group.samples is not None and group.grades is not None
            texts = [text] * len(group.samples.texts)
            group.samples = msgspec.structs.replace(group.samples, texts=texts)
            group.grades = [
                msgspec.structs.replace(grade, answer=text, note=text) for grade in group.grades
            ]


@pytest.mark.slow
def test_a_full_run_draws_every_figure(fake_run: Callable[..., Path]) -> None:
    drawings = figures.draw_all(load.load_run(fake_run(steps=12)))
    assert [drawing.title for drawing in drawings] == EVERY_FIGURE
    for drawing in drawings:
        kind, _, data = drawing.uri.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)


@pytest.mark.slow
def test_grpo_draws_what_it_has(fake_run: Callable[..., Path]) -> None:
    drawings = figures.draw_all(load.load_run(fake_run(steps=3, method="grpo")))
    assert [d.title for d in drawings] == [
        "Held-out accuracy", "Batch composition", "Training dynamics", "Loss", "Staleness",
        "Off-policy distance", "Throughput and waiting",
    ]  # fmt: skip


@pytest.mark.slow
def test_distillation_shows_its_divergence_and_no_advantages(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=12, method="grpo"))
    for line in run.steps:
        line["train/jsd"] = line["train/loss"]
        del line["train/positive_advantage_share"]
    with plots.look():
        dynamics, training = figures.dynamics(run), figures.training(run)
    assert dynamics is not None and training is not None
    titles = [axes.get_title(loc="left") for axes in (*dynamics.figure.axes, *training.figure.axes)]
    assert "Rollouts with positive advantage" not in titles and "Distillation loss" in titles
    assert "JSD, nats" in [axes.get_ylabel() for axes in training.figure.axes]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_still_gives_a_page(
    fake_run: Callable[..., Path], steps: int
) -> None:
    page = Page(render_page(load.load_run(fake_run(steps=steps))))
    assert page.tags.count("figure") == (1 if steps == 0 else page.tags.count("img"))
    assert len(page.scripts) == (0 if steps == 0 else 2)


@pytest.mark.slow
def test_the_page_is_self_contained_and_its_policy_names_its_own_script(
    fake_run: Callable[..., Path],
) -> None:
    text = render_page(load.load_run(fake_run(steps=4)))
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert len(page.scripts) == 2
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert f"script-src '{digest(page.scripts[1])}'" in policy.group(1).replace("&#43;", "+")
    assert "default-src 'none'" in policy.group(1)


def tenth(lines: list[dict[str, Any]], name: str) -> str:
    """`42 → 84 %`: a metric at the first and the last of twelve steps; a tenth of them is one."""
    values = [line[name] for line in lines if name in line]
    return f"{100 * values[0]:.0f} → {100 * values[-1]:.0f} %"


@pytest.mark.slow
def test_the_audit_is_a_table_by_kind(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=12))
    table = audit_table(run)
    assert table is not None
    rows = {kind: dict(zip(table.titles, cells, strict=True)) for kind, cells in table.rows}
    assert list(rows) == ["plain (all)", "BCQ", "NCQ"]
    assert rows["BCQ"]["mixed groups"] == tenth(run.steps, "audit/bcq/mixed")
    assert rows["BCQ"]["accuracy"] == tenth(run.steps, "accuracy/bcq")
    assert (
        rows["NCQ"]["picks of the first slot"]
        == "–"
        == rows["plain (all)"]["accuracy, right one first"]
    )
    page = render_page(run)
    assert "Candidate audit" in page
    assert rows["BCQ"]["mixed groups"].replace(" %", "\u00a0%") in page
    assert audit_table(load.load_run(fake_run(steps=3, method="grpo"))) is None


@pytest.mark.slow
def test_the_page_and_the_json_give_the_advice(
    fake_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fake_run(steps=6)
    healthy = render_page(load.load_run(run_dir))
    assert "No advisory" in healthy
    lines = [
        msgspec.json.decode(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()
    ]
    failed = {"tasks/failed/compress/teacher-0": 2, "tasks/failed/teacher/teacher-0": 3}
    sick = [{**line, "train/updates": 0, "length/truncated": 0.125, **failed} for line in lines]
    (run_dir / "metrics.jsonl").write_bytes(
        b"".join(msgspec.json.encode(line) + b"\n" for line in sick)
    )
    page = render_page(load.load_run(run_dir))
    assert '<li class="severe"><b>severe · no_gradient.</b> no optimizer update was made' in page
    assert "responses, 12.5\u00a0% were cut off at the length limit." in page
    assert "Tasks that failed: 12 compress, 18 teacher (30 of teacher-0)." in page
    assert "NOT ONE UPDATE WAS MADE" in page and "No advisory" not in page
    assert main([str(run_dir), "--json"]) == 0
    assert [a["rule"] for a in msgspec.json.decode(capsys.readouterr().out)["advice"]] == [
        "no_gradient"
    ]


@pytest.mark.slow
def test_hostile_text_stays_text(fake_run: Callable[..., Path], window: Window) -> None:
    run_dir = fake_run(steps=0)
    rename(window, HOSTILE)
    write_window(run_dir, window)
    (run_dir / "run.json").write_bytes(
        (run_dir / "run.json").read_bytes().replace(b'"made-up"', msgspec.json.encode(HOSTILE))
    )
    page = Page(render_page(load.load_run(run_dir)))
    assert len(page.scripts) == 2
    assert page.handlers == []
    assert page.tags.count("img") == 1
    question = msgspec.json.decode(page.scripts[0])["questions"][0]
    assert (question["text"], question["gold"]) == (HOSTILE, HOSTILE)
    assert question["visits"][0]["groups"][0]["rollouts"][0]["response"] == HOSTILE


def test_the_browser_retells_a_visit(fake_run: Callable[..., Path], window: Window) -> None:
    run_dir = fake_run(steps=0)
    write_window(run_dir, window)
    data = browser.browser_data(load.load_run(run_dir))
    assert (data.total, [question.id for question in data.questions]) == (1, ["q-0000"])
    question, visit = data.questions[0], data.questions[0].visits[0]
    assert (question.fate, visit.step, visit.origin, visit.outcome) == (
        "never admitted",
        4,
        "new",
        "admitted",
    )
    assert [group.kind for group in visit.groups] == ["plain", "teacher", "bcq", "ncq"]
    assert [len(group.rollouts) for group in visit.groups] == [8, 4, 8, 8]
    bcq = window.visits[0].reformulations[0]
    assert bcq.group is not None
    assert visit.groups[2].prompt == bcq.group.prompt.messages[0].content
    shown = [
        (candidate["source"], candidate["correct"]) for candidate in visit.groups[2].candidates
    ]
    assert shown == [(candidate.source, candidate.correct) for candidate in bcq.candidates]


def test_the_browser_calls_right_what_earns_the_correct_reward(
    fake_run: Callable[..., Path], window: Window
) -> None:
    run_dir, plain = fake_run(steps=0), window.visits[0].plain
    plain.correct_reward = 0.9
    plain.grades = [
        Grade(reward=0.95),
        Grade(reward=0.5),
        Grade(reward=0.0, note="raised", failed=True),
        *plain.the_grades[3:],
    ]
    write_window(run_dir, window)
    [question] = browser.browser_data(load.load_run(run_dir)).questions
    shown = question.visits[0].groups[0].rollouts
    assert [rollout.right for rollout in shown[:3]] == [True, False, None]
    [path] = rollouts.step_files(run_dir / "rollouts")
    parquet.write_table(parquet.read_table(path).drop_columns(["correct"]), path)
    [question] = browser.browser_data(load.load_run(run_dir)).questions
    shown = question.visits[0].groups[0].rollouts
    assert [rollout.right for rollout in shown] == [rollout.reward >= 1 for rollout in shown]


def test_visits_of_a_question_are_gathered_in_step_order(
    fake_run: Callable[..., Path], window: Window
) -> None:
    run_dir = fake_run(steps=0)
    for step in (9, 2, 11):
        write_window(run_dir, _moved(window, step), step)
    data = browser.browser_data(load.load_run(run_dir))
    assert [visit.step for visit in data.questions[0].visits] == [2, 9, 11]


def test_what_is_trained_later_is_shown_with_its_visit(
    fake_run: Callable[..., Path], window: Window
) -> None:
    """A filled batch holds the rewritten prompts of one visit of a question beside another visit of
    the same question; and somebody has removed the file with the plain group of a third."""
    run_dir, first = fake_run(steps=0), _moved(window, 3)
    early, late = plain_part(first.visits[0]), first.visits[0]
    late.trained = "plain"
    again, orphan = _moved(window, 5).visits[0], _moved(window, 1).visits[0]
    again.origin, orphan.trained = "replay", "plain"
    write_window(run_dir, Window(index=4, visits=[early]), 4)
    write_window(run_dir, Window(index=6, visits=[orphan, late, again]), 6)
    [question] = browser.browser_data(load.load_run(run_dir)).questions
    assert [
        (visit.step, visit.origin, visit.outcome, [(g.kind, g.step) for g in visit.groups])
        for visit in question.visits
    ] == [
        (4, "new", "admitted", [("plain", 4), ("teacher", 6), ("bcq", 6), ("ncq", 6)]),
        (6, "replay", "admitted", [("plain", 6), ("teacher", 6), ("bcq", 6), ("ncq", 6)]),
    ]
    assert {len(g.rollouts) for visit in question.visits for g in visit.groups} == {8, 4}


def _moved(window: Window, index: int) -> Window:
    """The same as another window of the run."""
    moved = copy.deepcopy(window)
    moved.index = index
    for visit in moved.visits:
        for group in (*visit.student_groups(), *visit.teacher_groups()):
            group.id = f"{index}/{group.id.partition('/')[2]}"
    return moved


@pytest.mark.slow
def test_what_cannot_fit_is_not_read_to_the_end(
    fake_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def reading(path: Path, *rest: Any, **options: Any) -> list[dict[str, Any]]:
        if "question_ids" in options:
            asked.append(len(options["question_ids"]))
        return rollouts.read_step(path, *rest, **options)

    monkeypatch.setattr(browser, "read_step", reading)
    run = load.load_run(fake_run(steps=30))
    assert len(browser.browser_data(run).questions) == asked[-1] == asked[0]
    asked.clear()
    shown = len(browser.browser_data(run, max_bytes=30_000).questions)
    assert shown <= asked[-1] < asked[0] / 2


def test_the_browser_is_cut_to_size_with_every_fate_kept(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=14))
    whole = browser.browser_data(run)
    few = browser.browser_data(run, max_questions=9)
    assert len(whole.questions) == whole.total > 9
    assert (len(few.questions), few.total) == (9, whole.total)
    assert {question.fate for question in few.questions} == {
        question.fate for question in whole.questions
    }
    small = browser.browser_data(run, max_bytes=30_000)
    assert 0 < len(small.questions) < whole.total
    assert len(browser.embed(small)) < 60_000
    assert small.questions == whole.questions[: len(small.questions)]


def test_a_run_of_another_version_may_lack_metrics(fake_run: Callable[..., Path]) -> None:
    run_dir = fake_run(steps=3)
    metrics = run_dir / "metrics.jsonl"
    kept = [
        {key: value for key, value in json.loads(line).items() if key in ("step", "wall_seconds")}
        for line in metrics.read_text().splitlines()
    ]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    page = render_page(load.load_run(run_dir))
    assert "Batch composition" not in page and "Graduation and eviction" in page


def test_a_question_may_not_take_the_page_from_the_others(
    fake_run: Callable[..., Path], window: Window
) -> None:
    """One that is never solved is visited again and again; a group that a visit has already begun
    with is shown whole."""
    run_dir = fake_run(steps=0)
    for step in (2, 5, 9, 11):
        write_window(run_dir, _moved(window, step), step)
    run = load.load_run(run_dir)
    whole = browser.browser_data(run).questions[0]
    one_visit = sum(len(r.response) for g in whole.visits[0].groups for r in g.rollouts)
    cut = browser.browser_data(run, max_of_one=one_visit).questions[0]
    assert (len(whole.visits), whole.later) == (4, 0)
    assert (cut.visits, cut.later) == (whole.visits[:2], 2)
    least = browser.browser_data(run, max_of_one=0).questions[0]
    assert (least.visits, least.later) == (whole.visits[:1], 3)


def test_a_question_larger_than_the_page_is_shown_all_the_same(
    fake_run: Callable[..., Path],
) -> None:
    run = load.load_run(fake_run(steps=14))
    whole, small = browser.browser_data(run), browser.browser_data(run, max_bytes=10)
    assert small.questions == whole.questions[:1] and small.total == whole.total > 1
    assert browser_note(small).startswith(f"1 of {whole.total} questions that were hard")


def test_long_texts_are_cut_with_a_note() -> None:
    assert browser.cut("short") == "short"
    assert (
        browser.cut("x" * 12, limit=10)
        == "x" * 10 + " … [2 more characters are in the rollout store]"
    )


def fate_line(fate: str, entry: float) -> dict[str, Any]:
    return {"step": 0, "question_id": "q", "fate": fate, "entry_accuracy": entry, "visits": 1}


def test_many_entry_accuracies_are_gathered_into_the_bins_of_the_paper() -> None:
    assert load.merger([0.0, 0.125, 0.25])(0.125) == 0.125
    merge = load.merger([i / 32 for i in range(16)])
    assert [merge(i / 32) for i in (0, 3, 4, 15)] == [0.0, 0.0, 0.125, 0.375]


def test_the_latest_fate_of_a_question_counts() -> None:
    lines = [fate_line("admitted", 0.0), fate_line("graduated", 0.0), fate_line("admitted", 0.25)]
    assert browser.question_fates(lines[:2]) == {"q": ("graduated", "0")}
    assert browser.question_fates(lines) == {"q": ("in the buffer", "0.25")}


def test_sentences_say_when_a_promise_was_broken(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=1))
    assert sentences.sentences(run)[-1] == (
        "Every new question was trained exactly once: none was lost, no group was trained twice."
    )
    run.summary |= {"trained_twice": 2, "lost": 1, "max_staleness_seen": 3}
    assert sentences.sentences(run)[-2:] == [
        "The oldest token trained on was 3 policy versions behind, ABOVE the bound of 2.",
        (
            "THE EXACTLY-ONCE PROMISE WAS BROKEN: 2 groups or questions were trained twice and 1 "
            "questions were lost."
        ),
    ]


def test_one_step_is_one_step(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=1))
    assert sentences.sentences(run)[0].startswith("1 rollout step in ")
    assert tiles(run.summary)[0][:2] == ("1", "rollout step")
    run.summary.update(updates=1, admitted=1, graduated=1, evicted=1, max_staleness_seen=1)
    said = " ".join(sentences.sentences(run))
    assert "The optimizer made 1 update." in said
    assert "admitted 1 hard question; 1 of them (100 %) graduated and 1 was evicted." in said
    assert "trained on was 1 policy version behind" in said


def test_a_number_and_its_per_cent_sign_stay_on_one_line() -> None:
    page = environment(ASSETS).from_string("{{ words }} {{ ours }} {{ number }}")
    shown = page.render(words="95 % <b>", ours=Markup("<i>5 %</i>"), number=7)
    assert shown == "95\u00a0% &lt;b&gt; <i>5 %</i> 7"


def test_held_out_progress_is_told_with_its_intervals(fake_run: Callable[..., Path]) -> None:
    assert sentences.sentences(load.load_run(fake_run(steps=1)))[1] == (
        "Held-out accuracy went up by 9.0 points, from 38.0 % to 47.0 % (95 % intervals 35–41 % "
        "and 44–50 %)."
    )


def test_json_prints_the_summary_and_writes_no_page(
    fake_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fake_run(steps=2)
    assert main([str(run_dir), "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["steps"] == 2
    assert not (run_dir / "report").exists()


@pytest.mark.slow
def test_the_page_is_written_whole_where_asked(
    fake_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = fake_run(steps=0), tmp_path / "deep" / "page.html"
    assert main([str(run_dir), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert out.read_text("utf-8").endswith("</html>\n") or out.read_text("utf-8").endswith(
        "</html>"
    )
    assert list(out.parent.iterdir()) == [out]
    assert main([str(run_dir)]) == 0
    assert (run_dir / "report" / "index.html").exists()


def test_a_folder_that_is_no_run_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: is not the directory of a run (it has no run.json)\n"
    )  # fmt: skip


@pytest.mark.slow
def test_an_out_that_cannot_be_written_is_one_sentence(
    fake_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "page.html"
    assert main([str(fake_run(steps=0)), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"--out {out}: cannot be written (File exists)\n"


@pytest.mark.slow
def test_rewards_of_several_parts_have_a_figure_of_values(fake_run: Callable[..., Path]) -> None:
    run = load.load_run(fake_run(steps=4, method="grpo"))
    assert figures.rewards(run) is None
    for line in run.steps:
        line |= {"reward/plain": -2.5, "reward_part/math": 0.5, "reward_part/length": -6.0}
    with plots.look():
        drawn = figures.rewards(run)
    assert drawn is not None
    whole, by_part = drawn.figure.axes
    assert whole.get_ylim()[0] < -2.5, "values are not shares"
    assert [text.get_text() for text in by_part.get_legend().get_texts()] == ["length", "math"]
