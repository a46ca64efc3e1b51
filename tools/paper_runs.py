"""The paper's table of runs as calls of `zppo compare`, and what they would cost on 64 cards and
on one node: the tables of docs/paper_runs.md.

    python -P tools/paper_runs.py              the calls
    python -P tools/paper_runs.py --costs      times and tokens, simulated (about a minute)
    python -P tools/paper_runs.py --splits     how the six cards of a node are best shared out
    python -P tools/paper_runs.py --write      all three into docs/paper_runs.md

Costs are simulated: the real scheduler under a virtual clock, with speeds that nobody has measured.
`calibration` says which they are; every figure moves with them.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from zppo.algorithm.methods import get_method
from zppo.config.load import load
from zppo.config.topology import Topology
from zppo.errors import Parser, run_command
from zppo.plan.machines_file import Described, described_models, read_machines
from zppo.plan.model_folder import ModelFacts
from zppo.plan.plan import Plan
from zppo.plan.processes import trainer_scores
from zppo.simulation import (
    Accuracies,
    Calibration,
    Curve,
    Engines,
    Graders,
    Lengths,
    Speeds,
    TrainerSpeed,
    World,
)
from zppo.simulation.simulate import Simulation, warm_steps

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGY, MACHINES = ROOT / "examples/paper.yaml", ROOT / "examples/paper.machines.yaml"
PAGE = ROOT / "docs/paper_runs.md"
STUDENTS = ("0.8B", "2B", "4B", "9B")

# What the paper compares, and for which students (its tables and its ablation).
REINFORCEMENT = ("grpo", "grpo_replay", "zppo")
ABLATION = ("grpo", "grpo_replay", "grpo_both", "grpo_replay_bcq", "grpo_replay_ncq", "zppo")
IN_PROMPTS = ("grpo_replay", "hint", "prefix", "grpo_replay_bcq", "grpo_replay_teacher_response")
DISTILLATION = ("off_distill", "off_distill_replay", "on_distill", "on_distill_replay")
WHOLE_TEACHER = "teacher.model=models/Qwen3.5-27B"
"""Distillation needs the teacher's distribution in the trainer, which loads no FP8."""

# ---- assumed speeds ------------------------------------------------------------------------------

PEAK, BANDWIDTH = 989e12, 3.35e12
"""Of an H100: dense bfloat16 operations and bytes of its memory, a second (data sheet)."""
UTILISATION, REACHED = 0.40, 0.60
"""Shares of the two that trainer and engine are taken to reach."""
OVERHEAD = 0.002
"""Seconds of a token step beside the reading of the weights."""
COPY = 5e9
"""Bytes a second of publishing weights, and of loading them into an engine."""
TEACHER = Curve(fixed=0.015, per_sequence=0.00015)
LENGTHS = Lengths(median=1536.0, p99_ratio=8.0, cap=12288)
COMPRESSED = Lengths(median=192.0, p99_ratio=2.0, cap=512)
"""The teacher's engine and the lengths of responses: those of benches/setting_p.yaml."""
PROMPT_TOKENS = 512
STEPS, SEED = 200, 0
SIMULATED = 12


class Call(Struct, frozen=True):
    """One call of `zppo compare`."""

    student: str
    what: str
    methods: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        return [f"student.model=models/Qwen3.5-{self.student}", *self.settings]

    @property
    def arguments(self) -> list[str]:
        name = f"runs/{self.student}-{self.what.replace(' ', '-')}"
        sets = [word for one in self.overrides for word in ("--set", one)]
        methods = ["--methods", ",".join(self.methods), "--seeds", "0"]
        return ["--topology", "examples/paper.yaml", *methods, *sets, "--out", name]


class Cost(Struct, frozen=True):
    """What `STEPS` steps take. Tokens are millions a step."""

    seconds: float
    hours: float
    cards: int
    student_tokens: float
    teacher_tokens: float
    bottleneck: str


