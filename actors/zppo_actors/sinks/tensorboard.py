"""Scalars through TensorBoard's own event writer, which needs neither torch nor TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping

from zppo_actors.sinks.base import Event, RunInfo


class TensorBoardSink:
    """Event files in `tensorboard/` of the run directory."""

    once = False

    def open(self, run: RunInfo) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = event_pb2
        self._writer = EventFileWriter(str(run.directory / "tensorboard"))
        # A START record makes TensorBoard purge what earlier files say of steps from here on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=run.start, session_log=start)
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(
            self._events.Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        )
        self._writer.flush()  # so that a killed process loses no step

    def event(self, event: Event) -> None:
        """TensorBoard shows scalars alone."""

    def close(self) -> None:
        self._writer.close()
