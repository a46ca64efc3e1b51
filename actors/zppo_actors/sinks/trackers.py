"""Experiment trackers: Weights & Biases, trackio, MLflow. Their packages are extras, imported when
the sink opens.

Each goes on with the same run of the tracker after a resume, found by `RunInfo.id`. None of them
can take back a step, so each is given a step once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from zppo.config.sinks import MlflowConfig, TrackioConfig, WandbConfig
from zppo_actors.sinks.base import Event, RunInfo

ADVICE = "advice"
"""The event that says what `zppo doctor` has found."""


class WandbSink:
    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def open(self, run: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            id=run.id,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            # The run's own log and nothing of this machine; no question on a terminal.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
            ),
        )
        # Evaluations come between steps; W&B's own count of steps cannot go back.
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def event(self, event: Event) -> None:
        if event.event == ADVICE:
            self._run.alert(title=event.event, text=event.detail)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()


class TrackioSink:
    def __init__(self, config: TrackioConfig) -> None:
        self._config = config

    def open(self, run: RunInfo) -> None:
        import trackio

        self._run = trackio.init(
            project=self._config.project,
            name=f"{run.name}-{run.id}",
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def event(self, event: Event) -> None:
        """Advice is in the view, the log and the report."""

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """`run_id` in the sink's folder names the run; MLflow makes its ids itself."""

    LONGEST_VALUE = 500
    MOST_VALUES = 100
    """What MLflow takes of one parameter, and of one request."""

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config

    def open(self, run: RunInfo) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        local = f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=self._config.tracking_uri or local)
        known = run.folder / "run_id"
        if known.exists():
            self._id = known.read_text()
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(run)
            known.write_text(self._id)

    def _create(self, run: RunInfo) -> str:
        from mlflow.entities import Param

        name = self._config.experiment
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        made: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        settings = [Param(n, str(v)[: self.LONGEST_VALUE]) for n, v in leaves(run.settings)]
        for first in range(0, len(settings), self.MOST_VALUES):
            self._client.log_batch(made, params=settings[first : first + self.MOST_VALUES])
        return made

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def event(self, event: Event) -> None:
        if event.event == ADVICE:
            self._client.set_tag(self._id, ADVICE, event.detail)

    def close(self) -> None:
        self._client.set_terminated(self._id, status="FINISHED")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything below; a list is one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
