"""How much an answer costs on the wire: this codec against msgspec with the token streams as lists
of numbers, against pickle, and against bare ZeroMQ.

    python benches/protocol.py [--completions 64] [--tokens 16384] [--repeats 7] [--json FILE]

The message is one `GenerateResult` of `--completions` completions of `--tokens` tokens each. Codec
and lists end with numpy arrays that have passed the same checks, which is what a controller needs;
pickle (protocol 5, of the fields) checks nothing. The last rows send the message through a real
socket pair in one process, each end with an I/O thread of its own: ours over `ipc` (a key shown
once) and over `tcp` (CURVE), and the same frames through bare sockets, with and without CURVE; all
copy a frame below the same size, since pyzmq wakes a thread for each that it does not copy.
*fresh and read* are bare sockets whose sender copies the frames each time and whose receiver looks
at each byte once; *encoded and decoded* are bare sockets with this codec at both ends, so what ours
take beyond that is names, bounds and waits that end. Times are processor times of all threads, the
best of `--repeats`, in milliseconds; each action is repeated until it takes 20 ms.
"""

from __future__ import annotations

import json
import pickle
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from zppo.config.options import at_least, positive
from zppo.errors import Parser, run_command
from zppo_protocol.codec import decode, encode
from zppo_protocol.keys import issue
from zppo_protocol.limits import Limits
from zppo_protocol.messages import GenerateResult
from zppo_protocol.samples import GroupSamples
from zppo_protocol.sockets import COPIED, Dealer, Router
from zppo_protocol.values import Usage

LEAST_SECONDS = 0.02
KINDS = ("ipc", "tcp")
WAYS = ("codec", "lists", "pickle")
ARRAYS = {
    "prompt_ids": np.int32,
    "token_ids": np.int32,
    "log_probs": np.float32,
    "offsets": np.int32,
    "version_spans": np.int32,
}


class ListSamples(msgspec.Struct):
    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    offsets: list[int]
    version_spans: list[list[int]]
    texts: list[str]
    finish_reasons: list[str]
    usage: list[Usage] = []
    support: None = None
    media_tokens: list[int] = []


class ListResult(msgspec.Struct, tag=True):
    task_id: str
    samples: ListSamples


