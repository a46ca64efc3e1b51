"""What it takes to publish a policy and to load it, against a plain copy of the same bytes.

    python -P benches/weight_load.py [--layers 32] [--width 2048] [--dtype bfloat16] [--repeats 5]
    [--folder /dev/shm] [--json FILE]

*load* is what an engine does: map the file, compare every digest, copy the tensors into a model
that is there. Its parts are measured alone as well: *map*
maps the file anew, touches every page and gives it back; *verify* is all before the first parameter
is touched, with the map; *digests* are taken of memory that is mapped already. *copy* copies the
tensors from memory that is mapped already. *publish* writes a version over one that was released,
as a trainer does: it looks for values that are not finite, takes digests and writes. *publish anew*
has no such file, so it makes one and gives an old one up. Processor times of one thread, in
milliseconds, medians of turns; the last column is in copies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from zppo.config.options import positive
from zppo.errors import Parser, run_command
from zppo_actors.weights import shared_memory
from zppo_actors.weights.recycling import SPARE
from zppo_protocol.values import PolicyManifest

PAGE = mmap.PAGESIZE
KEPT = 1_000_000
"""The version that is loaded, which is never released."""


class Layers(nn.Module):
    """A model of square matrices."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor), False))


def map_file(manifest: PolicyManifest) -> None:
    """Map, touch, unmap."""
    with Path(manifest.path).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = np.frombuffer(memory, np.uint8)[::PAGE]
    pages.max()
    del pages
    memory.close()


def publish(tensors: dict[str, Tensor], version: int, folder: Path) -> None:
    """Publish a version and release the one before it."""
    shared_memory.publish(tensors, version, folder)
    shared_memory.remove(folder, version - 1)


def publish_anew(tensors: dict[str, Tensor], version: int, folder: Path) -> None:
    """The same without a file to write over."""
    (folder / SPARE).unlink(missing_ok=True)
    publish(tensors, version, folder)


def actions(tensors: dict[str, Tensor], folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name; the copy last."""
    model = Layers(tensors)
    manifest = shared_memory.publish(tensors, KEPT, folder)
    slots = dict(model.state_dict())
    raw = [memoryview(one.view(torch.uint8).numpy().reshape(-1)) for one in tensors.values()]
    versions = itertools.count(1)
    return {
        "publish": lambda: publish(tensors, next(versions), folder),
        "publish anew": lambda: publish_anew(tensors, next(versions), folder),
        "load": lambda: shared_memory.load_into(model, manifest),
        "verify": lambda: shared_memory.open_policy(manifest),
        "map": lambda: map_file(manifest),
        "digests": lambda: [xxhash.xxh3_128_digest(one) for one in raw],
        "copy": lambda: shared_memory.copy([(slots[name], one) for name, one in tensors.items()]),
    }


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of processor time, by name."""
    dtype, shape = getattr(torch, options.dtype), (options.width, options.width)
    tensors = {f"layer{i}": torch.randn(shape).to(dtype) for i in range(options.layers)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        named = actions(tensors, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in named}
        for turn in range(options.repeats + 1):
            for name, action in named.items():
                begin = time.process_time()
                action()
                if turn:  # the first one warms everything up
                    times[name].append(1e3 * (time.process_time() - begin))
    found = {name: statistics.median(values) for name, values in times.items()}
    return {"mib": sum(one.nbytes for one in tensors.values()) / 2**20, **found}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--width", type=positive, default=2048, help="rows and columns of a layer")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--folder", default="/dev/shm", help="where weights are published")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options)
    print(f"{found['mib']:.0f} MiB, medians of {options.repeats} turns")
    for name in (one for one in found if one != "mib"):
        print(f"{name:13}{found[name]:9.2f} ms{found[name] / found['copy']:7.2f} copies")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
