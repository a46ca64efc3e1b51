"""What it takes to bring a policy version to another host, as ratios to a copy of the same bytes.

    python -P benches/weights_hosts.py [--tensors 32] [--rows 2048] [--repeats 3] [--all]

A version of `tensors` matrices of rows × rows in bfloat16 goes from one process to another over the
loopback interface, from shared memory into shared memory, and every digest is checked. *copy* is
the floor, from one file to another in one process; *gloo* is torch's broadcast, one tensor after
the other, which neither knows its peer nor hides anything; *hosts* is what a run does, TLS 1.3.
With `--all` also what was not taken: ZeroMQ *plain* and with *curve*, and TCP with a keyed BLAKE2b
of each chunk (*keyed*), which hides nothing. The contestants take turns; each number is the median,
in seconds of wall time and of processor time of both processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import xxhash
import zmq

from zppo.config.options import positive
from zppo.errors import Parser, run_command
from zppo_actors.weights import shared_memory
from zppo_actors.weights.fetch import CHUNK_BYTES, IN_FLIGHT
from zppo_actors.weights.fetcher import Fetcher
from zppo_actors.weights.layout import weight_path
from zppo_actors.weights.server import WeightServer
from zppo_protocol.messages import WeightSource
from zppo_protocol.values import PolicyManifest

Contestant = Callable[[PolicyManifest, Path], None]
KEY = b"k" * 32


def check(manifest: PolicyManifest, memory: memoryview) -> None:
    """All digests."""
    for entry in manifest.tensors:
        raw = memory[entry.start : entry.start + entry.size]
        assert xxhash.xxh3_128_hexdigest(raw) == entry.digest


@contextmanager
def new_file(path: Path, size: int) -> Iterator[memoryview]:
    """Memory of a new file with room for all of it."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        yield memoryview(mmap.mmap(file.fileno(), size))


