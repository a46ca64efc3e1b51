"""Hands the weights that lie in a runtime folder to the other hosts of a run.

One thread takes connections, and each has a thread of its own: there is one for each host. They
read files that never change, so nobody waits for anybody, and the trainer knows nothing of it.
Whoever does not show the token within `CONNECT_SECONDS` is cut off, however slowly it speaks, and
of such only `STRANGERS` are borne at once.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from zppo_actors.weights.fetch import CHUNK_BYTES
from zppo_actors.weights.layout import weight_path
from zppo_actors.weights.line import (
    CONNECT_SECONDS,
    FRAME,
    new_token,
    proof_of,
    serving_context,
    tune,
)
from zppo_actors.weights.recycling import opened
from zppo_protocol.messages import WeightSource

STRANGERS = 32
"""Connections that have not shown the token yet; more are closed at once."""
IDLE_SECONDS = 600.0
"""A fetcher that reads nothing for so long while it is being sent to is cut off; it comes again."""

ACCEPT_PAUSE = 0.1
"""Seconds before the next connection is taken when one could not be."""

log = logging.getLogger("zppo.weights")


class WeightServer:
    """A server of the weight files in `folder`, from its construction to `close`."""

    def __init__(self, folder: Path, host: str, port: int = 0, bind: str | None = None) -> None:
        """Others reach it at `host`, a name or address; it listens there, or at `bind`. Raises
        OSError if that cannot be had; port 0 is any free one."""
        self._folder, self._closed = folder, False
        self._context, certificate = serving_context(folder)
        self.refused = 0
        """connections without the token"""
        self._strangers = threading.Semaphore(STRANGERS)
        listening = bind or host
        family = socket.getaddrinfo(listening, port, type=socket.SOCK_STREAM)[0][0]
        # `::` is all addresses, those of IPv4 too, as it is to the controller's socket.
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        # Bound here, where it serves, and told of afterwards.
        self._socket = socket.create_server((listening, port), family=family, dualstack_ipv6=both)
        found: int = self._socket.getsockname()[1]
        self.source = WeightSource(
            host=host, port=found, certificate=certificate, token=new_token()
        )
        """What lets fetchers in, and is a secret."""
        threading.Thread(target=self._accept, daemon=True, name="weights").start()

    def close(self) -> None:
        """Take no more connections; those that are there end with this process."""
        self._closed = True
        # A thread that waits in accept is woken by this alone.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                plain, _ = self._socket.accept()
            except OSError as error:
                # That connection is gone, or this process has too much open: the next may come.
                if not self._closed:
                    log.warning("a connection to the weights could not be taken: %s", error)
                    time.sleep(ACCEPT_PAUSE)
                continue
            if not self._strangers.acquire(blocking=False):
                plain.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()
            except RuntimeError as error:  # the system has no thread left just now
                log.warning("a connection to the weights could not be served: %s", error)
                self._strangers.release()
                plain.close()
                time.sleep(ACCEPT_PAUSE)

    def _serve(self, plain: socket.socket) -> None:
        try:
            try:
                line = self._admitted(plain)
            finally:
                self._strangers.release()
            if line is not None:
                with line:
                    self._answer(line)
        except OSError as error:
            log.info("a line for weights has ended: %s", error)
        finally:
            plain.close()

    def _admitted(self, plain: socket.socket) -> ssl.SSLSocket | None:
        """The secured line to somebody who has the token; None, counted, for anybody else."""
        deadline = time.monotonic() + CONNECT_SECONDS
        try:
            plain.settimeout(CONNECT_SECONDS)
            tune(plain)
            line = self._context.wrap_socket(plain, server_side=True)
            proof = proof_of(self.source.token)
            if hmac.compare_digest(_exactly(line, len(proof), deadline), proof):
                return line
            self._refuse("it has no token of this run")
            line.close()
        except OSError as error:
            self._refuse(str(error))
        return None

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th …
            log.warning("connection %d to the weights is refused: %s", self.refused, reason)

    def _answer(self, line: ssl.SSLSocket) -> None:
        """Answer one request after the other until the other end hangs up."""
        while True:
            line.settimeout(None)  # a fetcher that waits for a version says nothing
            version, start, size = FRAME.unpack(_exactly(line, FRAME.size))
            line.settimeout(IDLE_SECONDS)
            piece = self._read(version, start, min(size, CHUNK_BYTES))
            line.sendall(FRAME.pack(version, start, len(piece)))
            if piece:
                line.sendall(piece)

    def _read(self, version: int, start: int, size: int) -> bytes:
        """So much of a version, nothing if it is not here (any more). The file is not kept open: a
        version that is released is gone."""
        try:
            with opened(weight_path(self._folder, version)) as file:
                return os.pread(file.fileno(), size, start)
        except (OSError, OverflowError):
            return b""


def _exactly(line: ssl.SSLSocket, count: int, deadline: float | None = None) -> bytes:
    """`count` bytes. Raises OSError when the other end hangs up or is too slow."""
    return b"".join(_parts(line, count, deadline))


def _parts(line: ssl.SSLSocket, count: int, deadline: float | None) -> Iterator[bytes]:
    while count:
        if deadline is not None:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError("it took too long")
            line.settimeout(left)
        part = line.recv(count)
        if not part:
            raise ConnectionResetError("the other end has hung up")
        count -= len(part)
        yield part
