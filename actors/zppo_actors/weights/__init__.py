"""How a policy version gets from the trainer into the engines."""

from __future__ import annotations

from zppo_protocol.values import PolicyManifest


class PublicationRefused(RuntimeError):
    """A published policy version cannot be loaded; the old weights keep serving."""

    def __init__(self, manifest: PolicyManifest, reason: object) -> None:
        super().__init__(
            f"policy version {manifest.version} ({manifest.path}) is refused: {reason}"
        )


class NotFinite(ValueError):
    """A tensor that was to be published holds NaN or infinity; nothing was published."""

    def __init__(self, name: str) -> None:
        super().__init__(f"tensor {name!r} holds values that are not finite")
