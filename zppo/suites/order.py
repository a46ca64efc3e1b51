"""What the process that runs a suite is told; it travels as JSON on its command line."""

from __future__ import annotations

from msgspec import Struct

from zppo.suites.table import Suite


class Served(Struct, frozen=True, kw_only=True):
    """A model behind a server of the user's, or, with `folder`, one that is served for the
    suite."""

    label: str
    """The name of its column and folder."""
    model: str
    """Its name at the server."""
    base_url: str = ""
    folder: str | None = None
    fingerprint: str = ""
    """Of what lies in `folder` (`zppo.plan.fingerprint`)."""

    @property
    def identity(self) -> str:
        """What tells it from other models, whatever their labels."""
        return self.fingerprint or self.model


class Judge(Struct, frozen=True, kw_only=True):
    model: str
    base_url: str


class SuiteOrder(Struct, frozen=True, kw_only=True):
    """`harness_pythons` maps a harness to the interpreter of its environment."""

    suite: Suite
    models: list[Served]
    judge: Judge | None
    harness_pythons: dict[str, str]
    out: str
    limit: int | None
    concurrent: int
    seed: int
    timeout_seconds: float
    retry_seconds: float
    startup_seconds: float
    server_args: dict[str, str]
    templates: str | None
    baseline: str | None
