"""The metrics of the last step for a Prometheus server on this machine, in its text format 0.0.4.

Only the loopback interface is listened on, and only `/metrics` is answered. Nothing is kept, so a
resumed run has nothing to take back.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zppo.config.sinks import PrometheusConfig
from zppo.plan.sinks import HOST
from zppo_actors.sinks.base import Event, RunInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


MOST_CONNECTIONS = 16
"""At once; others are closed. Each takes a thread and a file of the controller, and whoever has an
account on this machine may connect."""


class _Server(ThreadingHTTPServer):
    """A server that bears so many connections and no more."""

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no thread for it
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class PrometheusSink:
    once = False

    def __init__(self, config: PrometheusConfig) -> None:
        self._config = config
        self._values: dict[str, float] = {}
        self._events: Counter[str] = Counter()
        self._page = b""

    def open(self, run: RunInfo) -> None:
        self._run = run.name
        sink = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                body = sink._page if found else b"expected /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """The log is the run's."""

        self._server = _Server((HOST, self._config.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True, name="prometheus").start()
        self._write()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        # A family that is absent from this step keeps its last value, as scrapes come between.
        self._values |= {**metrics, "step": step} if len(metrics) > 1 else metrics
        self._write()

    def event(self, event: Event) -> None:
        self._events[event.event] += 1
        self._write()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _write(self) -> None:
        lines = exposition(self._values, self._run)
        lines += ["# TYPE zppo_events_total counter"]
        lines += [
            f"zppo_events_total{{{labels(run=self._run, event=event)}}} {count}"
            for event, count in sorted(self._events.items())
        ]
        self._page = ("\n".join(lines) + "\n").encode()


def exposition(values: Mapping[str, float], run: str) -> list[str]:
    """A gauge for each metric: `train/loss` is `zppo_train_loss`, its own name is in the help."""
    lines: list[str] = []
    seen: set[str] = set()
    for name, value in sorted(values.items()):
        gauge = "zppo_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        if gauge not in seen:
            seen.add(gauge)
            lines += [f"# HELP {gauge} {name}", f"# TYPE {gauge} gauge"]
            lines.append(f"{gauge}{{{labels(run=run)}}} {float(value)!r}")
    return lines


def labels(**values: str) -> str:
    """`name="value"` pairs, escaped as the format wants it."""
    table = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return ",".join(f'{name}="{value.translate(table)}"' for name, value in values.items())
