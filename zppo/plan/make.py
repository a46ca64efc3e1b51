"""The resolved plan of a run: settings checked alone and together, against the models and against
the machine.

`make_plan` starts and writes nothing. What is odd but works becomes a note.
"""

from __future__ import annotations

import math
from pathlib import Path

from zppo.algorithm.methods import Method, get_method
from zppo.algorithm.steps import Recipe
from zppo.config.topology import VLLM, Topology
from zppo.errors import UserError
from zppo.plan.checks import CHECKS
from zppo.plan.engines.vllm import check_prompts_read_whole, check_vllm_sizes
from zppo.plan.machine import Machine, check_fits, idle_cards
from zppo.plan.memory import Models, inspect_models, need, shared_bytes
from zppo.plan.model_folder import inspect_model
from zppo.plan.plan import Plan, Windows
from zppo.plan.processes import processes, teachers, trainer_scores, uses_teacher
from zppo_protocol.values import share_of

BYTES_PER_TOKEN = 8
"""A token id and its log-prob on the wire."""


def make_plan(topology: Topology, questions: int, machine: Machine) -> Plan:
    """Check the topology for a corpus of `questions` against `machine` and lay out the run. Raises
    UserError."""
    method = get_method(topology.method.name)
    for check in CHECKS:
        check(topology, method)
    models = inspect_models(topology, uses_teacher(topology))
    table = processes(topology, machine.cores)
    windows = _windows(topology, method, questions)
    plan = Plan(
        topology=topology,
        method=method,
        processes=table,
        needs=[need(entry, topology, models) for entry in table],
        shared=shared_bytes(topology, models),
        windows=windows,
        notes=_notes(topology, method, models, windows),
    )
    _check_contexts(topology, models)
    _check_vllm(topology, models)
    _check_message_size(plan)
    check_fits(plan, machine)
    return plan


# ---- checks against models and machine -----------------------------------------------------------


def _check_contexts(topology: Topology, models: Models) -> None:
    pairs = [
        ("student", topology.student, models.student),
        ("teacher", topology.teacher, models.teacher),
    ]
    for where, config, facts in pairs:
        if (
            config is not None
            and facts is not None
            and config.sampling.max_new_tokens >= facts.context
        ):
            raise UserError(
                f"{where}.sampling.max_new_tokens is {config.sampling.max_new_tokens}; expected "
                "less than "
                f"{facts.context}, the context of {config.model!r}"
            )


def _check_vllm(topology: Topology, models: Models) -> None:
    """Sizes that vLLM would refuse after minutes."""
    student = [("actors.rollout", topology.actors.rollout, "student.model", topology.student)]
    asked = teachers(topology) if uses_teacher(topology) else []
    for where, actor, model_where, model in [
        *student,
        *((t.where, t.actor, t.model_where, t.model) for t in asked),
    ]:
        if actor.engine == VLLM:
            facts = (
                models.student
                if model is topology.student
                else inspect_model(Path(model.model), model_where)
            )
            if facts is not None:
                check_vllm_sizes(actor.engine_args, facts, model, where, model_where)
                if "cpu" in actor.devices:
                    check_prompts_read_whole(actor.engine_args, facts, where)


def _check_message_size(plan: Plan) -> None:
    limit = plan.topology.transport.max_message_mib
    needed = math.ceil(plan.windows.largest_bytes / (1 << 20))
    if needed > limit:
        raise UserError(
            f"transport.max_message_mib is {limit}; expected at least {needed}, the size of a "
            "window whose responses all have full length"
        )


# ---- numbers -------------------------------------------------------------------------------------


def _windows(topology: Topology, method: Method, questions: int) -> Windows:
    scheduler = topology.scheduler
    total = topology.run.epochs * questions
    steps = math.ceil(total / scheduler.new_questions)
    new = min(scheduler.new_questions, questions)
    recipe = Recipe.of(topology, method)
    replayed = recipe.replayed(new)
    reformulated = recipe.reformulated(new, new + replayed) if method.reformulations else 0
    responses = (new + replayed + reformulated) * topology.method.group_size
    per_token = BYTES_PER_TOKEN
    if method.needs_scores and topology.teacher is not None and not trainer_scores(topology):
        per_token += BYTES_PER_TOKEN * topology.teacher.score_top_k
    return Windows(
        new=new,
        replayed=replayed,
        reformulated=reformulated,
        steps=min(steps, topology.run.steps or steps),
        largest_bytes=responses * topology.student.sampling.max_new_tokens * per_token,
    )


def _notes(topology: Topology, method: Method, models: Models, windows: Windows) -> list[str]:
    """What works but may surprise."""
    notes = []
    scheduler, student = topology.scheduler, models.student
    if topology.run.steps is not None and windows.steps < topology.run.steps:
        notes.append(
            f"run.steps is {topology.run.steps}, but the corpus ends after {windows.steps} "
            "(run.epochs is "
            f"{topology.run.epochs}): the run ends there"
        )
    if cards := idle_cards(topology):
        notes.append(
            f"every device is cpu, though this machine has {cards} GPU{'s' if cards > 1 else ''}: "
            "see "
            "actors.trainer.device and actors.rollout.devices"
        )
    compresses = any(one.preparation == "compress" for one in method.reformulations)
    if compresses and topology.teacher is None:
        notes.append(
            "there is no teacher: candidates are shortened by rule, not compressed as in the paper"
        )
    if method.reformulations and share_of(scheduler.rho_aug, scheduler.new_questions) == 0:
        notes.append(
            "scheduler.rho_aug leaves no room for a single reformulated question in a window"
        )
    if method.reformulations and topology.method.hard_threshold == 0.0:
        notes.append(
            "method.hard_threshold is 0: no question is ever hard, so nothing is reformulated or "
            "replayed"
        )
    if topology.teacher is not None and not uses_teacher(topology) and not trainer_scores(topology):
        notes.append(f"the method {method.name!r} has no work for the teacher; it is not started")
    longest = topology.data.max_prompt_tokens + topology.student.sampling.max_new_tokens
    if student is not None and longest > student.context:
        notes.append(
            f"prompts and responses may have {longest} tokens together, the student's context has "
            f"{student.context}: long prompts get shorter responses"
        )
    if scheduler.max_staleness == 0:
        notes.append(
            "scheduler.max_staleness is 0: sampling and training take turns, as in Algorithm 1"
        )
    return notes
