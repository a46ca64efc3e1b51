"""A process that has imported torch and transformers once. The actors that run a model are forked
from it, so that none of them has to.

What is forked here is a child of the supervisor all the same: it is forked twice, the process
between the two ends at once, and the kernel gives the orphan to its nearest ancestor that takes
orphans, which is the supervisor. So exit code, session, log and the tie to the supervisor are those
of a process that was spawned.

Invariant: whoever is forked finds one thread and no CUDA context. Where a library has asked the
driver already, the actor executes its command line after all, under the same process id.

Consumes one `Request` a message. Produces `READY`, then the process id of each actor. Waits for the
next message; is unblocked by the end of the supervisor, which closes the socket.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from zppo.signals import die_with_parent
from zppo_actors import process

MODULES = (
    "zppo_actors.sampler.rollout",
    "zppo_actors.sampler.teacher",
    "zppo_actors.engines.transformers.engine",
    "zppo_actors.trainer.actor",
    "zppo_actors.trainer.rank",
)
READY = b"ready"
LONGEST_MESSAGE = 1 << 18
ROOM = " " * 1024
"""The last argument of the nursery: it makes the place where the kernel keeps a command line large
enough for that of any actor."""
THREADS = "OMP_NUM_THREADS"


class Request(msgspec.Struct, frozen=True):
    """An actor's command line, beginning with the interpreter, what its environment adds to the
    nursery's, and the file that takes its output."""

    command: list[str]
    env: dict[str, str]
    log: str


def main(argv: Sequence[str]) -> int:
    """Serve as `SOCKET_FD ROOM`. Returns 0 when the supervisor is gone; in an actor, its exit
    code."""
    die_with_parent(signal.SIGKILL)
    ear = socket.socket(fileno=int(argv[0]))
    if is_closed(ear):  # the supervisor had ended before the kernel was asked
        return 0
    show_command([sys.executable, "-P", "-m", "zppo_actors", "nursery"])
    for module in MODULES:
        importlib.import_module(module)
    # What is frozen is not written to by the collector, so its pages stay shared.
    gc.collect()
    gc.freeze()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an imported library has started a thread; nothing can be forked")
    ear.send(READY)
    while message := ear.recv(LONGEST_MESSAGE):
        request = msgspec.msgpack.decode(message, type=Request)
        if is_forked(ear):
            become(request)
            command = request.command
            return process.main(command[command.index("zppo_actors") + 1 :])
    return 0


def is_closed(ear: socket.socket) -> bool:
    """Whether the other end is gone."""
    try:
        return not ear.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return False


def is_forked(ear: socket.socket) -> bool:
    """False in the nursery; True in the new process, once it belongs to the supervisor and has said
    who it is."""
    if between := os.fork():
        os.waitpid(between, 0)
        return False
    between = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    while os.getppid() == between:
        time.sleep(0.001)
    ear.send(str(os.getpid()).encode())
    ear.close()
    return True


def become(request: Request) -> None:
    """Take on log, environment, threads and name of the actor, and chance of its own."""
    log = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    os.environ.update(request.env)
    import numpy as np
    import torch

    if torch.cuda._is_in_bad_fork():
        os.execv(request.command[0], request.command)
    torch.set_num_threads(int(request.env[THREADS]))
    # Otherwise the general generators of all actors would be in one state; that of `random` sees to
    # it itself.
    torch.seed()
    np.random.seed()
    sys.argv[1:] = request.command[request.command.index("zppo_actors") + 1 :]
    show_command(request.command)


def show_command(command: Sequence[str]) -> None:
    """Let `ps` show this command line, cut off where the first one ended."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[45:47])  # arg_start and arg_end, see proc(5)
    text = "\0".join(command).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
