"""How much an answer costs on the wire: this codec against msgspec with the token streams as lists
of numbers.

    python benches/protocol.py [--completions 64] [--tokens 16384] [--repeats 7] [--json FILE]

The message is one `GenerateResult` of `--completions` completions of `--tokens` tokens each. Both
sides end with numpy arrays that have passed the same checks, which is what a controller needs. The
last row sends the frames through a real `ipc://` socket pair in one process. Times are processor
times of all threads, the best of `--repeats`, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from zppo_protocol.codec import decode, encode
from zppo_protocol.limits import Limits
from zppo_protocol.messages import GenerateResult
from zppo_protocol.samples import GroupSamples
from zppo_protocol.sockets import Dealer, Router
from zppo_protocol.values import Usage

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


class ListResult(msgspec.Struct, tag=True):
    task_id: str
    samples: ListSamples


def make_result(completions: int, tokens: int) -> GenerateResult:
    """A made-up answer; token ids below 150,000 and texts of four characters a token, as a real
    model's."""
    rng = np.random.default_rng(0)
    total = completions * tokens
    samples = GroupSamples(
        prompt_ids=rng.integers(0, 150_000, 512, dtype=np.int32),
        token_ids=rng.integers(0, 150_000, total, dtype=np.int32),
        log_probs=-rng.random(total, dtype=np.float32),
        offsets=np.arange(0, total + 1, tokens, dtype=np.int32),
        version_spans=np.array([[total // 2, 6], [total - total // 2, 7]], np.int32),
        texts=["abcd" * tokens] * completions,
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
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def socket_ms(result: GenerateResult, repeats: int) -> float:
    """Encode, send, receive and decode through a Unix socket, one message at a time."""
    limits = Limits(header_bytes=2**30)
    with tempfile.TemporaryDirectory(prefix="zp-") as folder:
        address = f"ipc://{folder}/bench.sock"
        router, dealer = Router(address, limits), Dealer(address, "rollout-0", limits)

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
    rows = {
        "encode": (
            best_ms(lambda: encode(result, limits), repeats),
            best_ms(lambda: encode_lists(result), repeats),
        ),
        "decode": (
            best_ms(lambda: decode(frames, limits), repeats),
            best_ms(lambda: decode_lists(data), repeats),
        ),
    }
    rows["both"] = (rows["encode"][0] + rows["decode"][0], rows["encode"][1] + rows["decode"][1])
    return {
        "completions": completions,
        "tokens": tokens,
        "cpu": platform.processor() or platform.machine(),
        "mib": {"codec": sum(map(len, frames)) / 2**20, "lists": len(data) / 2**20},
        "milliseconds": {
            name: {"codec": ours, "lists": theirs} for name, (ours, theirs) in rows.items()
        },
        "ratio": {name: theirs / ours for name, (ours, theirs) in rows.items()},
        "socket_milliseconds": socket_ms(result, repeats),
    }


def table(measured: dict[str, Any]) -> str:
    lines = [f"{'':18}{'codec':>10}{'lists':>10}{'ratio':>8}"]
    for name, times in measured["milliseconds"].items():
        ratio = measured["ratio"][name]
        lines.append(
            f"{name + ' (ms)':18}{times['codec']:10.2f}{times['lists']:10.2f}{ratio:7.1f}x"
        )
    size = measured["mib"]
    lines.append(
        f"{'size (MiB)':18}{size['codec']:10.2f}{size['lists']:10.2f}"
        f"{size['lists'] / size['codec']:7.1f}x"
    )
    lines.append(f"{'over ipc (ms)':18}{measured['socket_milliseconds']:10.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=7)
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
    main()