@contextmanager
def served(work: Callable[[Any], None]) -> Iterator[Any]:
    """A process that serves, and what it says of itself; it is ended at the end."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        signal.alarm(600)
        with os.fdopen(writing, "w") as said:
            work(lambda value: print(json.dumps(value), file=said, flush=True))
        time.sleep(600)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as heard:
        try:
            yield json.loads(heard.readline())
        finally:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)


def copy(manifest: PolicyManifest, target: Path) -> None:
    """From one file to the other."""
    with Path(manifest.path).open("rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    with new_file(weight_path(target, 1), len(memory)) as found:
        found[:] = memory
        check(manifest, found)


def hosts(manifest: PolicyManifest, target: Path) -> None:
    """What a run does."""

    def serve(say: Any) -> None:
        server = WeightServer(Path(manifest.path).parent, "127.0.0.1")
        say(msgspec.to_builtins(server.source))
        time.sleep(600)

    with served(serve) as source:
        fetcher = Fetcher(target)
        fetcher.come_from(msgspec.convert(source, WeightSource))
        fetcher.want(manifest)
        while fetcher.step(1.0) is None:
            pass


def gloo(manifest: PolicyManifest, target: Path) -> None:
    """Broadcast by torch, one tensor after the other."""
    store = target / "store"

    def join(rank: int) -> None:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2
        )

    def serve(say: Any) -> None:
        say(0)
        join(0)
        for tensor in shared_memory.open_policy(manifest).values():
            dist.broadcast(tensor.view(torch.uint8), 0)

    size = os.path.getsize(manifest.path)
    with served(serve), new_file(weight_path(target, 1), size) as memory:
        join(1)
        for entry in manifest.tensors:
            tensor = torch.frombuffer(
                memory, dtype=torch.uint8, count=entry.size, offset=entry.start
            )
            dist.broadcast(tensor, 0)
        check(manifest, memory)
        dist.destroy_process_group()
    store.unlink()


def over_zmq(manifest: PolicyManifest, target: Path, *, curve: bool) -> None:
    """Chunks of the same size, as many in flight, between a ROUTER and a DEALER."""
    server_key, client_key = zmq.curve_keypair(), zmq.curve_keypair()

    def serve(say: Any) -> None:
        router = zmq.Context().socket(zmq.ROUTER)
        if curve:
            router.curve_publickey, router.curve_secretkey = server_key
            router.curve_server = True
        say(router.bind_to_random_port("tcp://127.0.0.1"))
        with open(manifest.path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        while True:
            peer, start = router.recv_multipart()
            begin = int(start)
            router.send_multipart([peer, start, memory[begin : begin + CHUNK_BYTES]], copy=False)

    size = os.path.getsize(manifest.path)
    with served(serve) as port, new_file(weight_path(target, 1), size) as memory:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        if curve:
            dealer.curve_publickey, dealer.curve_secretkey = client_key
            dealer.curve_serverkey = server_key[0]
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for number, start in enumerate(range(0, size, CHUNK_BYTES)):
            dealer.send(str(start).encode())
            if number >= IN_FLIGHT:
                take(dealer, memory)
        for _ in range(min(IN_FLIGHT, -(-size // CHUNK_BYTES))):
            take(dealer, memory)
        check(manifest, memory)
        context.destroy(linger=0)


def take(dealer: Any, memory: memoryview) -> None:
    """One chunk."""
    start, piece = dealer.recv_multipart(copy=False)
    begin = int(start.bytes)
    memory[begin : begin + len(piece.buffer)] = piece.buffer


def keyed(manifest: PolicyManifest, target: Path) -> None:
    """TCP, and behind each chunk its BLAKE2b with a key that both know."""

    def serve(say: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        say(listener.getsockname()[1])
        line, _ = listener.accept()
        with open(manifest.path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for start in range(0, len(memory), CHUNK_BYTES):
            piece = memory[start : start + CHUNK_BYTES]
            line.sendall(piece)
            line.sendall(hashlib.blake2b(piece, key=KEY).digest())

    size = os.path.getsize(manifest.path)
    with served(serve) as port, new_file(weight_path(target, 1), size) as memory:
        line = socket.create_connection(("127.0.0.1", port))
        for start in range(0, size, CHUNK_BYTES):
            piece = memory[start : start + CHUNK_BYTES]
            line.recv_into(piece, flags=socket.MSG_WAITALL)
            mac = bytearray(64)
            line.recv_into(mac, flags=socket.MSG_WAITALL)
            assert hashlib.blake2b(piece, key=KEY).digest() == mac
        check(manifest, memory)
        line.close()


CONTESTANTS: dict[str, Contestant] = {"copy": copy, "gloo": gloo, "hosts": hosts}
NOT_TAKEN: dict[str, Contestant] = {
    "plain": lambda manifest, target: over_zmq(manifest, target, curve=False),
    "curve": lambda manifest, target: over_zmq(manifest, target, curve=True),
    "keyed": keyed,
}


def run_one(name: str, folder: Path, options: argparse.Namespace) -> None:
    """One contestant, once; prints its seconds of wall and processor time. A process of its own,
    because what serves is forked from it."""
    torch.set_num_threads(1)
    tensors = {
        f"layer.{number}": torch.randn(options.rows, options.rows).to(torch.bfloat16)
        for number in range(options.tensors)
    }
    (folder / name).mkdir()
    manifest = shared_memory.publish(tensors, 1, folder)
    del tensors
    before, begin = processor_seconds(), time.perf_counter()
    (CONTESTANTS | NOT_TAKEN)[name](manifest, folder / name)
    wall, used = time.perf_counter() - begin, processor_seconds() - before
    print(json.dumps([wall, used, os.path.getsize(manifest.path)]))


def processor_seconds() -> float:
    """What this process and its ended children have used, to the microsecond."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(name: str) -> list[float]:
    """Wall seconds, processor seconds and bytes of one turn of a contestant."""
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        command = [sys.executable, "-P", __file__, *sys.argv[1:], "--one", name]
        done = subprocess.run(
            [*command, "--folder", folder],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    for name, value in {"tensors": 32, "rows": 2048, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--all", action="store_true", help="also what was not taken")
    parser.add_argument("--one", choices=[*CONTESTANTS, *NOT_TAKEN], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        run_one(options.one, options.folder, options)
        return
    names = [*CONTESTANTS, *(NOT_TAKEN if options.all else ())]
    turns: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            turns[name].append(measured(name))
    walls = {name: statistics.median(wall for wall, _, _ in turns[name]) for name in names}
    uses = {name: statistics.median(used for _, used, _ in turns[name]) for name in names}
    print(f"{turns['copy'][0][2] / 1e6:.0f} MB")
    for name in names:
        wall, used = walls[name], uses[name]
        print(
            f"{name:6} {wall:.2f} s of wall time ({wall / walls['copy']:.1f} copies), "
            f"{used:.2f} s of processor time ({used / uses['copy']:.1f} copies)"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
