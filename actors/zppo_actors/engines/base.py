"""The one interface every engine offers to its actor, what it is built from, and the error it may
raise; no torch.

An engine samples groups from token prompts (token-in/token-out), says what its model would have
written in the place of given tokens, takes new weights while it samples, and says how much it can
take on. It knows nothing of windows, questions or sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from zppo.config.served import ServedModel
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import PolicyManifest


class EngineError(RuntimeError):
    """This task cannot be done. `retryable` is false when any other try must fail as well (e.g.
    prompt too long)."""

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine to build: the model with its settings, and the device that this process has of
    them."""

    served: ServedModel
    device: str = "cpu"


class Engine(Protocol):
    """All methods may be called from one asyncio loop; calls of `generate` and `score` overlap
    freely."""

    @property
    def capacity(self) -> int:
        """How many sequences the engine samples at once; the actor grants this many credits."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that sample the next token; FROZEN for a model without updates (a
        teacher)."""

    @property
    def progress(self) -> int:
        """Tokens sampled or scored so far; rises while the engine is alive and has work."""

    @property
    def broken(self) -> str | None:
        """Why the engine cannot go on at all, so that its process must end; None while it works."""

    async def generate(
        self, task: GenerateTask, finished: Callable[[int], None] | None = None
    ) -> GroupSamples:
        """Sample `task.n` completions. Raises EngineError.

        `finished(k)` is called in the caller's loop when k more sequences have ended, so that their
        room can be given away before the last one of the group is done. An engine that cannot tell
        need not call it.
        """

    async def score(self, task: ScoreTask) -> TokenScores:
        """The model's `task.top_k` most probable tokens at each token of given responses. Raises
        EngineError."""

    async def load_policy(self, manifest: PolicyManifest) -> str:
        """Load new weights between two tokens, keep running sequences, and return the digest of
        what was loaded.

        Raises PublicationRefused (old weights stay) if the file, its names, shapes, dtypes or
        digest do not match, and EngineError for an engine that is broken.
        """

    async def close(self) -> None:
        """Stop sampling and free the device."""
