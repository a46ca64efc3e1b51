"""The settings that machines' speeds and questions' lengths depend on, as a calibration remembers
them: a file measured for other models or engines is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zppo.config.served import served_student
from zppo.config.topology import Topology
from zppo.errors import UserError
from zppo.plan.processes import asked_teachers


def speed_settings(topology: Topology) -> dict[str, Any]:
    """Setting -> its value. How many engines and graders there are is none of them; how many ranks
    the trainer has is."""
    trainer, method = topology.actors.trainer, topology.method
    found: dict[str, Any] = {
        "method.name": method.name,
        "method.updates_per_step": method.updates_per_step,
        "actors.trainer.devices": trainer.rank_devices,
        "actors.trainer.micro_batch_tokens": trainer.micro_batch_tokens,
        "actors.trainer.gradient_checkpointing": trainer.gradient_checkpointing,
    }
    for one in [served_student(topology), *asked_teachers(topology)]:
        found |= {
            one.model_path: one.model.model,
            f"{one.section}.dtype": one.model.dtype,
            f"{one.section}.sampling.max_new_tokens": one.model.sampling.max_new_tokens,
            f"{one.actor_path}.engine": one.actor.engine,
            f"{one.actor_path}.engine_args": one.actor.engine_args,
        }
    return found


def check_settings(measured: Mapping[str, Any], topology: Topology, source: str) -> None:
    """Raises UserError where `source` was measured with other settings; one written by hand does
    not say any."""
    for name, value in speed_settings(topology).items():
        before = measured.get(name, value)
        if before != value:
            raise UserError(
                f"{source}: was measured with {name} {before!r}, and here it is {value!r}; measure "
                "again with --calibrate, or name a run of this topology with --from-run"
            )