def calls() -> Iterator[Call]:
    """Every call behind the paper's tables."""
    for student in STUDENTS:
        yield Call(student, "main", REINFORCEMENT)
        yield Call(student, "distillation", DISTILLATION, (WHOLE_TEACHER,))
    yield Call("0.8B", "ablation", ABLATION)
    yield Call("2B", "teacher in the prompt", IN_PROMPTS)


def node(student: str) -> list[str]:
    """Settings that shrink the layout to one node of eight cards, with an eighth of the questions a
    step. The largest student needs four cards to train."""
    ranks = 4 if student == "9B" else 3
    trainer = [f"cuda:{i}" for i in range(ranks)]
    rollout = [f"cuda:{i}" for i in range(ranks, 6)]
    return [
        "cluster.hosts={node-0: {}}",
        f"actors.trainer.devices=[{', '.join(trainer)}]",
        f"actors.rollout.devices=[{', '.join(rollout)}]",
        f"actors.rollout.count={len(rollout)}",
        "actors.teacher.count=2",
        *(
            f"actors.{pool}.hosts=[localhost]"
            for pool in ("trainer", "rollout", "teacher", "grader")
        ),
        "scheduler.new_questions=48",
    ]


# ---- costs ---------------------------------------------------------------------------------------


def calibration(topology: Topology, student: ModelFacts, teacher: ModelFacts | None) -> Calibration:
    """A student's token step reads all weights once and, for each sequence, computes 2 operations a
    parameter and reads keys and values of a mean response; the trainer does 10 operations a
    parameter and token (forward, backward, recomputed forward, proximal pass), 8 without a proximal
    pass, and 2 of a teacher whose distribution it computes."""
    method, ranks = get_method(topology.method.name), len(topology.actors.trainer.rank_devices)
    parameters, weights = student.parameters, 2 * student.parameters
    attending = student.layers - student.without_keys
    keys = attending * 2 * student.kv_heads * student.head_dim * 2 * LENGTHS.median
    each = 2 * parameters / (PEAK * UTILISATION) + keys / (BANDWIDTH * REACHED)
    scored = trainer_scores(method, topology.teacher) and teacher is not None
    operations = 8 * parameters + 2 * teacher.parameters if scored and teacher else 10 * parameters
    return Calibration(
        speeds=Speeds(
            rollout=Engines(
                slots=int(topology.actors.rollout.engine_args["max_num_seqs"]),
                curve=Curve(fixed=OVERHEAD + weights / (BANDWIDTH * REACHED), per_sequence=each),
                load_seconds=weights / COPY,
            ),
            teachers=(
                Engines(
                    slots=int(topology.actors.teacher.engine_args["max_num_seqs"]), curve=TEACHER
                ),
            ),
            trainer=TrainerSpeed(
                fixed=1.0,
                tokens_per_second=ranks * PEAK * UTILISATION / operations,
                publish_seconds=weights / COPY,
            ),
            grader=Graders(seconds=0.01),
        ),
        lengths=LENGTHS,
        lengths_of={"compress": COMPRESSED},
        accuracies=Accuracies(),
        prompt_tokens=PROMPT_TOKENS,
    )


def planned(overrides: Sequence[str]) -> tuple[Plan, Calibration]:
    """The plan on the described machines, and the assumed speeds. Raises UserError."""
    topology = load(TOPOLOGY, overrides)
    described = Described.of(topology, MACHINES, TOPOLOGY.parent)
    models = described_models(topology, described.machines, MACHINES, TOPOLOGY.parent)
    return described.plan(), calibration(topology, models.student, models.teacher)


