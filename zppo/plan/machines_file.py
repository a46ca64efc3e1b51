"""`--machines FILE`: a cluster, models and a corpus as a file describes them, for a plan that looks
at nothing on this machine.

    hosts:                             # by their names in cluster.hosts, or localhost
      node-0: {cards: 8, card_gib: 79, memory_gib: 1900, cores: 112, disk_gib: 2000}
    models:                            # by their paths in the topology
      models/student: {config: {…}, tensors: {BF16: 9409813744}}   # numbers stored in each dtype
      models/teacher: {folder: described/teacher}   # config.json and model.safetensors.index.json
    questions: 77000                   # rows of data.train

What the file says of a host counts before what `cluster.hosts` says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field, structs

from zppo.algorithm.methods import get_method
from zppo.config.base import Config, NonNegative, Positive
from zppo.config.cluster import LOCALHOST, HostConfig
from zppo.config.explain import explain
from zppo.config.strict_yaml import parse
from zppo.config.topology import Topology
from zppo.errors import UserError, nearest
from zppo.plan.architecture import refuse_no_decoder
from zppo.plan.machine import Machine, described
from zppo.plan.make import make_plan
from zppo.plan.memory import Models, inspect_models
from zppo.plan.model_folder import (
    INDEX,
    ModelFacts,
    facts_of,
    read_json,
    settings_of_their_kind,
)
from zppo.plan.picture_checks import check_tower
from zppo.plan.placement import check_cards_known, check_placement, used_hosts
from zppo.plan.plan import Plan
from zppo.plan.processes import host_name

OPTION = "--machines"
WIDTHS = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
"""Bytes of a number, by the names that safetensors has for dtypes."""
TORCH_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
NEEDED = ("cards", "memory_gib", "cores")


class DescribedModel(Config, frozen=True, kw_only=True):
    """`config` is what config.json says; `folder` has it, and the index of the weights. So many of
    its numbers are the `tower`'s, which sees pictures."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Positive] = field(default_factory=dict)
    folder: str | None = None
    tower: NonNegative = 0


class MachinesFile(Config, frozen=True, kw_only=True):
    """What `--machines` names. `questions` and `heldout` are rows of the topology's two sources."""

    hosts: dict[str, HostConfig]
    models: dict[str, DescribedModel] = field(default_factory=dict)
    questions: Positive
    heldout: NonNegative = 0


def read_machines(path: Path) -> MachinesFile:
    """Read the file; folders in it are taken from its own. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{OPTION}: cannot read {str(path)!r}: {reason}") from None
    document = parse(text, str(path))
    data = {} if document.data is None else document.data
    try:
        found = msgspec.convert(data, MachinesFile)
    except msgspec.ValidationError as error:
        mistake = explain(str(error), data, MachinesFile)
        line = document.lines.get(mistake.path)
        raise UserError(f"{path}{f':{line}' if line else ''}: {mistake.sentence}") from None
    for name, model in found.models.items():
        _check_model(f"{path}: models.{name}", model)
    base = path.absolute().parent
    models = {
        name: structs.replace(one, folder=one.folder and str(base / one.folder))
        for name, one in found.models.items()
    }
    return structs.replace(found, models=models)


class Described(Struct, frozen=True, kw_only=True):
    """A topology on described machines. `base` is where its relative paths are taken from."""

    topology: Topology
    machines: MachinesFile
    file: Path
    base: Path

    @classmethod
    def of(cls, topology: Topology, file: Path, base: Path) -> Described:
        """Raises UserError for a file that is no description, or lacks what a host has."""
        machines = read_machines(file)
        placed = with_hosts(topology, machines, file)
        return cls(topology=placed, machines=machines, file=file, base=base.absolute())

    def plan(self, topology: Topology | None = None) -> Plan:
        """The plan of the topology, or of a variant of it. Raises UserError."""
        asked = topology or self.topology
        models = described_models(asked, self.machines, self.file, self.base)
        check_tower(asked, pictured=True)  # whether questions have pictures is not known
        first = first_machine(asked, self.machines)
        plan = make_plan(asked, self.machines.questions, first, models)
        note = (
            f"planned for the machines, models and {self.machines.questions:,} questions that "
            f"{self.file.name} describes; questions, prompts and servers were not looked at"
        )
        return structs.replace(plan, notes=[*plan.notes, note])


def with_hosts(topology: Topology, machines: MachinesFile, file: Path) -> Topology:
    """The topology with what the file says of its hosts. Raises UserError where it cannot be laid
    out, and for a host that runs a process and of which cards, memory or cores are not known."""
    known = dict(topology.cluster.hosts)
    for name, facts in machines.hosts.items():
        if name in known:
            said = {key: value for key, value in structs.asdict(facts).items() if value is not None}
            known[name] = structs.replace(known[name], **said)
        check_cards_known(f"{file}: hosts.{name}", known.get(name, facts))
    topology = structs.replace(topology, cluster=structs.replace(topology.cluster, hosts=known))
    check_placement(topology, get_method(topology.method.name))
    for name in used_hosts(topology):
        said_of = known.get(name) or machines.hosts.get(name)
        lacking = [one for one in NEEDED if said_of is None or getattr(said_of, one) is None]
        if lacking and name not in machines.hosts:
            raise UserError(
                f"{file}: hosts.{name} is missing; expected what it has, because the topology "
                f"places processes there{nearest(name, machines.hosts)}"
            )
        if lacking:
            raise UserError(f"{file}: hosts.{name}.{lacking[0]} is missing; expected a number")
    return topology


def first_facts(topology: Topology, machines: MachinesFile) -> HostConfig | None:
    """What is said of the controller's host."""
    first = host_name(topology, LOCALHOST)
    return topology.cluster.hosts.get(first) or machines.hosts.get(first)


