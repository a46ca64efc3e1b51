"""From a YAML file and `--set path=value` to a checked `Topology`; every mistake becomes one
sentence.

A sentence names the place (file and line, or the `--set`), the path of the setting, the value, what
was expected, and the nearest valid name. What spans several settings is checked in
`zppo.plan.make`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as shape
from msgspec.structs import replace

from zppo.config.counterparts import hint_for
from zppo.config.explain import explain, nearest_setting, settings, step
from zppo.config.paths import absolute, absolute_use
from zppo.config.presets import with_preset
from zppo.config.rewards import RewardConfig
from zppo.config.sinks import SinksConfig
from zppo.config.strict_yaml import parse
from zppo.config.topology import (
    OPENAI,
    ActorConfig,
    MoreTeacher,
    Topology,
    is_own_source,
    is_procedural,
)
from zppo.errors import UserError, nearest

RUN_FILES_ROOM = 256
"""Bytes of a path that the files within a run directory may take."""


def load(path: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read the topology in `path`, apply `overrides` (`path=value`), and resolve relative paths
    against its folder.

    Raises UserError.
    """
    name = str(path)
    document = parse(_read(path), name)
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise UserError(
            f"{name}:1: expected a mapping of sections{nearest('', Topology.__struct_fields__)}"
        )
    places = {place: f"{name}:{line}" for place, line in document.lines.items()}
    places[""] = name
    for override in overrides:
        _apply(override, data, places)
    topology = convert(data, places)
    _refuse_both_rules(topology, places)
    return resolve(topology, path.absolute().parent)


def override(topology: Topology, overrides: Sequence[str]) -> Topology:
    """Apply `overrides` to the topology of an existing run. Raises UserError."""
    data: dict[str, Any] = msgspec.to_builtins(topology)
    places = {"": "run.json"}
    for text in overrides:
        _apply(text, data, places)
    return convert(data, places)


def resolve(topology: Topology, base: Path) -> Topology:
    """The same topology with absolute paths; relative ones are taken from `base`, `~` is the home
    folder.

    The model of a teacher behind a server is a name, not a path.
    """
    data, teacher, actors = topology.data, topology.teacher, topology.actors
    if teacher is not None and actors.teacher.engine != OPENAI:
        teacher = replace(teacher, model=_absolute("teacher.model", teacher.model, base))
    others = [
        _resolved_teacher(f"more_teachers[{i}]", one, base)
        for i, one in enumerate(topology.more_teachers)
    ]
    data = replace(
        data,
        train=_question_source("data.train", data.train, base),
        heldout=None
        if data.heldout is None
        else _question_source("data.heldout", data.heldout, base),
        media_folder=_optional("data.media_folder", data.media_folder, base),
        templates=_optional("data.templates", data.templates, base),
        reward=[
            _resolved_reward(f"data.reward[{i}]", entry, base)
            for i, entry in enumerate(data.reward)
        ],
    )
    return replace(
        topology,
        data=data,
        method=replace(
            topology.method, name=absolute_use("method.name", topology.method.name, base)
        ),
        student=replace(
            topology.student, model=_absolute("student.model", topology.student.model, base)
        ),
        teacher=teacher,
        more_teachers=others,
        sinks=_with_own_sinks(topology.sinks, base),
        actors=replace(
            actors,
            rollout=_resolved_actor("actors.rollout", actors.rollout, base),
            teacher=_resolved_actor("actors.teacher", actors.teacher, base),
        ),
    )


def refuse_other_folder(overrides: Sequence[str], topology: Topology, named: Path) -> None:
    """Raise UserError where a `run.directory` among the overrides of `topology` is not the folder
    `named` of a run that goes on: it does so where it is."""
    for setting, _, value in (text.partition("=") for text in overrides):
        if setting == "run.directory" and run_folder(topology).resolve() != named.resolve():
            raise UserError(
                f"--set run.directory={value}: the run goes on in {str(named)!r}, which --resume "
                "names; expected no other directory (move the run's before, and name it there)"
            )


def run_folder(topology: Topology) -> Path:
    """`run.directory` with `{name}` filled in, relative to the current folder. Raises UserError for
    a path that cannot be."""
    chosen = topology.run.directory.replace("{name}", topology.run.name)
    return absolute("run.directory", chosen, Path(), RUN_FILES_ROOM)


