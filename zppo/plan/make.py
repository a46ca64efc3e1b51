"""The resolved plan of a run: settings checked alone and together, against the models and against
the machine.

`make_plan` starts and writes nothing. What is odd but works becomes a note.
"""

from __future__ import annotations

import math

from zppo.algorithm.methods import Method, get_method
from zppo.algorithm.steps import Recipe
from zppo.config.cluster import LOCALHOST
from zppo.config.rewards import parts_of
from zppo.config.served import ServedModel, served_models, served_student, teachers
from zppo.config.topology import TRANSFORMERS, VLLM, Topology
from zppo.errors import UserError, count_of
from zppo.grading.rewards import bounds_of_sum
from zppo.plan.architecture import (
    refuse_other_state,
    refuse_quantised,
    refuse_untrained,
    refuse_without_slots,
)
from zppo.plan.checks import CHECKS, check_engines
from zppo.plan.disk import disk_need
from zppo.plan.engines.vllm import check_prompts_read_whole, check_vllm_sizes
from zppo.plan.engines.vllm_models import check_recurrent_on_cpu, check_torchvision
from zppo.plan.loss_checks import loss_notes
from zppo.plan.machine import SLOW_BFLOAT16, Machine, check_fits, idle_cards, machines_of
from zppo.plan.memory import WITHOUT_FOLDER, Models, inspect_models, need, shared_bytes
from zppo.plan.model_class import refuse_unknown
from zppo.plan.model_folder import ModelFacts
from zppo.plan.plan import Plan, Windows
from zppo.plan.processes import (
    ProcessEntry,
    asked_teachers,
    host_name,
    processes,
    trainer_scores,
    uses_teacher,
)
from zppo.plan.teacher_work import teacher_work
from zppo.plan.unread import unread_notes
from zppo_protocol.values import share_of

BYTES_PER_TOKEN = 8
"""A token id and its log-prob on the wire."""
BYTES_PER_ID = 4
"""An id of a support on the wire; the row of ids has an offset of the same size."""
LARGE_LEARNING_RATE = 1e-2
"""AdamW's step is about this size in every weight, and weights are about 0.02 (the usual standard
deviation at initialisation): with more, one or two updates replace the model."""


def make_plan(
    topology: Topology, questions: int, machine: Machine, models: Models | None = None
) -> Plan:
    """Check the topology for a corpus of `questions` against its hosts, of which `machine` is the
    first, and lay out the run. With `models`, which are then only described, nothing is looked at
    on this machine. Raises UserError."""
    method = get_method(topology.method.name)
    for check in CHECKS:
        check(topology, method)
    installed = models is None
    check_engines(topology, method, installed=installed)
    models = models or inspect_models(topology)
    _check_served(topology, models, installed)
    table = processes(topology, machine.cores)
    windows = _windows(topology, method, questions)
    per_window = windows.groups * topology.method.group_size
    plan = Plan(
        topology=topology,
        method=method,
        processes=table,
        needs=[need(entry, topology, models) for entry in table],
        shared=shared_bytes(topology.student, models.student, topology.scheduler.max_staleness),
        disk=disk_need(topology, models.student, windows.steps * per_window),
        windows=windows,
        teacher_work=teacher_work(topology, method, windows),
        notes=[
            *_notes(topology, method, models, windows),
            *_host_notes(topology, table, machine),
        ],
    )
    _check_message_size(plan)
    check_fits(plan, machine)
    return plan


# ---- checks against models and machine -----------------------------------------------------------


def _context(one: ServedModel, facts: ModelFacts) -> int:
    """Longest sequence that the model's engine takes, in tokens."""
    return facts.slots_context if one.actor.engine == TRANSFORMERS else facts.context


def _check_served(topology: Topology, models: Models, installed: bool) -> None:
    """What an engine would refuse after it has loaded its model, which may take minutes."""
    for one in served_models(topology):
        facts, most = models.by_pool.get(one.pool), one.model.sampling.max_new_tokens
        if facts is not None and most >= _context(one, facts):
            raise UserError(
                f"{one.section}.sampling.max_new_tokens is {most}; expected less than "
                f"{_context(one, facts)}, the context of {one.model.model!r}"
            )
    for one in _in_trainer(topology):
        facts = models.by_pool[one.pool]
        refuse_unknown(facts.opened_by, facts.family, one.model.model, one.model_path)
        refuse_untrained(facts.family, one.model.model, one.model_path)
    quantised = models.student.quantised_bytes is not None
    refuse_quantised(quantised, topology.student.model, "student.model")
    for one in [served_student(topology), *asked_teachers(topology)]:
        if (facts := models.by_pool.get(one.pool)) is not None:
            _check_engine_of(one, facts, installed)


