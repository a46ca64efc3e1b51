"""What a calibration remembers of the topology it was measured with."""

from __future__ import annotations

import pytest
from msgspec import structs
from worlds import topology

from zppo.capacity.settings import check_settings, speed_settings
from zppo.config.topology import Topology
from zppo.errors import UserError


def with_devices(*devices: str) -> Topology:
    whole = topology()
    trainer = structs.replace(whole.actors.trainer, devices=list(devices))
    return structs.replace(whole, actors=structs.replace(whole.actors, trainer=trainer))


def test_a_trainer_of_other_devices_or_ranks_is_another() -> None:
    one, two = with_devices("cuda:0"), with_devices("cuda:0", "cuda:1")
    check_settings(speed_settings(two), two, "speeds.yaml")
    with pytest.raises(UserError) as caught:
        check_settings(speed_settings(one), two, "speeds.yaml")
    assert str(caught.value) == (
        "speeds.yaml: was measured with actors.trainer.devices ['cuda:0'], and here it is "
        "['cuda:0', 'cuda:1']; measure again with --calibrate, or name a run of this topology with "
        "--from-run"
    )
