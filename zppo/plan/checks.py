"""Refusal of settings that cannot work together, before any model or machine is looked at.

Each check takes the topology and its method; each refusal names the path of the setting, its value
and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, structs

from zppo.algorithm.methods import Method
from zppo.config.topology import JUDGE, OPENAI, VLLM, ActorConfig, Topology
from zppo.errors import UserError, nearest
from zppo.grading import get_grader
from zppo.plan.engines.openai import OpenAIArguments, check_openai, refuse_rollout
from zppo.plan.engines.own import (
    DEFAULT_SEQUENCES,
    SimulatedArguments,
    TransformersArguments,
    convert_arguments,
)
from zppo.plan.engines.vllm import check_vllm_arguments
from zppo.plan.processes import teachers, trainer_scores, uses_teacher
from zppo.prompting.chat_template import check_template_variables

ENGINE_ARGUMENTS: dict[str, type[Struct]] = {
    "transformers": TransformersArguments,
    "simulated": SimulatedArguments,
    OPENAI: OpenAIArguments,
}
"""Engines and their arguments; the engines themselves are not imported here. Those of vLLM are its
own."""
CAPACITY_ARGUMENTS = {OPENAI: "max_concurrent", VLLM: "max_num_seqs"}
"""The argument that says how many sequences an engine takes on; `max_sequences` where none is named
here."""


def _check_teacher(topology: Topology, method: Method) -> None:
    if method.needs_teacher and topology.teacher is None:
        raise UserError(
            f"teacher: is missing; expected a section, because the method {method.name!r} needs a "
            "teacher"
        )
    if topology.data.grader == JUDGE and topology.teacher is None:
        raise UserError(
            "teacher: is missing; expected a section, because data.grader 'judge' asks the teacher"
        )
    for one in teachers(topology) if uses_teacher(topology) else []:
        if one.actor.count == 0:
            raise UserError(
                f"{one.where}.count is 0; expected at least 1, because the run asks the teacher"
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


def _check_engines(topology: Topology, method: Method) -> None:
    if topology.actors.rollout.count == 0:
        raise UserError("actors.rollout.count is 0; expected at least 1")
    _check_engine(
        topology.actors.rollout, "actors.rollout", topology.method.group_size, "method.group_size"
    )
    if topology.data.heldout is not None:
        samples = topology.evaluation.samples
        _check_engine(topology.actors.rollout, "actors.rollout", samples, "evaluation.samples")
    for one in teachers(topology) if uses_teacher(topology) else []:
        _check_engine(
            one.actor, one.where, topology.method.teacher_group_size, "method.teacher_group_size"
        )
        check_openai(topology, one.actor, one.where)
    if method.needs_same_vocabulary:
        _check_token_level_teacher(topology, method)


def _check_token_level_teacher(topology: Topology, method: Method) -> None:
    """Training on a teacher's tokens, or towards its distribution, needs an engine that knows
    tokens."""
    actor = topology.actors.teacher
    for one in teachers(topology):
        if one.actor.engine == OPENAI and (method.teacher_tokens or not trainer_scores(topology)):
            work = (
                "trains on the teacher's tokens"
                if method.teacher_tokens
                else "needs a teacher that scores tokens"
            )
            raise UserError(
                f"{one.where}.engine is {OPENAI!r}; expected 'transformers' or {VLLM!r}, because "
                "the method "
                f"{method.name!r} {work}, and a server gives text alone"
            )
    if not method.needs_scores or trainer_scores(topology):
        return
    _check_engine(actor, "actors.teacher", topology.method.group_size, "method.group_size")
    temperature = topology.student.sampling.temperature
    if actor.engine == VLLM and temperature not in (0.0, 1.0):
        raise UserError(
            f"student.sampling.temperature is {temperature:g}; expected 1, because {VLLM!r} scores "
            "tokens at "
            "temperature 1 alone (or set teacher.scoring to colocated)"
        )


def _check_engine(actor: ActorConfig, where: str, group: int, group_setting: str) -> None:
    if actor.engine not in (*ENGINE_ARGUMENTS, VLLM):
        hint = nearest(actor.engine, (*ENGINE_ARGUMENTS, VLLM))
        raise UserError(f"{where}.engine is {actor.engine!r}; expected the name of an engine{hint}")
    refuse_rollout(where, actor.engine)
    capacity = CAPACITY_ARGUMENTS.get(actor.engine, "max_sequences")
    sequences = _checked_arguments(actor, where).get(capacity, DEFAULT_SEQUENCES)
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


def _checked_arguments(actor: ActorConfig, where: str) -> Mapping[str, Any]:
    """The arguments of an engine, defaults of ours included."""
    if actor.engine == VLLM:
        model_where = "student.model" if where == "actors.rollout" else _model_setting(where)
        check_vllm_arguments(actor.engine_args, where, model_where)
        return actor.engine_args
    return structs.asdict(
        convert_arguments(actor.engine_args, ENGINE_ARGUMENTS[actor.engine], where)
    )


def _model_setting(where: str) -> str:
    """`actors.teacher` -> `teacher.model`, `more_teachers[0].actor` -> `more_teachers[0].model`."""
    return f"{where.removeprefix('actors.').removesuffix('.actor')}.model"


def _check_hosts(topology: Topology, method: Method) -> None:
    actors = [
        ("actors.rollout", topology.actors.rollout),
        *((one.where, one.actor) for one in teachers(topology)),
    ]
    for where, actor in actors:
        for host in actor.hosts:
            if host != "localhost":
                raise UserError(
                    f"{where}.hosts names {host!r}; this version runs on one host, 'localhost'"
                )
        if not actor.devices:
            raise UserError(
                f"{where}.devices is empty; expected at least one device, such as cpu or cuda:0"
            )


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
    if config.dual_clip is not None and config.dual_clip < least:
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
    if config.loss_normalisation == "sequence" and method.needs_scores:
        raise UserError(
            f"method.loss_normalisation is 'sequence'; expected 'token', because {method.name!r} "
            "takes the mean of the divergence over all tokens"
        )
    if config.dynamic_sampling and method.needs_scores:
        raise UserError(
            f"method.dynamic_sampling is true; expected false, because {method.name!r} learns from "
            "answers that are all right or all wrong as well"
        )
    if topology.student.sampling.presence_penalty != 0.0:
        raise UserError(
            f"student.sampling.presence_penalty is {topology.student.sampling.presence_penalty:g}; "
            "expected 0, because "
            "the trainer computes log-probs without a penalty"
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


def _check_names(topology: Topology, method: Method) -> None:
    get_grader(topology.data.grader)
    name = topology.run.name
    if not name or name in (".", "..") or any(character in "/\\\0" for character in name):
        raise UserError(f"run.name is {name!r}; expected a name that can be the name of a folder")


def _check_templates(topology: Topology, method: Method) -> None:
    check_template_variables(topology.student.chat_template_kwargs, "student.chat_template_kwargs")
    for one in teachers(topology):
        where = one.model_where.removesuffix(".model")
        check_template_variables(one.model.chat_template_kwargs, f"{where}.chat_template_kwargs")
    if topology.teacher is not None:
        writing = topology.teacher.compression_chat_template_kwargs
        check_template_variables(writing, "teacher.compression_chat_template_kwargs")


CHECKS: tuple[Callable[[Topology, Method], None], ...] = (
    _check_names,
    _check_teacher,
    _check_hosts,
    _check_engines,
    _check_recipe,
    _check_templates,
)