def make_result(completions: int, tokens: int) -> GenerateResult:
    """A made-up answer; token ids below 150,000 and texts of four characters a token, as a real
    model's. No two texts are the same, or pickle would write one of them."""
    rng = np.random.default_rng(0)
    total = completions * tokens
    samples = GroupSamples(
        prompt_ids=rng.integers(0, 150_000, 512, dtype=np.int32),
        token_ids=rng.integers(0, 150_000, total, dtype=np.int32),
        log_probs=-rng.random(total, dtype=np.float32),
        offsets=np.arange(0, total + 1, tokens, dtype=np.int32),
        version_spans=np.array([[total // 2, 6], [total - total // 2, 7]], np.int32),
        texts=[f"{number:04d}" * tokens for number in range(completions)],
        finish_reasons=["stop"] * completions,
    )
    return GenerateResult(task_id="12/q-17/bcq", samples=samples)


def encode_lists(result: GenerateResult) -> bytes:
    fields = msgspec.structs.asdict(result.samples)
    lists = {name: value.tolist() if name in ARRAYS else value for name, value in fields.items()}
    return msgspec.msgpack.encode(ListResult(task_id=result.task_id, samples=ListSamples(**lists)))


def decode_lists(data: bytes) -> GenerateResult:
    result = msgspec.msgpack.decode(data, type=ListResult)
    fields = msgspec.structs.asdict(result.samples)
    arrays: dict[str, Any] = {
        name: np.array(value, ARRAYS[name]) if name in ARRAYS else value
        for name, value in fields.items()
    }
    return GenerateResult(task_id=result.task_id, samples=GroupSamples(**arrays))


def best_ms(action: Callable[[], Any], repeats: int) -> float:
    """Least processor time of one call, in milliseconds: the rest is noise of the machine."""
    action()
    times, calls = [], 1
    while len(times) < repeats:
        start = time.process_time()
        for _ in range(calls):
            action()
        seconds = time.process_time() - start
        if seconds < LEAST_SECONDS and not times:
            calls *= 2
        else:
            times.append(seconds / calls)
    return 1000 * min(times)


def address_of(kind: str, folder: str) -> tuple[str, int | None]:
    """An address of this kind, and the descriptor of a socket that listens there, if it is a
    port."""
    if kind == "ipc":
        return f"ipc://{folder}/bench.sock", None
    ear = socket.create_server(("127.0.0.1", 0))
    return f"tcp://127.0.0.1:{ear.getsockname()[1]}", ear.detach()


def bare_ms(
    make: Callable[[], list[Any]],
    read: Callable[[list[zmq.Frame]], Any],
    repeats: int,
    kind: str,
    *,
    curve: bool = False,
) -> float:
    """What `make` returns through bare sockets, without names, to `read`."""
    contexts = zmq.Context(), zmq.Context()
    router, dealer = contexts[0].socket(zmq.ROUTER), contexts[1].socket(zmq.DEALER)
    dealer.copy_threshold = COPIED
    if curve:
        (public, secret), (own_public, own_secret) = zmq.curve_keypair(), zmq.curve_keypair()
        router.curve_server, router.curve_secretkey = 1, secret
        dealer.curve_publickey, dealer.curve_secretkey = own_public, own_secret
        dealer.curve_serverkey = public
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        address, ear = address_of(kind, folder)
        if ear is not None:
            router.set(zmq.USE_FD, ear)
        router.bind(address)
        dealer.connect(address)

        def trip() -> None:
            dealer.send_multipart(make(), copy=False)
            read(router.recv_multipart(copy=False)[1:])

        try:
            return best_ms(trip, repeats)
        finally:
            for context in contexts:
                context.destroy(linger=0)


def socket_ms(result: GenerateResult, repeats: int, kind: str) -> float:
    """Encode, send, receive and decode through our sockets, one message at a time."""
    limits = Limits(header_bytes=2**30)
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        address, ear = address_of(kind, folder)
        access, credentials = issue(address, {"rollout-0": "rollout"})
        router, dealer = Router(access, limits, ear), Dealer(credentials["rollout-0"], limits)

        def trip() -> None:
            dealer.send(result)
            router.receive(60.0)

        try:
            return best_ms(trip, repeats)
        finally:
            dealer.close()
            router.close()


def measure(completions: int, tokens: int, repeats: int) -> dict[str, Any]:
    result, limits = make_result(completions, tokens), Limits(header_bytes=2**30)
    frames, data = encode(result, limits), encode_lists(result)
    received = [zmq.Frame(frame, copy=True).buffer for frame in frames]
    fields = msgspec.structs.asdict(result.samples)
    pickled = pickle.dumps(fields, protocol=5)
    actions: dict[str, tuple[Callable[[], Any], ...]] = {
        "encode": (
            lambda: encode(result, limits),
            lambda: encode_lists(result),
            lambda: pickle.dumps(fields, protocol=5),
        ),
        "decode": (
            lambda: decode(received, limits),
            lambda: decode_lists(data),
            lambda: pickle.loads(pickled),
        ),
    }
    rows = {name: [best_ms(one, repeats) for one in ways] for name, ways in actions.items()}
    rows["both"] = [sum(pair) for pair in zip(*rows.values(), strict=True)]
    ours = {kind: socket_ms(result, repeats, kind) for kind in KINDS}
    bare = {
        f"{kind}{', CURVE' * curve}": bare_ms(lambda: frames, len, repeats, kind, curve=curve)
        for kind in KINDS
        for curve in (False, True)
    }
    bare["ipc, fresh and read"] = bare_ms(
        lambda: [bytearray(frame) for frame in frames],
        lambda found: [np.frombuffer(frame.buffer, np.uint8).max() for frame in found],
        repeats,
        "ipc",
    )
    bare["ipc, encoded and decoded"] = bare_ms(
        lambda: encode(result, limits),
        lambda found: decode([frame.buffer for frame in found], limits),
        repeats,
        "ipc",
    )
    return {
        "completions": completions,
        "tokens": tokens,
        "cpu": platform.processor() or platform.machine(),
        "mib": {"codec": sum(map(len, frames)) / 2**20, "lists": len(data) / 2**20},
        "milliseconds": {name: dict(zip(WAYS, row, strict=True)) for name, row in rows.items()},
        "ratio": {
            name: {way: row[k] / row[0] for k, way in enumerate(WAYS)} for name, row in rows.items()
        },
        "socket_milliseconds": ours,
        "bare_milliseconds": bare,
    }


def table(measured: dict[str, Any]) -> str:
    lines = [f"{'':18}" + "".join(f"{way:>10}" for way in WAYS) + "   of ours"]
    for name, times in measured["milliseconds"].items():
        row = "".join(f"{times[way]:10.3f}" for way in WAYS)
        ratios = "".join(f"{measured['ratio'][name][way]:8.1f}x" for way in WAYS[1:])
        lines.append(f"{name + ' (ms)':18}{row}{ratios}")
    size = measured["mib"]
    lines.append(f"{'size (MiB)':18}{size['codec']:10.2f}{size['lists']:10.2f}")
    for kind, time_ms in measured["socket_milliseconds"].items():
        lines.append(f"{f'over {kind} (ms)':18}{time_ms:10.3f}")
    whole = measured["socket_milliseconds"]["ipc"]
    for kind, time_ms in measured["bare_milliseconds"].items():
        lines.append(f"{f'bare {kind} (ms)':36}{time_ms:6.3f}{time_ms / whole:10.0%} of our ipc")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=positive, default=64)
    parser.add_argument("--tokens", type=at_least(2), default=16_384)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = measure(options.completions, options.tokens, options.repeats)
    print(
        f"one answer of {options.completions} completions of {options.tokens} tokens, best of "
        f"{options.repeats}"
    )
    print(table(measured))
    if options.json is not None:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
