"""The environment that actors are started with."""

from __future__ import annotations

import os

from zppo.plan.processes import ProcessEntry

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}
"""For glibc. By default every tensor above some megabytes is mapped anew, page by page, and
unmapped again, which cost a quarter of the time of sampling on a CPU; now up to 2 GiB that a
process has freed stay with it.
"""


def environment(entry: ProcessEntry) -> dict[str, str]:
    """Environment of an actor: its share of the CPU for every library that starts threads of its
    own, and a C library that keeps what large tensors give back, unless the user has set it up
    otherwise.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    threads = dict.fromkeys(names, str(entry.threads))
    kept = {name: os.environ.get(name, value) for name, value in KEEP_MEMORY.items()}
    return {**threads, **kept, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
