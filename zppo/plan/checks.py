"""Refusal of settings that cannot work together, before any model or machine is looked at.

Each check takes the topology and its method; each refusal names the path of the setting, its value
and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, structs

from zppo import extensions
from zppo.algorithm.methods import Method
from zppo.config.rewards import parts_of
from zppo.config.served import ServedModel, served_models, served_student, teachers
from zppo.config.topology import ENGINE_NAMES, JUDGE, OPENAI, VLLM, Topology
from zppo.errors import UserError
from zppo.grading import get_grader
from zppo.grading.rewards import check_parts
from zppo.plan.engines.openai import OpenAIArguments, check_openai, refuse_rollout
from zppo.plan.engines.own import (
    DEFAULT_SEQUENCES,
    SimulatedArguments,
    TransformersArguments,
    convert_arguments,
)
from zppo.plan.engines.vllm import check_vllm_arguments
from zppo.plan.loss_checks import check_loss
from zppo.plan.placement import check_placement
from zppo.plan.processes import asked_teachers, trainer_scores
from zppo.plan.sinks import check_sinks
from zppo.prompting.chat_template import check_template_variables

ENGINE_ARGUMENTS: dict[str, type[Struct]] = {
    "transformers": TransformersArguments,
    "simulated": SimulatedArguments,
    OPENAI: OpenAIArguments,
}
"""Engines and their arguments; the engines themselves are not imported here. Those of vLLM are its
own."""
LEAST_TEMPERATURE = 1e-3
CAPACITY_ARGUMENTS = {OPENAI: "max_concurrent", VLLM: "max_num_seqs"}
"""The argument that says how many sequences an engine takes on; `max_sequences` where none is named
here."""


def _check_teacher(topology: Topology, method: Method) -> None:
    if method.needs_teacher and topology.teacher is None:
        raise UserError(
            f"teacher: is missing; expected a section, because the method {method.name!r} needs a "
            "teacher"
        )
    of_teacher = [part for part in parts_of(topology.data.reward) if part.of_teacher]
    if of_teacher and topology.teacher is None:
        raise UserError(
            f"teacher: is missing; expected a section, because {of_teacher[0].setting}.use "
            f"{of_teacher[0].use!r} asks the teacher"
        )
    if topology.data.grader == JUDGE and topology.teacher is None:
        raise UserError(
            "teacher: is missing; expected a section, because data.grader 'judge' asks the teacher"
        )
    for one in asked_teachers(topology):
        if one.actor.count == 0:
            raise UserError(
                f"{one.actor_path}.count is 0; expected at least 1, because the run asks the "
                "teacher"
            )
    if topology.more_teachers and topology.teacher is None:
        raise UserError(
            "more_teachers: there are some, but no section teacher; expected the first one there"
        )
    if topology.more_teachers and method.needs_scores:
        raise UserError(
            f"more_teachers: expected none, because {method.name!r} learns the distribution of a "
            "single teacher"
        )


def check_engines(topology: Topology, method: Method, *, installed: bool = True) -> None:
    """Raise UserError for engines that cannot do what is asked of them. Of engines that need not be
    `installed` here neither arguments nor keys are looked up."""
    student, group = served_student(topology), topology.method.group_size
    if student.actor.count == 0:
        raise UserError("actors.rollout.count is 0; expected at least 1")
    _check_engine(student, group, "method.group_size", installed)
    if topology.data.heldout is not None:
        _check_engine(student, topology.evaluation.samples, "evaluation.samples", installed)
    size = topology.method.teacher_group_size
    for one in asked_teachers(topology):
        _check_engine(one, size, "method.teacher_group_size", installed)
        check_openai(one, topology.scheduler, topology.run, here=installed)
    if method.needs_same_vocabulary:
        _check_token_level_teacher(topology, method, installed)


def _check_token_level_teacher(topology: Topology, method: Method, installed: bool) -> None:
    """Training on a teacher's tokens, or towards its distribution, needs an engine that knows
    tokens."""
    in_the_trainer = trainer_scores(method, topology.teacher)
    for one in teachers(topology):
        if one.actor.engine == OPENAI and (method.teacher_tokens or not in_the_trainer):
            work = (
                "trains on the teacher's tokens"
                if method.teacher_tokens
                else "needs a teacher that scores tokens"
            )
            raise UserError(
                f"{one.actor_path}.engine is {OPENAI!r}; expected 'transformers' or {VLLM!r}, "
                f"because the method {method.name!r} {work}, and a server gives text alone"
            )
    if not method.needs_scores or in_the_trainer:
        return
    first = teachers(topology)[0]
    _check_engine(first, topology.method.group_size, "method.group_size", installed)
    temperature = topology.student.sampling.temperature
    if first.actor.engine == VLLM and temperature != 1.0:
        raise UserError(
            f"student.sampling.temperature is {temperature:g}; expected 1, because {VLLM!r} scores "
            "tokens at "
            "temperature 1 alone (or set teacher.scoring to colocated)"
        )


def _check_engine(served: ServedModel, group: int, group_setting: str, installed: bool) -> None:
    actor, where = served.actor, served.actor_path
    if actor.engine not in ENGINE_NAMES:
        own = extensions.load(f"{where}.engine", actor.engine, "engine", ENGINE_NAMES).value
        extensions.check_call(f"{where}.engine", actor.engine, own, ("spec",))
        return  # what it takes, and how many sequences, it says itself
    refuse_rollout(served)
    capacity = CAPACITY_ARGUMENTS.get(actor.engine, "max_sequences")
    sequences = _checked_arguments(served, installed).get(capacity, DEFAULT_SEQUENCES)
    if not isinstance(sequences, int) or isinstance(sequences, bool):
        raise UserError(
            f"{where}.engine_args.{capacity} is {sequences!r}; expected a whole number of at least "
            "1"
        )
    if sequences < group:
        raise UserError(
            f"{where}.engine_args.{capacity} is {sequences}; expected at least {group}, "
            f"the {group_setting}, because a group is sampled as a whole"
        )


def _checked_arguments(served: ServedModel, installed: bool) -> Mapping[str, Any]:
    """The arguments of an engine, defaults of ours included."""
    given, engine = served.actor.engine_args, served.actor.engine
    if engine == VLLM:
        if installed:
            check_vllm_arguments(served)
        return given
    return structs.asdict(convert_arguments(given, ENGINE_ARGUMENTS[engine], served.actor_path))


def _check_recipe(topology: Topology, method: Method) -> None:
    config, scheduler = topology.method, topology.scheduler
    if config.group_size < 2:
        raise UserError(
            "method.group_size is 1; expected at least 2, because a group of one has no advantage"
        )
    if topology.student.dtype == "float16":
        raise UserError(
            "student.dtype is 'float16'; expected 'bfloat16' or 'float32', because gradients in "
            "float16 vanish without loss scaling"
        )
    least = 1.0 + config.clip_high
    clips = config.surrogate == "clip"
    if clips and config.dual_clip is not None and config.dual_clip < least:
        raise UserError(
            f"method.dual_clip is {config.dual_clip:g}; expected null or at least {least:g}, 1 + "
            "method.clip_high, "
            "because a bound within the clip range would hold ordinary tokens"
        )
    if scheduler.rho_aug_max is not None and scheduler.rho_aug_max < scheduler.rho_aug:
        raise UserError(
            f"scheduler.rho_aug_max is {scheduler.rho_aug_max:g}; expected null or at least "
            f"{scheduler.rho_aug:g}, scheduler.rho_aug"
        )
    if config.loss_normalisation != "token" and method.needs_scores:
        raise UserError(
            f"method.loss_normalisation is {config.loss_normalisation!r}; expected 'token', "
            f"because {method.name!r} takes the mean of the divergence over all tokens"
        )
    if config.dynamic_sampling and method.needs_scores:
        raise UserError(
            f"method.dynamic_sampling is true; expected false, because {method.name!r} learns from "
            "answers that are all right or all wrong as well"
        )
    if topology.evaluation.every is not None and topology.data.heldout is None:
        raise UserError(
            f"evaluation.every is {topology.evaluation.every}; expected null, or a file in "
            "data.heldout"
        )
    if scheduler.lease_seconds <= 2 * topology.transport.heartbeat_seconds:
        raise UserError(
            f"scheduler.lease_seconds is {scheduler.lease_seconds:g}; expected more than "
            f"{2 * topology.transport.heartbeat_seconds:g}, two of transport.heartbeat_seconds"
        )
    for name in ("beta1", "beta2"):
        if getattr(topology.optimizer, name) >= 1.0:
            raise UserError(f"optimizer.{name} is 1; expected a number below 1")


def _check_sampling(topology: Topology, method: Method) -> None:
    """The loss must know the distribution that the student's responses come from, and the responses
    of a group must be able to differ."""
    sampling = topology.student.sampling
    if sampling.presence_penalty != 0.0:
        raise UserError(
            f"student.sampling.presence_penalty is {sampling.presence_penalty:g}; expected 0, "
            "because the trainer computes log-probs without a penalty"
        )
    actor, longest = topology.actors.rollout, sampling.in_training.top_k
    most = actor.engine_args.get("max_logprobs")
    if sampling.truncates and actor.engine == VLLM and isinstance(most, int) and most < longest:
        raise UserError(
            f"actors.rollout.engine_args.max_logprobs is {most}; expected at least {longest}, the "
            "tokens that one may be sampled from (student.sampling.top_k, support_limit)"
        )
    greedy = {
        "temperature is 0; expected a number above 0": sampling.temperature == 0.0,
        "top_k is 1; expected 0, or 2 and more": sampling.top_k == 1,
        "support_limit is 1; expected 2 or more": longest == 1,
        "min_p is 1; expected a number below 1": sampling.min_p == 1.0,
    }
    for words in (words for words, found in greedy.items() if found):
        raise UserError(
            f"student.sampling.{words}, because the {topology.method.group_size} responses of a "
            "group (method.group_size) would be the same, and such a group has no gradient; "
            "evaluation.sampling may be greedy"
        )


def _check_temperatures(topology: Topology, method: Method) -> None:
    for one in served_models(topology):
        check_temperature(f"{one.section}.sampling.temperature", one.model.sampling.temperature)
    teacher, evaluation = topology.teacher, topology.evaluation.sampling
    if teacher is not None:
        writing = teacher.compression_sampling.temperature
        check_temperature("teacher.compression_sampling.temperature", writing)
    if evaluation is not None:
        check_temperature("evaluation.sampling.temperature", evaluation.temperature)


def check_temperature(setting: str, temperature: float) -> None:
    """Raises UserError for one that float32 takes for 0, or that makes infinities of logits."""
    if not (temperature == 0.0 or temperature >= LEAST_TEMPERATURE):
        raise UserError(
            f"{setting} is {temperature:g}; expected 0, which is greedy, or at least "
            f"{LEAST_TEMPERATURE:g}, because logits are divided by it"
        )


def _check_names(topology: Topology, method: Method) -> None:
    get_grader(topology.data.grader)
    check_parts(parts_of(topology.data.reward))
    name = topology.run.name
    if not name or name in (".", "..") or any(character in "/\\\0" for character in name):
        raise UserError(f"run.name is {name!r}; expected a name that can be the name of a folder")


def _check_templates(topology: Topology, method: Method) -> None:
    for one in served_models(topology):
        given = one.model.chat_template_kwargs
        check_template_variables(given, f"{one.section}.chat_template_kwargs")
    if topology.teacher is not None:
        writing = topology.teacher.compression_chat_template_kwargs
        check_template_variables(writing, "teacher.compression_chat_template_kwargs")


CHECKS: tuple[Callable[[Topology, Method], None], ...] = (
    _check_names,
    _check_teacher,
    check_placement,
    _check_recipe,
    check_loss,
    _check_sampling,
    _check_temperatures,
    _check_templates,
    check_sinks,
)
