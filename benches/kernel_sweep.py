"""Which tuning of the row kernels is fastest on this GPU: `benches/kernels.py --sweep`.

First threads, accesses and programs, on the policy loss from logits and on log-probs, where nothing
but the row kernels runs; then the chunk's rows with the fastest of them, on the loss from hidden
states. The last line printed is what `zppo_kernels.tuning.TUNINGS` should say for this
architecture.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import geometric_mean

import torch
from kernel_contestants import LENGTH, SUITES, make_problem

from zppo.errors import UserError
from zppo_kernels.backends import using_backend
from zppo_kernels.tuning import Tuning, using_tuning

NO_GPU = (
    "a sweep measures a GPU and this machine has none; --sweep --quick runs its small form under "
    "Triton's interpreter"
)
ROW_SUITES = ("policy loss from logits", "log-probs from hidden states")
HIDDEN_SUITE = "policy loss from hidden states"
Clock = Callable[[Callable[[], object], str, int], float]


def row_tunings(quick: bool) -> list[Tuning]:
    """Threads, accesses and programs to try; not more than 2,048 threads a multiprocessor."""
    if quick:
        return [Tuning(threads=32, vectors=2), Tuning(threads=64, vectors=1)]
    tried = itertools.product((128, 256, 512, 1024), (1, 2, 4), (1, 2, 4, 8))
    return [
        Tuning(threads, vectors, programs)
        for threads, vectors, programs in tried
        if 256 <= threads * programs <= 2048
    ]


def chunk_tunings(best: Tuning, quick: bool) -> list[Tuning]:
    """The same with other chunks."""
    rows = (64,) if quick else (1024, 2048, 4096, 8192)
    return [replace(best, chunk_rows=count) for count in rows]


@contextmanager
def kernels_here(device: str) -> Iterator[None]:
    """The Triton kernels on this device: as they are on a GPU, interpreted on a CPU."""
    with nullcontext() if device == "cuda" else using_backend("triton"):
        yield


def seconds_of(
    suites: tuple[str, ...],
    tunings: list[Tuning],
    sizes: list[tuple[int, int, int]],
    device: str,
    clock: Clock,
    repeats: int,
) -> dict[Tuning, float]:
    """Geometric mean over suites and sizes of the median time under each tuning."""
    found: dict[Tuning, list[float]] = {tuning: [] for tuning in tunings}
    for suite, size in itertools.product(suites, sizes):
        run = SUITES[suite]["zppo"](make_problem(*size, 1.0, device))
        for tuning in tunings:
            with kernels_here(device), using_tuning(tuning):
                if device == "cuda":
                    run()  # compiles
                found[tuning].append(clock(run, device, repeats))
            print(json.dumps({"suite": suite, "size": size} | asdict(tuning)), found[tuning][-1])
    return {tuning: geometric_mean(times) for tuning, times in found.items()}


def sweep(device: str, quick: bool, repeats: int, clock: Clock, out: Path) -> None:
    """Measure, write JSON, and print the fastest. Raises UserError."""
    if device != "cuda" and not quick:
        raise UserError(NO_GPU)
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--sweep --quick without a GPU needs TRITON_INTERPRET=1 in the environment")
    sizes = [(LENGTH, 8, 300)] if quick else [(8192, 1024, 151_936), (8192, 1024, 248_320)]
    arguments = (sizes, device, clock, repeats)
    suites = ROW_SUITES[:1] if quick else ROW_SUITES
    rows = seconds_of(suites, row_tunings(quick), *arguments)
    best = min(rows, key=rows.__getitem__)
    chunks = seconds_of((HIDDEN_SUITE,), chunk_tunings(best, quick), *arguments)
    best = min(chunks, key=chunks.__getitem__)
    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    tables = {
        part: [asdict(tuning) | {"seconds": seconds} for tuning, seconds in times.items()]
        for part, times in (("rows", rows), ("chunks", chunks))
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": name, "best": asdict(best)} | tables, indent=1) + "\n")
    print(f"wrote {out}\n{name}: {best}")
