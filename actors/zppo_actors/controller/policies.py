"""Which policy versions lie in shared memory, and which engine loads which (pure).

Publishing is announce-then-pull: the trainer announces a version, the controller tells each engine
to load the newest one as soon as it is not busy loading another, and a file is released once a
newer version exists and nobody reads it. Invariant: the newest version is never released, so that
an engine that joins late always finds it.
"""

from __future__ import annotations

from zppo_protocol.values import PolicyManifest


class PolicyBoard:
    def __init__(self) -> None:
        self.latest: PolicyManifest | None = None
        self._kept: dict[int, PolicyManifest] = {}
        self._loading: dict[str, int] = {}
        self._loaded: dict[str, int] = {}

    def publish(self, manifest: PolicyManifest) -> None:
        """A new version. Raises ValueError if versions go backwards."""
        if self.latest is not None and manifest.version <= self.latest.version:
            raise ValueError(
                f"policy version {manifest.version} was published after version "
                f"{self.latest.version}"
            )
        self.latest = manifest
        self._kept[manifest.version] = manifest

    def next_for(self, engine: str) -> PolicyManifest | None:
        """The version this engine should load now, once; None while it is loading or up to date."""
        if (
            self.latest is None
            or engine in self._loading
            or self._loaded.get(engine, -1) >= self.latest.version
        ):
            return None
        self._loading[engine] = self.latest.version
        return self.latest

    def loaded(self, engine: str, version: int, digest: str) -> bool:
        """An engine acknowledged. False if it loaded other bytes than were published."""
        manifest = self._kept.get(version)
        if (
            self._loading.pop(engine, None) != version
            or manifest is None
            or manifest.digest != digest
        ):
            return False
        self._loaded[engine] = version
        return True

    def forget(self, engine: str) -> None:
        """The engine is gone or starts anew."""
        self._loading.pop(engine, None)
        self._loaded.pop(engine, None)

    def release(self) -> list[int]:
        """Versions whose files may go now, each once."""
        # An engine reads the file only while it loads; afterwards it has its own copy.
        busy = set(self._loading.values())
        gone = [
            v
            for v in self._kept
            if self.latest is not None and v < self.latest.version and v not in busy
        ]
        for version in gone:
            del self._kept[version]
        return gone
