"""Which samples are thrown away because the trainer died on them more than once."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from zppo.config.topology import Batches


class Redraws(Struct, frozen=True):
    """`steps`: how often the samples of a step have been thrown away. With filled batches they may
    be of any window, so all samples that are not trained yet go with them."""

    steps: Mapping[int, int]
    batches: Batches

    def concern(self, window: int, trained: int) -> bool:
        """Whether a window loses its samples when a run goes on after `trained` steps."""
        if self.batches == "windows":
            return window in self.steps
        return any(step >= trained for step in self.steps)

    def times(self, window: int) -> int:
        """How often what is sampled for a window has been thrown away."""
        if self.batches == "windows":
            return self.steps.get(window, 0)
        return sum(self.steps.values())
