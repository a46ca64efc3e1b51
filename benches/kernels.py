"""Time and peak memory of the loss kernels against their peers and against the limits of this
machine.

    python -P benches/kernels.py                    run everything here, write JSON, print the table
    python -P benches/kernels.py --report           draw docs/benchmarks.md from benches/results
    python -P benches/kernels.py --sweep            time the row kernels under other tunings (GPU)

Sizes are those of the paper's students on a GPU and of the CPU job elsewhere. Every measurement
runs in a process of its own, so that its peak memory is its own: on a GPU the allocator's peak, on
a CPU the kernel's peak resident size, both above the inputs. A CPU is timed in CPU seconds of the
process on one thread, which a busy computer disturbs least. The limits are measured in the same
run: the rate of one LM-head product, and the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Last, because this file has the name of a package that transformers looks for.
sys.path.append(str(Path(__file__).resolve().parent))

import torch
from kernel_contestants import GPU_ONLY, SUITES, make_problem
from kernel_curves import both_curves
from kernel_report import tables_of, write_report
from kernel_sweep import sweep

from zppo.config.options import positive
from zppo.errors import Parser, UserError, run_command

RESULTS = Path(__file__).parent / "results"
GPU_SIZES = [
    (16_384, hidden, vocabulary) for hidden in (1024, 2560) for vocabulary in (151_936, 248_320)
]
CPU_SIZES = [(1024, 96, 49_152), (1024, 576, 49_152)]


@dataclass(frozen=True)
class Size:
    """One problem size; `live` is the share of rows with an advantage."""

    suite: str
    contestant: str
    rows: int
    hidden: int
    vocabulary: int
    live: float


def sizes(device: str, only: str, quick: bool) -> list[Size]:
    """What is run on this device; a suite is run once for each of the dimensions that matter to
    it."""
    shapes = [(128, 16, 512)] if quick else GPU_SIZES if device == "cuda" else CPU_SIZES
    by_vocabulary = list(
        {
            vocabulary: (rows, hidden, vocabulary) for rows, hidden, vocabulary in shapes[::-1]
        }.values()
    )
    result = []
    for suite, contestants in SUITES.items():
        names = [name for name in contestants if device == "cuda" or name not in GPU_ONLY]
        chosen = {
            "group advantages": shapes[:1],
            "policy loss from logits": by_vocabulary[::-1],
        }.get(suite, shapes)
        for shape in chosen:
            for live in (1.0, 0.5) if suite.startswith("policy") else (1.0,):
                result += [
                    Size(suite, name, *shape, live) for name in names if only in f"{suite} {name}"
                ]
    return result


def measured_seconds(size: Size, device: str, repeats: int) -> dict[str, float]:
    """Median time of a run and, where the suite has one, the limit."""
    problem = make_problem(size.rows, size.hidden, size.vocabulary, size.live, device)
    run = SUITES[size.suite][size.contestant](problem)
    run()
    seconds = _median_seconds(run, device, repeats)
    limit = limit_seconds(size, limits(size, device), 2 if device == "cuda" else 4)
    return {"seconds": seconds} | (
        {} if limit is None else {"limit_seconds": limit, "share_of_limit": limit / seconds}
    )


def measured_peak(size: Size, device: str) -> dict[str, float]:
    """Peak bytes above the inputs."""
    problem = make_problem(size.rows, size.hidden, size.vocabulary, size.live, device)
    run = SUITES[size.suite][size.contestant](problem)
    run()
    problem.hidden_NH.grad = problem.weight_VH.grad = None
    before = _reset_peak(device)
    run()
    return {"peak_bytes": _peak(device) - before}


def _median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(repeats):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        times.append(clock() - start)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def limits(size: Size, device: str) -> dict[str, float]:
    """Rate of one LM-head product of this size (a chunk of 2,048 rows, or all) and bandwidth of a
    copy."""
    problem = make_problem(min(size.rows, 2048), size.hidden, size.vocabulary, 1.0, device)
    hidden, weight = problem.hidden_NH.detach(), problem.weight_VH.detach()
    logits = hidden @ weight.T
    product = _median_seconds(lambda: torch.mm(hidden, weight.T, out=logits), device, 5)
    other = torch.empty_like(logits)
    copy = _median_seconds(lambda: other.copy_(logits), device, 5)
    flops = 2 * len(hidden) * size.hidden * size.vocabulary
    return {
        "flop_per_s": flops / product,
        "bytes_per_s": 2 * logits.numel() * logits.element_size() / copy,
    }


def limit_seconds(size: Size, limit: dict[str, float], element_size: int) -> float | None:
    """The least time: products of the live rows at the measured rate, or one read and one write of
    the logits at that of a copy.
    """
    live = size.rows * size.live
    if size.suite == "policy loss from hidden states":
        return 6 * live * size.hidden * size.vocabulary / limit["flop_per_s"]
    if size.suite == "log-probs from hidden states":
        return 2 * live * size.hidden * size.vocabulary / limit["flop_per_s"]
    if size.suite == "policy loss from logits":
        return (size.rows + live) * size.vocabulary * element_size / limit["bytes_per_s"]
    return None


def in_own_process(size: Size, device: str, repeats: int, threads: int) -> dict[str, Any]:
    """Time and memory in two fresh interpreters; a peer that fails is reported, not hidden."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(size)), "--device", device]
    command += ["--repeats", str(repeats), "--threads", str(threads)]
    result: dict[str, Any] = {}
    # Blocks of 64 KiB and more go back to the system when they are freed, so that none hides in the
    # baseline.
    for extra, variables in (([], {}), (["--memory"], {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        environment = os.environ | variables
        done = subprocess.run(
            command + extra, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode != 0:
            return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
        result |= json.loads(done.stdout.splitlines()[-1])
    return result


def run_all(options: argparse.Namespace) -> None:
    """All sizes, one after the other, into one JSON file; with --only, the file's other results
    stay as they are. Raises UserError."""
    name = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()} CPU, {options.threads} thread{'s' * (options.threads > 1)}"
    )
    machine = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    chosen = sizes(options.device, options.only, options.quick)
    if not chosen:
        raise UserError(f"--only: no suite and no contestant has {options.only!r} in its name")
    path = Path(options.out) if options.out else RESULTS / f"kernels-{options.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = _earlier(path)
    for size in chosen:
        results[size] = asdict(size) | in_own_process(
            size, options.device, options.repeats, options.threads
        )
        print(json.dumps(results[size]), flush=True)
    curves = both_curves(60) if options.device == "cpu" and not options.quick else {}
    ordered = [results[size] for size in sorted(results, key=_order)]
    path.write_text(
        json.dumps({"machine": machine, "results": ordered, "curves": curves}, indent=1) + "\n"
    )
    print(f"{tables_of(path)}\nwrote {path}")


def _earlier(path: Path) -> dict[Size, dict[str, Any]]:
    """Results already in the file. Raises UserError for another file."""
    if not path.is_file():
        return {}
    names = [field.name for field in fields(Size)]
    try:
        rows = json.loads(path.read_text())["results"]
        return {Size(**{name: row[name] for name in names}): row for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--out {path}: holds no results of this bench; expected a new file, or one with them"
        ) from None


def _order(size: Size) -> tuple[Any, ...]:
    """Suites and contestants as SUITES has them, sizes between them."""
    suites = list(SUITES)
    contestant = list(SUITES[size.suite]).index(size.contestant)
    return suites.index(size.suite), size.rows, size.hidden, size.vocabulary, -size.live, contestant


def run_one(options: argparse.Namespace) -> None:
    """The child process: one size, time or memory, one line of JSON."""
    size = Size(**json.loads(options.one))
    seconds = not options.memory
    result = (
        measured_seconds(size, options.device, options.repeats)
        if seconds
        else measured_peak(size, options.device)
    )
    print(json.dumps(result))


def main() -> None:
    """Parse and run."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--only", default="", help="suites and contestants whose name contains this"
    )
    parser.add_argument("--out", help="JSON file (default: benches/results/kernels-DEVICE.json)")
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="write docs/benchmarks.md, or FILE, and stop",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one tiny size, to see that everything runs"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="find the fastest tuning of the row kernels on a GPU"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and this machine has no GPU; expected cpu")
    torch.set_num_threads(options.threads)
    if options.report is not None:
        write_report(
            RESULTS, Path(options.report or Path(__file__).parents[1] / "docs/benchmarks.md")
        )
    elif options.sweep:
        out = Path(options.out) if options.out else RESULTS / f"sweep-{options.device}.json"
        sweep(options.device, options.quick, options.repeats, _median_seconds, out)
    elif options.one:
        run_one(options)
    else:
        run_all(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
