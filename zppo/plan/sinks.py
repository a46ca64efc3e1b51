"""Before any work: can the sinks of a topology be opened? One sentence each if not."""

from __future__ import annotations

import importlib.util
import inspect
import re
import socket
from pathlib import Path
from typing import Any

from zppo import extensions
from zppo.algorithm.methods import Method
from zppo.config.sinks import OwnSink
from zppo.config.topology import Topology
from zppo.errors import UserError

PACKAGES = ("wandb", "trackio", "mlflow")
"""Sinks whose package is an extra of the same name."""
SINK_METHODS = {"open": ("run",), "step": ("step", "metrics"), "event": ("event",), "close": ()}
"""Methods of a sink of a user's own, and their arguments."""
HOST = "127.0.0.1"
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")


def check_sinks(topology: Topology, method: Method) -> None:
    """Raise UserError for a sink whose package, port or code is not there, or whose address would
    put a password into the run directory."""
    sinks = topology.sinks
    address = sinks.mlflow.tracking_uri if sinks.mlflow is not None else None
    if address is not None and _PASSWORD.search(address):
        raise UserError(
            "sinks.mlflow.tracking_uri: expected an address without a password, which would stand "
            "in the run directory; MLflow reads MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD from the environment"
        )
    for name in PACKAGES:
        if getattr(sinks, name) is not None and importlib.util.find_spec(name) is None:
            raise UserError(
                f"sinks.{name}: its package is not installed; install it with: pip install "
                f"'zppo[{name}]'"
            )
    if sinks.prometheus is not None:
        _check_port(sinks.prometheus.port)
    seen: set[str] = set()
    for number, own in enumerate(sinks.use):
        setting = f"sinks.use[{number}].use"
        check_sink(setting, own)
        if own_name(own.use) in seen:
            raise UserError(
                f"{setting}: there are two sinks {own_name(own.use)!r}, whose folder in the run "
                "directory would be the same; rename one"
            )
        seen.add(own_name(own.use))


def check_sink(setting: str, own: OwnSink) -> None:
    """Import a user's sink and look at its methods. Raises UserError."""
    made_by = extensions.load(setting, own.use, "sink").value
    extensions.check_call(setting, own.use, made_by, (), own.args)
    if inspect.isclass(made_by):
        check_methods(setting, own.use, made_by)


def check_methods(setting: str, use: str, sink: Any) -> None:
    """Raise UserError unless `sink`, an object or its class, has the methods of a sink."""
    for name, arguments in SINK_METHODS.items():
        method = getattr(sink, name, None)
        if method is None:
            takes = f"{name}({', '.join(arguments)})"
            raise UserError(f"{setting}: {use!r} has no {name!r}; expected a method {takes}")
        unbound = inspect.isclass(sink) and inspect.isfunction(inspect.getattr_static(sink, name))
        expected = ("self", *arguments) if unbound else arguments
        extensions.check_call(setting, f"{use}.{name}", method, expected)


def own_name(use: str) -> str:
    """What a user's sink is called, also as a folder: `mine.Sink` of `/a/mine.py:Sink`."""
    target, _, name = use.rpartition(":")
    target = Path(target).stem if target.endswith(".py") else target
    return re.sub(r"[^\w.-]", "_", f"own-{target}.{name}" if target else f"own-{name}")


def _check_port(port: int) -> None:
    # Looked at and not held: the number is the one that Prometheus scrapes, so there is no other to
    # take, and the run goes on without this sink if somebody takes it before the sink listens.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"sinks.prometheus.port: {HOST}:{port} cannot be listened on ({error.strerror}); "
                "choose another port"
            ) from None