def convert(data: dict[str, Any], places: Mapping[str, str]) -> Topology:
    """Check plain data against the configuration, after its preset has filled in what it does not
    say. `places` says where each dotted path stands. Raises UserError."""
    data = with_preset(data)
    try:
        return msgspec.convert(data, Topology)
    except msgspec.ValidationError as error:
        mistake = explain(str(error), data, Topology)
        raise UserError(f"{_place(mistake.path, places)}: {mistake.sentence}") from None


def setting_names() -> Iterator[str]:
    """Dotted paths of all settings, sections included, in the order of the configuration."""
    return settings(shape.type_info(Topology))


def _refuse_both_rules(topology: Topology, places: Mapping[str, str]) -> None:
    """The grader has a default, so only what was written tells that somebody asked for it."""
    if topology.data.reward and "data.grader" in places:
        raise UserError(
            f"{places['data.grader']}: data.grader is {topology.data.grader!r} where data.reward "
            "says what a response earns; expected one of the two"
        )


# ---- overrides -----------------------------------------------------------------------------------


def _apply(override: str, data: dict[str, Any], places: dict[str, str]) -> None:
    """Set one `path=value` in `data`; the value is read as YAML."""
    place = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{place}: expected path=value, for example run.steps=100")
    keys = path.split(".")
    _check_path(keys, place)
    value = parse(text, place).data
    section = data
    for key in keys[:-1]:
        inner = section.get(key)
        section[key] = inner if isinstance(inner, dict) else {}
        section = section[key]
    section[keys[-1]] = value
    for known in [known for known in places if known.startswith(f"{path}.")]:
        del places[known]
    places[path] = place


def _check_path(keys: list[str], place: str) -> None:
    node: shape.Type = shape.type_info(Topology)
    for depth, key in enumerate(keys):
        inner = step(node, key)
        if inner is None:
            whole = hint_for(".".join(keys)) if len(keys) > 1 else None
            hint = whole or nearest_setting(key, node, shape.type_info(Topology))
            raise UserError(f"{place}: there is no setting {'.'.join(keys[: depth + 1])}{hint}")
        node = inner


# ---- places --------------------------------------------------------------------------------------


def _place(path: str, places: Mapping[str, str]) -> str:
    """The place of the path, or of the nearest section above it that has one."""
    while path and path not in places:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return places[path]


# ---- paths ---------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [file.name for file in folder.glob("*.y*ml")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        raise UserError(
            f"{path}: there is no such topology{nearest(path.name, close) if close else ''}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start + 1})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _absolute(setting: str, path: str, base: Path) -> str:
    return str(absolute(setting, path, base))


def _optional(setting: str, path: str | None, base: Path) -> str | None:
    return None if path is None else _absolute(setting, path, base)


def _question_source(setting: str, source: str, base: Path) -> str:
    """Procedural questions have a specification instead of a path, and code an import path."""
    if is_own_source(source):
        return absolute_use(setting, source, base)
    return source if is_procedural(source) else _absolute(setting, source, base)


def _resolved_reward(section: str, entry: RewardConfig, base: Path) -> RewardConfig:
    """Its own code, and the extractor of a rule, may lie beside the topology."""
    args, extractor = entry.args, entry.args.get("extractor")
    if isinstance(extractor, str):
        args = {**args, "extractor": absolute_use(f"{section}.args.extractor", extractor, base)}
    return replace(entry, use=absolute_use(f"{section}.use", entry.use, base), args=args)


def _resolved_teacher(section: str, teacher: MoreTeacher, base: Path) -> MoreTeacher:
    teacher = replace(teacher, actor=_resolved_actor(f"{section}.actor", teacher.actor, base))
    if teacher.actor.engine == OPENAI:
        return teacher
    return replace(teacher, model=_absolute(f"{section}.model", teacher.model, base))


def _with_own_sinks(sinks: SinksConfig, base: Path) -> SinksConfig:
    own = [
        replace(one, use=absolute_use(f"sinks.use[{i}].use", one.use, base))
        for i, one in enumerate(sinks.use)
    ]
    return replace(sinks, use=own)


def _resolved_actor(section: str, config: ActorConfig, base: Path) -> ActorConfig:
    """An engine of the user's own, and the simulated engine's script, may lie beside the
    topology."""
    config = replace(config, engine=absolute_use(f"{section}.engine", config.engine, base))
    script = config.engine_args.get("script")
    if not isinstance(script, str):
        return config
    script = _absolute(f"{section}.engine_args.script", script, base)
    return replace(config, engine_args={**config.engine_args, "script": script})
