"""Where the numbers of a run go besides its own files: the section `sinks`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, field

from zppo.config.base import Config, Seconds

Port: TypeAlias = Annotated[int, Meta(ge=1, le=65_535)]
Filled: TypeAlias = Annotated[str, Meta(min_length=1)]
Tool: TypeAlias = Literal["trl", "verl", "prime_rl"]
"""Systems whose names for the same quantities are known (`zppo.records.aliases`)."""


class WandbConfig(Config, frozen=True, kw_only=True):
    project: Filled = "zppo"
    """project of the run"""
    entity: str | None = None
    """team or user; null: the default one of the account"""
    mode: Literal["online", "offline"] = "online"
    """offline: files in RUN/sinks/wandb, for wandb sync"""


class TrackioConfig(Config, frozen=True, kw_only=True):
    project: Filled = "zppo"
    """project of the run, kept on this machine"""


class MlflowConfig(Config, frozen=True, kw_only=True):
    experiment: Filled = "zppo"
    """experiment of the run"""
    tracking_uri: str | None = None
    """server or folder; null: RUN/sinks/mlflow, for mlflow ui --backend-store-uri"""


class PrometheusConfig(Config, frozen=True, kw_only=True):
    port: Port = 9400
    """port on the loopback interface, 127.0.0.1"""


class OwnSink(Config, frozen=True, kw_only=True):
    use: Filled
    """./file.py:name, package.module:name, or a name that an installed package announces"""
    args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments"""


class SinksConfig(Config, frozen=True, kw_only=True):
    tensorboard: bool = True
    """TensorBoard event files in tensorboard/"""
    rollouts: bool = True
    """every response with its prompt and reward in rollouts/*.parquet"""
    wandb: WandbConfig | None = None
    """Weights & Biases, {project, entity, mode}; null: off (docs/metrics.md)"""
    trackio: TrackioConfig | None = None
    """trackio, {project}; null: off"""
    mlflow: MlflowConfig | None = None
    """MLflow, {experiment, tracking_uri}; null: off"""
    prometheus: PrometheusConfig | None = None
    """metrics of the last step at http://127.0.0.1:PORT/metrics, {port}; null: off"""
    use: list[OwnSink] = field(default_factory=list)
    """sinks of your own, each {use: ./file.py:name, args} (docs/extending.md)"""
    aliases: list[Tool] = field(default_factory=lambda: ["trl", "verl"])
    """these tools' names for the same quantities go to all sinks as well; [] for ours alone"""
    close_seconds: Seconds = 20.0
    """so long the end of a run waits for sinks that have not taken everything (at most half of
    scheduler.lease_seconds)"""