def _in_trainer(topology: Topology) -> list[ServedModel]:
    """The student, and the teacher whose distribution the trainer computes."""
    scores = trainer_scores(get_method(topology.method.name), topology.teacher)
    return [served_student(topology), *(teachers(topology)[:1] if scores else [])]


def _check_engine_of(one: ServedModel, facts: ModelFacts, installed: bool) -> None:
    if one.actor.engine == TRANSFORMERS:
        refuse_unknown(facts.opened_by, facts.family, one.model.model, one.model_path)
        refuse_other_state(facts.state, facts.family, one.model.model, one.model_path)
        refuse_without_slots(facts.family, one.model.model, one.model_path)
    if one.actor.engine == VLLM:
        check_vllm_sizes(one.actor.engine_args, facts, one)
        if "cpu" in one.actor.devices:
            check_prompts_read_whole(one.actor.engine_args, facts, one)
            check_recurrent_on_cpu(one.actor.engine_args, facts, one)
        if installed:
            check_torchvision(facts.kind, one)


def _check_message_size(plan: Plan) -> None:
    limit = plan.topology.transport.max_message_mib
    needed = math.ceil(plan.windows.largest_bytes / (1 << 20))
    if needed > limit:
        raise UserError(
            f"transport.max_message_mib is {limit}; expected at least {needed}, the size of a "
            f"window whose responses all have full length{_supports_in_words(plan.topology)}"
        )


def _supports_in_words(topology: Topology) -> str:
    """What makes a window large where sampling is truncated, and what makes it smaller."""
    sampling = topology.student.sampling
    if not sampling.truncates:
        return ""
    ids = sampling.in_training.top_k
    return f" and all tokens a support of {ids} ids (student.sampling.support_limit)"


# ---- numbers -------------------------------------------------------------------------------------


def _windows(topology: Topology, method: Method, questions: int) -> Windows:
    scheduler = topology.scheduler
    total = topology.run.epochs * questions
    steps = math.ceil(total / scheduler.new_questions)
    new = min(scheduler.new_questions, questions)
    recipe = Recipe.of(topology, method)
    replayed = recipe.replayed(new)
    reformulated = recipe.reformulated(new, new + replayed) if method.reformulations else 0
    others = replayed + reformulated
    if scheduler.batches == "filled" and scheduler.max_staleness > 0:
        others *= scheduler.lag + 1  # those of all windows that are not settled may be due at once
    responses = (new + others) * topology.method.group_size
    per_token = BYTES_PER_TOKEN
    teacher = topology.teacher
    if method.needs_scores and teacher is not None and not trainer_scores(method, teacher):
        per_token += BYTES_PER_TOKEN * teacher.score_top_k
    sampling = topology.student.sampling
    if sampling.truncates:
        per_token += BYTES_PER_ID * (sampling.in_training.top_k + 1)
    return Windows(
        new=new,
        replayed=replayed,
        reformulated=reformulated,
        steps=min(steps, topology.run.steps or steps),
        largest_bytes=responses * sampling.max_new_tokens * per_token,
    )


def _reward_notes(topology: Topology) -> list[str]:
    """Where what a response can earn makes all of them correct, or none."""
    parts, correct = parts_of(topology.data.reward), topology.method.correct_reward
    bounds = bounds_of_sum(parts) if parts else (0.0, 1.0)
    if bounds is None or (parts and "grader" in topology.data.fields):
        return []  # by a row that names one part, that part counts without its weight
    (least, most), earns = bounds, "data.reward adds up to" if parts else "a grader gives"
    if most < correct:
        return [
            f"{earns} at most {most:g}, less than method.correct_reward, {correct:g}: no response "
            "can be correct, and every question stays hard"
        ]
    if least >= correct:
        return [
            f"{earns} at least {least:g}, not less than method.correct_reward, {correct:g}: every "
            "response is correct, and no question is hard"
        ]
    return []


