"""What an attempt of the controller begins with."""

from __future__ import annotations

import msgspec
from worlds import topology

from zppo.plan.memory import Models
from zppo.plan.model_folder import ModelFacts
from zppo.scheduling.admission import Bounds
from zppo_actors.controller.restore import bounds_of

FACTS = ModelFacts(
    parameters=1, context=64, hidden=8, layers=1, kv_heads=1, head_dim=8, vocabulary=50
)


def test_bounds_are_those_of_the_models_that_are_read() -> None:
    padded = msgspec.structs.replace(FACTS, vocabulary=64, context=32)
    models = Models(by_pool={"rollout": FACTS, "teacher": padded})
    zppo = bounds_of(topology(method={"name": "zppo"}), models)
    assert zppo == {
        "rollout": Bounds(vocabulary=50, context=64, trained=True),
        "teacher": Bounds(vocabulary=64, context=32),
    }
    trained = bounds_of(topology(method={"name": "off_distill"}), models)
    assert trained["teacher"] == Bounds(vocabulary=64, context=32, trained=True)
    served = topology(actors={"teacher": {"engine": "openai"}, "rollout": {"engine": "simulated"}})
    assert bounds_of(served, Models(by_pool={"rollout": FACTS})) == {
        "rollout": Bounds(vocabulary=50, trained=True),
        "teacher": Bounds(),
    }
