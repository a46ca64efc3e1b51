"""How much a run writes into its directory: an estimate that is made before anything starts.

A checkpoint holds the weights and AdamW's two moments, parameters · width + trained parameters ·
2 · state width. One more than `checkpoints.keep` of them lie there at once, because the oldest goes
when the newest is whole. What else a run writes (the journal, metrics, logs) is small beside
these.
"""

from __future__ import annotations

from msgspec import Struct

from zppo.config.topology import DTYPE_BYTES, Topology
from zppo.plan.memory import trained_parameters
from zppo.plan.model_folder import ModelFacts

TOKEN_BYTES = 1
"""A token is about four characters, of which the rollout store's compression keeps a quarter."""
ROW_BYTES = 64
"""What a rollout takes beside its response. (Two steps of the quickstart come to 40 bytes a
row, with responses of seven tokens.)"""


class DiskNeed(Struct, frozen=True, kw_only=True):
    """Bytes of one checkpoint, how many of them lie there at once, and bytes of all rollouts."""

    checkpoint: int
    checkpoints: int
    rollouts: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.rollouts


def disk_need(topology: Topology, student: ModelFacts, responses: int) -> DiskNeed:
    """What a run writes that samples `responses` of the student, each of full length. The few of
    its teachers are not counted."""
    states = 2 * DTYPE_BYTES[topology.optimizer.state_dtype]
    row = topology.student.sampling.max_new_tokens * TOKEN_BYTES + ROW_BYTES
    return DiskNeed(
        checkpoint=student.parameters * DTYPE_BYTES[topology.student.dtype]
        + trained_parameters(topology.student, student) * states,
        checkpoints=topology.checkpoints.keep + 1,
        rollouts=responses * row if topology.sinks.rollouts else 0,
    )