def _size_notes(topology: Topology, method: Method, windows: Windows) -> list[str]:
    """Numbers that a run cannot reach."""
    notes, sampling = [], topology.student.sampling
    updates = topology.method.updates_per_step
    if method.updates_per_step is None and updates > windows.groups:
        notes.append(
            f"method.updates_per_step is {updates}, more than the {windows.groups} groups that a "
            "step may have: an update takes one group at least"
        )
    if sampling.top_k > sampling.support_limit:
        notes.append(
            f"student.sampling.top_k is {sampling.top_k}, but support_limit, "
            f"{sampling.support_limit}, is how many tokens are sampled from"
        )
    return notes


def _host_notes(topology: Topology, table: list[ProcessEntry], machine: Machine) -> list[str]:
    """What hosts have that no process uses, and what is not known of them."""
    notes, used = [], {entry.host for entry in table}
    if cards := idle_cards(topology, machine):
        notes.append(
            f"every device is cpu, though this machine has {count_of(cards, 'GPU')}: "
            "see "
            "actors.trainer.device and actors.rollout.devices"
        )
    if slow := _slow_dtypes(topology, table, machine):
        notes.append(f"{SLOW_BFLOAT16}: set {' and '.join(slow)} to float32")
    if unused := [name for name in topology.cluster.hosts if name not in used]:
        notes.append(f"no process runs on {', '.join(unused)} of cluster.hosts")
    further = list(machines_of(topology, machine).items())[1:]
    unknown = [name for name, one in further if name in used and one.gpus is None]
    if unknown:
        notes.append(
            f"cluster.hosts does not say what {', '.join(unknown)} {_has(unknown)}: cards and "
            "memory there are not checked before the run"
        )
    return notes


def _slow_dtypes(topology: Topology, table: list[ProcessEntry], machine: Machine) -> list[str]:
    """The settings by which a processor that is slow in bfloat16 computes in it; of `machine`
    alone, the first host, something is known."""
    if machine.dtype == "bfloat16":
        return []
    first, computed = host_name(topology, LOCALHOST), list[ServedModel]()
    for entry in table:
        if entry.device == "cpu" and entry.host in (LOCALHOST, first):
            if entry.served is None:
                computed += _in_trainer(topology)
            elif entry.served.actor.engine not in WITHOUT_FOLDER:
                computed.append(entry.served)
    slow = (one.section for one in computed if one.model.dtype == "bfloat16")
    return [f"{section}.dtype" for section in dict.fromkeys(slow)]


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _notes(topology: Topology, method: Method, models: Models, windows: Windows) -> list[str]:
    """What works but may surprise."""
    notes = []
    scheduler = topology.scheduler
    if topology.run.steps is not None and windows.steps < topology.run.steps:
        notes.append(
            f"run.steps is {topology.run.steps}, but the corpus ends after {windows.steps} "
            "(run.epochs is "
            f"{topology.run.epochs}): the run ends there"
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
    idle = not uses_teacher(topology) and not trainer_scores(method, topology.teacher)
    if topology.teacher is not None and idle:
        notes.append(f"the method {method.name!r} has no work for the teacher; it is not started")
    longest = topology.data.max_prompt_tokens + topology.student.sampling.max_new_tokens
    context = _context(served_student(topology), models.student)
    if longest > context:
        notes.append(
            f"prompts and responses may have {longest} tokens together, the student's context has "
            f"{context}: long prompts get shorter responses"
        )
    if topology.optimizer.learning_rate > LARGE_LEARNING_RATE:
        notes.append(
            f"optimizer.learning_rate is {topology.optimizer.learning_rate:g}: AdamW moves every "
            "weight by about as much in each update, and weights of language models are about "
            "0.02; the paper's is 1e-06"
        )
    notes += [*loss_notes(topology.method), *_reward_notes(topology)]
    notes += [*_size_notes(topology, method, windows), *unread_notes(topology, method)]
    if scheduler.max_staleness == 0:
        notes.append(
            "scheduler.max_staleness is 0: sampling and training take turns, as in Algorithm 1"
        )
    return notes
