"""What a run would take on given machines: the real scheduler under a virtual clock."""

from zppo.simulation.outcome import Outcome, Step
from zppo.simulation.simulate import simulate
from zppo.simulation.world import (
    Accuracies,
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
    "Curve",
    "Engines",
    "Graders",
    "Lengths",
    "Outcome",
    "Speeds",
    "Step",
    "TrainerSpeed",
    "World",
    "simulate",
]
