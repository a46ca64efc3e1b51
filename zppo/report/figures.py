"""The figures of one run, each a function from `RunData` to a drawing, or None when the run lacks
the data for it.

The captions name the figure of the paper that shows the same quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zppo.records.metrics import KIND_TITLES
from zppo.records.timeline import read_timeline
from zppo.records.work import sentence_of, shares_of, work_of
from zppo.report import plots
from zppo.report.lanes import draw_lanes
from zppo.report.load import RunData
from zppo.report.plots import BIN_COLOURS, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

STEP = "rollout step"
MOST_VISITS = 10
KIND_COLOURS = {
    "plain": SKY,
    "bcq": GREEN,
    "ncq": VERMILION,
    "hint": PURPLE,
    "prefix": BLUE,
}


class Drawing(NamedTuple):
    """A finished figure. `wide` asks for the whole width of the page."""

    section: str
    title: str
    caption: str
    uri: str
    wide: bool


class _Sketch(NamedTuple):
    figure: Figure
    title: str
    caption: str


def percent(entry: float) -> str:
    return f"{100 * entry:.3g} %"


def heldout(run: RunData) -> _Sketch | None:
    """Held-out accuracy with its interval."""
    if not run.heldout:
        return None
    figure, [axes] = plots.canvas()
    points = {line["step"]: line for line in run.heldout}
    steps = sorted(points)
    values = [points[step]["accuracy"] for step in steps]
    low = [
        value - points[step].get("low", value) for step, value in zip(steps, values, strict=True)
    ]
    high = [
        points[step].get("high", value) - value for step, value in zip(steps, values, strict=True)
    ]
    axes.errorbar(steps, values, yerr=[low, high], color=BLUE, marker="o", capsize=4, linewidth=2)
    for step, value in zip(steps, values, strict=True):
        axes.annotate(
            f"{100 * value:.1f} %",
            (step, value),
            xytext=(8, -14),
            textcoords="offset points",
            color=BLUE,
        )
    axes.margins(x=0.15, y=0.3)
    plots.label(axes, "Held-out accuracy", "trained steps", "share correct")
    plots.percent_ticks(axes)
    plots.whole_numbers(axes)
    caption = (
        "Questions that are never trained on, plain prompts. Bars: 95 % interval over questions."
    )
    return _Sketch(figure, "Held-out accuracy", caption)


def dynamics(run: RunData) -> _Sketch | None:
    """Rollout accuracy, share of positive advantages, entropy (Fig. 22)."""
    if not run.steps:
        return None
    positive_share = run.series("train/positive_advantage_share")  # distillation has no advantages
    figure, [accuracy, *positives, entropy] = plots.canvas(2 + bool(len(positive_share.steps)))
    replayed = run.series("accuracy/replay")
    plots.line(accuracy, *run.series("accuracy/new"), BLUE, "new questions")
    if len(replayed.steps):
        plots.line(accuracy, *replayed, VERMILION, "replayed")
        plots.line(accuracy, *run.series("accuracy/plain"), GREY, "all")
    plots.label(accuracy, "Rollout accuracy, plain prompts", STEP, "share correct")
    plots.shares(accuracy)
    plots.legend(accuracy)
    for axes in positives:
        plots.line(axes, *positive_share, GREEN)
        plots.label(axes, "Rollouts with positive advantage", STEP, "share")
        plots.shares(axes)
    plots.line(entropy, *run.series("train/entropy"), PURPLE)
    plots.label(entropy, "Policy entropy", STEP, "nats per token")
    entropy.set_ylim(bottom=0)
    _steps_on(accuracy, *positives, entropy)
    caption = "The quantities of Fig. 22. Faint lines are single steps, strong ones a running mean."
    if len(replayed.steps):
        caption += " Replayed questions are hard by selection, so they usually lie below new ones."
    return _Sketch(figure, "Training dynamics", caption)


def training(run: RunData) -> _Sketch | None:
    """Loss, BCQ accuracy, NCQ accuracy (Fig. 25)."""
    distilled = len(run.series("train/jsd").steps) > 0
    loss = ("Distillation loss", "JSD, nats") if distilled else ("Policy loss", "clipped surrogate")
    parts = [
        ("train/loss", *loss, BLUE),
        ("accuracy/bcq", "BCQ accuracy", "share correct", GREEN),
        ("accuracy/ncq", "NCQ accuracy", "share correct", VERMILION),
        ("accuracy/hint", "Accuracy with a hint", "share correct", PURPLE),
        ("accuracy/prefix", "Accuracy behind a prefix", "share correct", BLUE),
    ]
    present = [part for part in parts if len(run.series(part[0]).steps)]
    if not present:
        return None
    figure, panels = plots.canvas(len(present))
    for axes, (name, title, unit, colour) in zip(panels, present, strict=True):
        plots.line(axes, *run.series(name), colour)
        plots.label(axes, title, STEP, unit)
        if unit == "share correct":
            plots.shares(axes)
    _steps_on(*panels)
    if len(present) == 1:
        return _Sketch(
            figure, "Loss", "Mean over the updates of a step; the first quantity of Fig. 25."
        )
    caption = (
        "The quantities of Fig. 25. BCQ: one right and one wrong candidate in the prompt. NCQ: "
        "only wrong answers. Hint and prefix: Algorithms 5 and 6."
    )
    return _Sketch(figure, "Loss and reformulated prompts", caption)


def rewards(run: RunData) -> _Sketch | None:
    """What responses earn where that is more than right or wrong: the sum, and its parts."""
    prefix = "reward_part/"
    parts = sorted({name for line in run.steps for name in line if name.startswith(prefix)})
    if not parts:
        return None
    figure, [whole, by_part] = plots.canvas(2)
    for metric, text, colour in (
        ("reward/plain", "plain", BLUE),
        ("reward/teacher", "teacher", GREEN),
    ):
        if len(run.series(metric).steps):
            plots.line(whole, *run.series(metric), colour, text)
    plots.label(whole, "Reward", STEP, "mean value")
    plots.legend(whole)
    for index, name in enumerate(parts):
        colour = BIN_COLOURS[index % len(BIN_COLOURS)]
        plots.line(by_part, *run.series(name), colour, name.removeprefix(prefix))
    plots.label(by_part, "Parts of the reward, plain prompts", STEP, "mean value")
    plots.legend(by_part)
    _steps_on(whole, by_part)
    caption = (
        "Values of data.reward, of which advantages are made; parts are shown before their "
        "weights. Every accuracy here is the share of responses that earn method.correct_reward."
    )
    return _Sketch(figure, "Rewards", caption)


def composition(run: RunData) -> _Sketch | None:
    """Groups in the loss by what they are (Fig. 5a)."""
    hard = run.column("window/hard")
    layers = {
        "plain, easy": (run.column("window/new") + run.column("window/replayed") - hard, SKY),
        "plain, hard": (hard, ORANGE),
        "BCQ": (run.column("window/bcq"), GREEN),
        "NCQ": (run.column("window/ncq"), VERMILION),
        "hint": (run.column("window/hint"), PURPLE),
        "prefix": (run.column("window/prefix"), BLUE),
    }
    present = {name: layer for name, layer in layers.items() if layer[0].any()}
    if not present:
        return None
    figure, [axes] = plots.canvas()
    values, colours = (
        [layer for layer, _ in present.values()],
        [colour for _, colour in present.values()],
    )
    plots.stack(axes, run.step_numbers(), values, colours, list(present))
    plots.label(axes, "Groups in the loss", STEP, "groups")
    plots.whole_numbers(axes, y=True)
    plots.legend_below(axes, 4)
    caption = (
        "Composition of each step's batch, as in Fig. 5a. Hard: plain accuracy below the threshold "
        "τ."
    )
    return _Sketch(figure, "Batch composition", caption)


def graduations(run: RunData) -> _Sketch | None:
    """Cumulative graduations by entry accuracy (Fig. 4)."""
    steps, admitted = run.fate_steps("graduated"), run.fate_counts("admitted")
    if not steps:
        return None
    figure, [axes] = plots.canvas()
    for (entry, at), colour in zip(steps.items(), BIN_COLOURS, strict=False):
        share = f", {100 * len(at) / admitted[entry]:.0f} %" if admitted[entry] else ""
        name = f"{percent(entry)}: {len(at)} of {admitted[entry]}{share}"
        plots.staircase(axes, at, _last_step(run), colour, name)
    plots.label(axes, "Graduated questions, cumulative", STEP, "questions")
    plots.whole_numbers(axes, y=True)
    plots.legend(axes, title="accuracy at admission: graduated of admitted", loc="upper left")
    caption = (
        "Questions that left the buffer mastered, by the accuracy they were admitted with, as in "
        "Fig. 4."
    )
    return _Sketch(figure, "Graduations by entry accuracy", caption)


def fates(run: RunData) -> _Sketch | None:
    """Graduation against eviction (Figs. 5b, 23)."""
    if not run.fates:
        return None
    figure, [axes] = plots.canvas()
    for fate, colour, style in (
        ("admitted", GREY, ":"),
        ("graduated", GREEN, "-"),
        ("evicted", VERMILION, "--"),
    ):
        at = np.array([line["step"] for line in run.fates if line["fate"] == fate], dtype=int)
        plots.staircase(axes, at, _last_step(run), colour, f"{fate} ({len(at):,})", style)
    plots.label(axes, "Ways in and out of the buffer, cumulative", STEP, "questions")
    plots.whole_numbers(axes, y=True)
    plots.legend(axes, loc="upper left")
    caption = (
        "Graduated: answered at least at the rate τ. Evicted: the oldest of a full buffer. As in "
        "Figs. 5b and 23."
    )
    return _Sketch(figure, "Graduation and eviction", caption)


def occupancy(run: RunData) -> _Sketch | None:
    """What is in the buffer, by entry accuracy (Fig. 20)."""
    layers = run.families("buffer/by_entry_accuracy")
    if not layers:
        return None
    figure, [axes] = plots.canvas()
    names = [percent(entry) for entry in layers]
    plots.stack(axes, run.step_numbers(), list(layers.values()), BIN_COLOURS[: len(layers)], names)
    capacity = run.setting("scheduler", "buffer_capacity")
    if capacity and capacity <= 2 * np.sum(list(layers.values()), axis=0).max():
        axes.axhline(capacity, color=plots.BLACK, linewidth=1, linestyle="--", label="capacity")
    plots.label(axes, "Questions in the buffer", STEP, "questions")
    plots.whole_numbers(axes, y=True)
    plots.legend_below(axes, 5)
    return _Sketch(figure, "Buffer occupancy", "Stacked by accuracy at admission, as in Fig. 20.")


def bins(run: RunData) -> _Sketch | None:
    """Graduates per bin, count and share (Fig. 21)."""
    graduated, admitted = run.fate_counts("graduated"), run.fate_counts("admitted")
    entries = sorted(admitted | graduated)
    if not entries:
        return None
    figure, [number, share] = plots.canvas(2)
    names, colours = [percent(entry) for entry in entries], BIN_COLOURS[: len(entries)]
    counts = [graduated[entry] for entry in entries]
    number.bar_label(number.bar(names, counts, color=colours), padding=2)
    plots.label(number, "Graduates", "accuracy at admission", "questions")
    plots.whole_numbers(number, x=False, y=True)
    rates = [graduated[entry] / admitted[entry] if admitted[entry] else 0.0 for entry in entries]
    texts = [f"{100 * rate:.0f} %" for rate in rates]
    share.bar_label(share.bar(names, rates, color=colours), texts, padding=2)
    plots.label(share, "Graduates among those admitted", "accuracy at admission", "share")
    plots.shares(share)
    for axes, values in ((number, counts), (share, rates)):
        axes.set_ylim(top=1.15 * max(values) or 1.0)  # room for the labels
        axes.grid(axis="x", visible=False)
    return _Sketch(
        figure,
        "Graduates per bin",
        "Count and share of graduates by accuracy at admission, as in Fig. 21.",
    )


def visits(run: RunData) -> _Sketch | None:
    """Fate by number of visits (Fig. 24)."""
    ends = [
        (min(line["visits"], MOST_VISITS), line["fate"])
        for line in run.fates
        if line["fate"] != "admitted"
    ]
    if not ends:
        return None
    figure, [axes] = plots.canvas()
    numbers = np.arange(1, max(count for count, _ in ends) + 1)
    layers = [
        np.array([ends.count((n, fate)) for n in numbers]) for fate in ("graduated", "evicted")
    ]
    plots.stacked_bars(axes, numbers, layers, (GREEN, VERMILION), ("graduated", "evicted"))
    axes.set_xticks(numbers, [f"{n}+" if n == MOST_VISITS else str(n) for n in numbers])
    plots.label(
        axes, "Questions that left the buffer", "visits, the admitting one included", "questions"
    )
    plots.whole_numbers(axes, x=False, y=True)
    axes.set_ylim(top=1.08 * np.sum(layers, axis=0).max())
    axes.grid(axis="x", visible=False)
    plots.legend(axes)
    return _Sketch(
        figure,
        "Fate by number of visits",
        "How often a question was tried before it left, as in Fig. 24.",
    )


def staleness(run: RunData) -> _Sketch | None:
    """How old the trained tokens were, against the bound."""
    series = run.series("staleness/mean")
    if not len(series.steps):
        return None
    figure, [axes] = plots.canvas()
    axes.step(
        *run.series("staleness/max"), where="mid", color=ORANGE, linewidth=1.4, label="oldest token"
    )
    plots.line(axes, *run.series("staleness/in_queue"), GREY, "mean, after sampling")
    plots.line(axes, *series, BLUE, "mean over tokens")
    bound = run.setting("scheduler", "max_staleness")
    if bound is not None:
        axes.axhline(bound, color=plots.BLACK, linestyle="--", linewidth=1.2, label="bound")
    plots.label(axes, "Staleness", STEP, "policy versions")
    axes.set_ylim(bottom=0, top=max([bound or 0, *series.values]) + 0.6)
    plots.whole_numbers(axes)
    plots.legend_below(axes, 4)
    caption = (
        "Step minus the version that sampled a token. Queue time counts: nothing may pass the "
        "bound."
    )
    return _Sketch(figure, "Staleness", caption)


def throughput(run: RunData) -> _Sketch | None:
    """Trained tokens a second, and who waited."""
    seconds = run.series("time/step")
    if not len(seconds.steps) or not np.all(seconds.values > 0):
        return None
    figure, [speed, waits] = plots.canvas(2)
    plots.line(speed, seconds.steps, run.column("tokens/generated") / seconds.values, BLUE)
    plots.label(speed, "Trained tokens a second", STEP, "tokens/s")
    speed.set_ylim(bottom=0)
    plots.line(
        waits,
        seconds.steps,
        run.column("time/trainer_wait") / seconds.values,
        VERMILION,
        "trainer waits",
    )
    idle = run.series("time/rollout_idle")
    if len(idle.steps):
        plots.line(waits, *idle, SKY, "rollout slots idle")
    plots.label(waits, "Time not used", STEP, "share of the step")
    plots.shares(waits)
    plots.legend(waits)
    _steps_on(speed, waits)
    return _Sketch(
        figure,
        "Throughput and waiting",
        "Response tokens of the trained rollouts, over wall-clock time.",
    )


def off_policy(run: RunData) -> _Sketch | None:
    """Distance between the three policies of a token."""
    parts = [
        ("train/mismatch_kl", "behaviour to proximal", ORANGE),
        ("train/approximate_kl", "proximal to policy", BLUE),
    ]
    present = [part for part in parts if len(run.series(part[0]).steps)]
    if not present:
        return None
    figure, [axes] = plots.canvas()
    for name, text, colour in present:
        plots.line(axes, *run.series(name), colour, text)
    plots.label(axes, "Estimated divergence", STEP, "nats per token")
    plots.whole_numbers(axes)
    plots.legend_below(axes, 2)
    caption = (
        "Behaviour: the engine, sampling. Proximal: the trainer, before the step. Policy: the "
        "trainer, updating."
    )
    return _Sketch(figure, "Off-policy distance", caption)


def outcomes(run: RunData) -> _Sketch | None:
    """Which groups still have a gradient, and whose replies all agree, by kind of prompt."""
    kinds = [kind for kind in KIND_COLOURS if len(run.series(f"audit/{kind}/mixed").steps)]
    if len(kinds) < 2:  # without rewritten prompts there are no candidates to audit
        return None
    figure, panels = plots.canvas(2)
    parts = (("mixed", "Groups with right and wrong replies"), ("unanimous", "Groups that agree"))
    for axes, (name, title) in zip(panels, parts, strict=True):
        for kind in kinds:
            series = run.series(f"audit/{kind}/{name}")
            plots.line(axes, *series, KIND_COLOURS[kind], KIND_TITLES.get(kind, kind))
        plots.label(axes, title, STEP, "share of the groups")
        plots.shares(axes)
        plots.legend(axes)
    _steps_on(*panels)
    caption = (
        "Only a group with right and wrong replies has a gradient; accuracy alone does not tell. "
        "Groups agree when all their replies end in the same answer."
    )
    return _Sketch(figure, "What still carries a signal", caption)


def slots(run: RunData) -> _Sketch | None:
    """Replies to two candidates: what they repeat, and which slot they pick."""
    name = "audit/bcq/picked_first"
    if not len(run.series(name).steps):
        return None
    figure, panels = plots.canvas(3)
    drawn = (
        ("Replies that repeat a candidate", "share of the replies", (
            ("audit/bcq/right_repeats", "BCQ, right: the right one", GREEN),
            ("audit/bcq/wrong_repeats", "BCQ, wrong: the wrong one", VERMILION),
            ("audit/ncq/listed_repeats", "NCQ: a listed one", PURPLE))),
        ("BCQ picks of the first slot", "share of the picks", (
            (f"{name}_right_first", "it is right", GREEN),
            (f"{name}_right_second", "it is wrong", VERMILION))),
        ("The same by length of the question", "share of the picks", (
            (f"{name}_short", "short", SKY), (f"{name}_long", "long", BLUE))),
    )  # fmt: skip
    for axes, (title, unit, lines) in zip(panels, drawn, strict=True):
        for metric, text, colour in lines:
            if len(run.series(metric).steps):
                plots.line(axes, *run.series(metric), colour, text)
        plots.label(axes, title, STEP, unit)
        plots.shares(axes, 1.05)
        plots.legend(axes)
    _steps_on(*panels)
    caption = (
        "As in Tables 16 and 17, by step. A student that reads the candidates picks the first slot "
        "where it is right and not where it is wrong; one that picks by place does not care."
    )
    return _Sketch(figure, "What replies do with candidates", caption)


def lanes(run: RunData) -> _Sketch | None:
    """Who worked, who waited, for whom."""
    timeline = read_timeline(run.run_dir)
    work = work_of(timeline) if timeline is not None else None
    if timeline is None or work is None:
        return None
    caption = f"{sentence_of(work)} {shares_of(work)}"
    return _Sketch(draw_lanes(timeline), "Who worked, who waited", caption)


SECTIONS: dict[str, Sequence[Callable[[RunData], _Sketch | None]]] = {
    "Learning": (heldout, composition, dynamics, rewards, training),
    "The candidates": (outcomes, slots),
    "The replay buffer": (graduations, fates, occupancy, visits, bins),
    "The machine": (lanes, staleness, off_policy, throughput),
}


def draw_all(run: RunData) -> list[Drawing]:
    """All figures the run has data for, in the order of the page."""
    with plots.look():
        return [
            Drawing(
                section,
                sketch.title,
                sketch.caption,
                plots.to_uri(sketch.figure),
                len(sketch.figure.axes) > 1,
            )
            for section, functions in SECTIONS.items()
            for function in functions
            if (sketch := function(run)) is not None
        ]


def _last_step(run: RunData) -> int:
    return max([*(line["step"] for line in run.steps), *(line["step"] for line in run.fates), 0])


def _steps_on(*panels: Axes) -> None:
    for axes in panels:
        plots.whole_numbers(axes)