def cost(overrides: Sequence[str], steps: int = SIMULATED) -> Cost:
    """Simulate some steps and lay them to `STEPS`."""
    plan, speeds = planned(overrides)
    questions = read_machines(MACHINES).questions
    world = World.of(plan.topology, speeds, corpus=questions)
    run = Simulation(world, steps, SEED)
    outcome = run.run(warm_steps(steps, plan.topology.scheduler.max_staleness))
    done: dict[str, float] = defaultdict(float)
    for of_window in run.done.values():
        for pool, steps_of_pool in of_window.items():
            done[pool] += steps_of_pool
    sampled = {pool: done[pool] / steps / 1e6 for pool in ("rollout", "teacher")}
    return Cost(
        seconds=outcome.seconds_per_step,
        hours=STEPS * outcome.seconds_per_step / 3600,
        cards=sum(len(host.cards) for host in plan.hosts),
        student_tokens=sampled["rollout"],
        teacher_tokens=sampled["teacher"],
        bottleneck=outcome.bottleneck,
    )


# ---- tables --------------------------------------------------------------------------------------


def table_of_calls() -> str:
    rows = ["| student | what | call |", "|---|---|---|"]
    for call in calls():
        line = shlex.join(["zppo", "compare", *call.arguments])
        rows.append(f"| {call.student} | {call.what} | `{line}` |")
    return "\n".join(rows) + "\n"


HEADING = (
    "| student | method | cards | s/step | 200 steps, h | card-hours | student, M tokens a step | "
    "teacher, M tokens a step | bottleneck |\n|---|---|---:|---:|---:|---:|---:|---:|---|"
)


def table_of_costs() -> str:
    rows = [HEADING]
    for student in STUDENTS:
        model = f"student.model=models/Qwen3.5-{student}"
        rows.append(_row(student, "grpo_replay", cost([model, "method.name=grpo_replay"])))
        rows.append(_row(student, "zppo", cost([model])))
        rows.append(_row(student, "zppo, one node", cost([model, *node(student)])))
    model = "student.model=models/Qwen3.5-2B"
    for method in ("off_distill_replay", "on_distill_replay"):
        found = cost([model, WHOLE_TEACHER, f"method.name={method}"])
        rows.append(_row("2B", method, found))
    synchronous = cost([model, "scheduler.max_staleness=0"])
    rows.append(_row("2B", "zppo, max_staleness 0", synchronous))
    return "\n".join(rows) + "\n"


def _row(student: str, method: str, found: Cost) -> str:
    cells = [
        student,
        method,
        str(found.cards),
        f"{found.seconds:.0f}",
        f"{found.hours:.1f}",
        f"{found.hours * found.cards:,.0f}",
        f"{found.student_tokens:.1f}",
        f"{found.teacher_tokens:.1f}",
        found.bottleneck,
    ]
    return f"| {' | '.join(cells)} |"


def table_of_splits() -> str:
    """Cards of a node that sample, out of six; the others train."""
    rows = ["| student | cards that sample | batches | s/step |", "|---|---:|---|---:|"]
    tried = [(student, sampling, "filled") for student in ("2B", "9B") for sampling in (2, 3, 4)]
    for student, sampling, batches in [*tried, ("2B", 3, "windows"), ("9B", 3, "windows")]:
        devices = [f"cuda:{i}" for i in range(6)]
        overrides = [
            f"student.model=models/Qwen3.5-{student}",
            f"scheduler.batches={batches}",
            f"actors.trainer.devices=[{', '.join(devices[:-sampling])}]",
            f"actors.rollout.devices=[{', '.join(devices[-sampling:])}]",
            f"actors.rollout.count={8 * sampling}",
        ]
        seconds = cost(overrides).seconds
        rows.append(f"| {student} | {sampling} | {batches} | {seconds:.0f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if asked.write:
        tables = {"calls": table_of_calls(), "costs": table_of_costs(), "splits": table_of_splits()}
        for name, table in tables.items():
            PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), name, table), "utf-8")
    elif asked.costs or asked.splits:
        print(table_of_costs() if asked.costs else table_of_splits())
    else:
        print(table_of_calls())


def replaced(page: str, name: str, table: str) -> str:
    """The page with the table between `<!-- name -->` and `<!-- end -->`."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    return f"{before}{mark}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    sys.exit(run_command(main))