def first_machine(topology: Topology, machines: MachinesFile) -> Machine:
    """The controller's host; `with_hosts` has seen to it that it is described."""
    return described(first_facts(topology, machines) or HostConfig())


def described_models(topology: Topology, machines: MachinesFile, file: Path, base: Path) -> Models:
    """The models of the topology, whose relative paths are taken from `base`, as the file describes
    them. Raises UserError."""
    by_path: dict[Path, tuple[str, DescribedModel]] = {}
    for name, one in machines.models.items():
        other, _ = by_path.setdefault(_named(name, file, base), (name, one))
        if other != name:
            raise UserError(f"{file}: models has {other!r} and {name!r}, which are one path")

    def inspect(folder: Path, where: str) -> ModelFacts:
        found = by_path.get(folder.resolve())
        if found is None:
            shown = str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)
            hint = nearest(shown, machines.models)
            raise UserError(f"{file}: models has no {shown!r}, which {where} names{hint}")
        name, one = found
        return _facts(one, folder, f"{file}: models.{name}")

    return inspect_models(topology, inspect)


def _named(name: str, file: Path, base: Path) -> Path:
    try:
        return (base / Path(name).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{file}: models has {name!r}, which is no path ({error})") from None


def _check_model(where: str, model: DescribedModel) -> None:
    if (model.folder is None) == (not model.config):
        raise UserError(f"{where}: expected config and tensors, or folder")
    if model.folder is None and not model.tensors:
        raise UserError(
            f"{where}: tensors is missing; expected whole numbers by dtype, as {{BF16: 2213241664}}"
        )
    for dtype in model.tensors:
        if dtype not in WIDTHS:
            raise UserError(
                f"{where}.tensors has the dtype {dtype!r}; expected a name of safetensors"
                f"{nearest(dtype, WIDTHS)}"
            )


def _facts(model: DescribedModel, named: Path, where: str) -> ModelFacts:
    # What is described has no folder: mistakes are in the file's own `config`.
    folder = Path() if model.folder is None else Path(model.folder)
    with settings_of_their_kind(folder, where):
        if model.folder is None:
            config = model.config
            parameters = sum(model.tensors.values())
            stored = sum(count * WIDTHS[dtype] for dtype, count in model.tensors.items())
        else:
            config = read_json(folder / "config.json", where)
            parameters, stored = _indexed(folder, config, where)
        refuse_no_decoder(config, named, where)
        if model.tower > parameters:
            raise UserError(
                f"{where}.tower is {model.tower}; expected at most {parameters}, all of its numbers"
            )
        return facts_of(config, parameters, stored, folder, where, model.tower)


def _indexed(folder: Path, config: dict[str, Any], where: str) -> tuple[int, int]:
    """Numbers and bytes of all weights, by the index alone. An index of transformers 5 says both;
    an older one only bytes, which are then all of the config's dtype."""
    metadata = read_json(folder / INDEX, where).get("metadata")
    said = metadata if isinstance(metadata, dict) else {}
    stored, parameters = said.get("total_size"), said.get("total_parameters")
    if not isinstance(stored, int):
        raise UserError(f"{where}: {str(folder / INDEX)!r} has no metadata.total_size")
    if isinstance(parameters, int):
        return parameters, stored
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return stored // TORCH_WIDTHS.get(dtype, 2), stored
