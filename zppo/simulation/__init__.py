"""What a run would take on given machines: the real scheduler under a virtual clock."""

from zppo.simulation.outcome import Outcome, Step
from zppo.simulation.simulate import OutOfTime, simulate, warm_steps
from zppo.simulation.world import (
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

__all__ = [
    "Accuracies",
    "Calibration",
    "Curve",
    "Engines",
    "Graders",
    "Lengths",
    "OutOfTime",
    "Outcome",
    "Speeds",
    "Step",
    "TrainerSpeed",
    "World",
    "simulate",
    "warm_steps",
]
