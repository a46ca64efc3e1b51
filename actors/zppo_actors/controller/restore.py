"""What an attempt of the controller begins with: the scheduler, fresh or from a checkpoint, and
what the checkpoints of this attempt are bound to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from zppo.algorithm.methods import get_method
from zppo.config.served import ServedModel, served_models, served_student, teachers
from zppo.config.topology import Topology
from zppo.data.corpus import load_questions
from zppo.data.question import Question, digest
from zppo.errors import UserError
from zppo.plan.extensions import changed
from zppo.plan.memory import WITHOUT_FOLDER, Models, inspect_models
from zppo.plan.model_folder import special_tokens
from zppo.prompting.prompts import PromptSet
from zppo.records import binding, checkpoint
from zppo.records.binding import MadeWith, check_contents
from zppo.records.ledger import Spending
from zppo.records.run_directory import RunRecord
from zppo.scheduling.admission import Bounds
from zppo.scheduling.budget import Spent
from zppo.scheduling.scheduler import Scheduler
from zppo.scheduling.state import SchedulerState
from zppo_actors.process import ActorContext
from zppo_protocol import codec


def load_scheduler(
    context: ActorContext,
    record: RunRecord,
    measured: Iterable[int],
    spent: Mapping[str, Spending],
    now: float,
) -> Scheduler:
    """The scheduler of this attempt: fresh, or continued from the checkpoint of
    `context.start_version`. The policies of the steps `measured` are evaluated already, and the
    teachers have cost `spent` so far."""
    topology, base = context.topology, Path.cwd()
    questions = load_questions(topology.data.train, topology.data, base).questions
    if record.corpus and record.corpus != digest(questions):
        raise UserError(
            f"data.train: {topology.data.train!r} has changed since the run began; put the old "
            "file back"
        )
    heldout: list[Question] = []
    if topology.data.heldout is not None:
        heldout = load_questions(topology.data.heldout, topology.data, base).questions
    marks = special_tokens(one.folder for one in served_models(topology))
    prompts = PromptSet.of(topology.data, topology.method.prefix_share, marks)
    now_there = {"data.heldout": digest(heldout), "data.templates": prompts.digest}
    check_contents(topology, record.contents, now_there)
    state = load_state(context)
    state.evaluated = sorted({*state.evaluated, *measured})
    return Scheduler(
        topology,
        get_method(topology.method.name),
        questions,
        heldout,
        prompts,
        state,
        now,
        bounds_of(topology, inspect_models(topology)),
        record.redraws,
        {kind: Spent(requests=cost.requests, tokens=cost.tokens) for kind, cost in spent.items()},
    )


def bounds_of(topology: Topology, models: Models) -> dict[str, Bounds]:
    """The bounds of every pool of engines, from the facts of the models that they read."""
    # A teacher's padded vocabulary may be larger than the student's. That is no fault of its
    # engine: the trainer leaves out what the student cannot read, and counts it.
    method, student = get_method(topology.method.name), served_student(topology)
    found = {student.pool: _bounds(student, models, trained=True)}
    for one in teachers(topology):
        found[one.pool] = _bounds(one, models, trained=method.teacher_tokens)
    return found


def _bounds(one: ServedModel, models: Models, *, trained: bool) -> Bounds:
    """Of one pool; an engine without a model folder has a context of its own, if any."""
    facts = models.by_pool.get(one.pool)
    reads = facts is not None and one.actor.engine not in WITHOUT_FOLDER
    return Bounds(
        vocabulary=facts.vocabulary if facts is not None else None,
        context=facts.context if facts is not None and reads else None,
        trained=trained,
    )


def bound_to(context: ActorContext, corpus: str) -> MadeWith:
    """What this attempt makes its checkpoints with. Raises UserError if the models, the questions
    or the settings that may not change are not those of the checkpoint it goes on from."""
    now = binding.made_with(context.topology, corpus)
    changed(context.topology, context.extensions, "the run began")
    if context.start_version > 0:
        folder = checkpoint.final_folder(context.run_dir, context.start_version)
        made = checkpoint.read_made_with(folder)
        if made is not None:
            binding.check_folders(made, context.topology, now, context.start_version)
            found = binding.first_difference(made.settings, now.settings)
            if found is not None:
                raise UserError(
                    f"run.json: {found.setting} is {found.after!r} and was {found.before!r} when "
                    f"the checkpoint of step {context.start_version} was written; put it back, "
                    f"because {found.reason}"
                )
    return now


def load_state(context: ActorContext) -> SchedulerState:
    if context.start_version == 0:
        return SchedulerState.fresh(context.topology.scheduler)
    folder = checkpoint.final_folder(context.run_dir, context.start_version)
    return codec.loads((folder / checkpoint.SCHEDULER).read_bytes(), SchedulerState)
