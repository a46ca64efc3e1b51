"""Which policy versions lie where, and who loads which (pure).

Publishing is announce-then-pull: the trainer announces a version, the controller tells each engine
to load the newest one of its host as soon as it is not busy loading another. On the trainer's host
that is what was published; to any other host a *carrier*, an actor of its own, brings the versions,
and says when one lies there whole. A file is released, host by host, once a newer version lies
there and nobody reads it.

Invariants: no engine hears of a version that its host does not have, so that what the scheduler
knows of loaded versions stays true however long a transfer takes; the newest version of a host is
never released, so that an engine that joins late always finds it; and a carrier that is behind
finishes what it began, unless nothing may be sampled with it any more. It then skips to the newest
version, so no host starves because versions come faster than they travel; only where one takes
longer than `max_staleness` + 1 steps there is never one of use.
"""

from __future__ import annotations

from collections.abc import Mapping

from zppo_protocol.values import PolicyManifest

HOME = ""
"""Where the trainer publishes."""


class PolicyBoard:
    def __init__(self, carriers: Mapping[str, str] | None = None, max_staleness: int = 0) -> None:
        """`carriers`: engine -> the actor that brings weights to its host; an engine that is not in
        it is on the trainer's host. A version more than `max_staleness` behind is of no use."""
        self._carrier_of = dict(carriers or {})
        self.carriers = frozenset(self._carrier_of.values())
        self._bound = max_staleness
        self.latest: PolicyManifest | None = None
        self._held: dict[str, dict[int, PolicyManifest]] = {
            place: {} for place in (HOME, *sorted(self.carriers))
        }
        """Place -> versions whose files may lie there. A carrier that dies leaves its files."""
        self._freed: dict[str, list[int]] = {}
        """Carrier -> versions that it was told to remove the last time."""
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
        self._held[HOME][manifest.version] = manifest

    def next_for(self, reader: str) -> PolicyManifest | None:
        """The version this engine should load now, or this carrier fetch, once; None while it is at
        it or up to date."""
        newest = self._newest(self._carrier_of.get(reader, HOME))
        if (
            newest is None
            or self._is_busy(reader, newest.version)
            or self._loaded.get(reader, -1) >= newest.version
        ):
            return None
        self._loading[reader] = newest.version
        if reader in self.carriers:
            self._held[reader][newest.version] = newest
        return newest

    def loaded(self, reader: str, version: int, digest: str) -> bool:
        """An engine or a carrier acknowledged. False if it has other bytes than were published, or
        a version that it was not told to load."""
        place = reader if reader in self.carriers else self._carrier_of.get(reader, HOME)
        manifest, told = self._held[place].get(version), self._loading.get(reader)
        # Whoever was told twice, of a newer version or because it had been forgotten meanwhile,
        # answers twice, and the version of the first answer may be gone by then.
        late = self._loaded.get(reader) == version if told is None else version < told
        right = late if manifest is None else manifest.digest == digest
        if not (right and (late or version == told)):
            self._loading.pop(reader, None)
            return False
        if version == told:
            del self._loading[reader]
        self._loaded[reader] = version
        return True

    def forget(self, reader: str) -> None:
        """The engine or carrier is gone or starts anew."""
        self._loading.pop(reader, None)
        self._loaded.pop(reader, None)

    def release(self) -> list[tuple[str, int]]:
        """Places, `HOME` or a carrier, and the versions whose files may go there now. A carrier is
        told of each twice, because what is on its way to another host can be lost."""
        gone = []
        for place, held in self._held.items():
            newest = self._newest(place)
            if newest is None:
                continue
            # Who loads reads the file only so long; afterwards an engine has its own copy.
            busy = {v for reader, v in self._loading.items() if self._reads_at(reader, place)}
            old = [v for v in held if v < newest.version and v not in busy]
            for version in old:
                del held[version]
            if old and place != HOME:
                old, self._freed[place] = [*self._freed.get(place, []), *old], old
            gone += [(place, version) for version in old]
        return gone

    def waiting(self) -> list[str]:
        """Which hosts wait for weights, one line each."""
        return [
            f"{carrier} brings policy version {self._loading[carrier]} to its host"
            for carrier in sorted(self.carriers)
            if carrier in self._loading
        ]

    def _newest(self, place: str) -> PolicyManifest | None:
        if place == HOME:
            return self.latest
        return self._held[place].get(self._loaded.get(place, -1))

    def _is_busy(self, reader: str, newest: int) -> bool:
        told = self._loading.get(reader)
        if told is None:
            return False
        return reader not in self.carriers or told >= newest - self._bound

    def _reads_at(self, reader: str, place: str) -> bool:
        return self._carrier_of.get(reader, HOME) == place
