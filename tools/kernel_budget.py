"""Compile every Triton kernel ahead of time, without a GPU, and hold it to a budget: registers,
spills, load widths, barriers, and instructions a logit.

    python tools/kernel_budget.py            compare with kernels/budget.json; exit 1 if worse
    python tools/kernel_budget.py --short    the same for the cases that continuous integration runs
    python tools/kernel_budget.py --write    measure and write the budget

Each case is compiled as a launch on such rows would specialise it, with the tile that
`tuning.tile_for` chooses. Registers and stack (spills) are read from the cubin, load widths from
the PTX, loops from the machine code (SASS).

instructions: machine instructions of the loops over full tiles, per logit, summed over the sweeps;
for the divergence per logit of the student. loop_barriers and loop_narrow_loads: what those loops
have of barriers and of loads below 16 bytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Set before Triton is imported: compiled kernels are wanted here, and its default for fused
# multiply-add is about to change.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zppo.errors import Parser, UserError, run_command
from zppo_kernels import triton_advantages, triton_jsd, triton_rows, triton_samples
from zppo_kernels.launch_advantages import BLOCK as ADVANTAGE_BLOCK
from zppo_kernels.rows_triton import SCALE_BLOCK, SCALE_WARPS, policy_constants, rows_of
from zppo_kernels.settings import PolicyLossSettings
from zppo_kernels.tuning import TUNINGS, Tuning, using_tuning

BUDGET = Path(__file__).parents[1] / "kernels/budget.json"
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LIMITED = (
    "registers",
    "spill_bytes",
    "other_loads",
    "barriers",
    "loop_barriers",
    "loop_narrow_loads",
    "instructions",
)
"""What may not grow; wide_loads may not shrink."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ROWS = {
    "mask": "*i1",
    "live": "*i1",
    "target_ids": "*i64",
    "sequence_ids": "*i64",
    "group_ids": "*i64",
}
FLOATS = (
    "proximal", "weights", "reference", "advantages", "scales", "partials", "row_metrics",
    "log_probs", "entropies", "lse", "probability", "label", "divergences", "scale", "behaviour",
    "log_probability", "rewards", "bounds", "factor",
)  # fmt: skip
NUMBERS = dict.fromkeys(
    (
        "logit_scale", "inverse_temperature", "clip_low", "clip_high", "dual_clip",
        "sapo_positive", "sapo_negative", "floor", "cap", "kl_coefficient", "entropy_coefficient",
    ),
    "fp32",
)  # fmt: skip
TYPES = ROWS | dict.fromkeys(FLOATS, "*fp32") | NUMBERS | {"sums": "*fp64", "given": "*fp64"}
MATRICES = ("logits", "student", "teacher", "gradient", "matrix")


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel.

    types: adds to or overrides TYPES, integers default to i32. integers: their values in the
    launch, where it is specialised for them. unaligned: pointers that no launch may take for
    multiples of 16. sweeps: how many rows each loop over full tiles reads, in order.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    integers: dict[str, int] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    entry_bytes: int = 4
    sweeps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lie:
    """How rows of logits and of their gradient lie: number, vocabulary, strides in entries."""

    rows: int
    vocabulary: int
    stride: int
    gradient_stride: int

    def tensors(self, source: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits and gradient; never touched, so that they cost nothing."""
        shape = (self.rows, self.vocabulary)
        logits = torch.empty(self.rows * self.stride, dtype=source)
        gradient = torch.empty(self.rows * self.gradient_stride, dtype=target)
        return (
            logits.as_strided(shape, (self.stride, 1)),
            gradient.as_strided(shape, (self.gradient_stride, 1)),
        )


LIES = {
    "even": Lie(4, 151_936, 151_936, 151_936),
    "odd vocabulary": Lie(4, 50_257, 50_272, 50_272),  # rows of `Projection.buffer`
    "odd strides": Lie(4, 50_257, 50_257, 50_257),
    "unequal strides": Lie(4, 50_257, 50_257, 50_258),
    "one row": Lie(1, 50_257, 50_257, 50_257),
}
FULL, HALF = torch.float32, torch.bfloat16
# float32 chunks of the LM head, bf16 logits of a caller.
PAIRS = {
    "even": ((FULL, HALF), (HALF, HALF)),
    "odd vocabulary": ((FULL, HALF),),
    "odd strides": ((HALF, HALF),),
    "unequal strides": ((HALF, HALF),),
    "one row": ((HALF, HALF),),
}
SHORT = {
    ("policy", "even", FULL), ("policy", "odd vocabulary", FULL), ("policy", "odd strides", HALF),
    ("policy", "unequal strides", HALF), ("policy", "one row", HALF), ("jsd", "even", FULL),
    ("statistics", "even", HALF),
}  # fmt: skip
KERNELS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "policy": (
        triton_rows.policy_kernel,
        (1, 1),
        policy_constants(PolicyLossSettings()) | {"HAS_GRADIENT": True},
    ),
    "policy, entropy": (
        triton_rows.policy_kernel,
        (1, 1),
        policy_constants(PolicyLossSettings(entropy_coefficient=0.1)) | {"HAS_GRADIENT": True},
    ),
    "policy, KL, soft cap": (
        triton_rows.policy_kernel,
        (1, 1),
        policy_constants(PolicyLossSettings(kl_coefficient=0.1), has_reference=True)
        | {"HAS_GRADIENT": True, "SOFT_CAP": 30.0},
    ),
    "statistics": (triton_rows.statistics_kernel, (1,), {}),
    "gradient": (triton_rows.gradient_kernel, (1,), {"HAS_ENTROPY": False}),
    "gradient, entropy, soft cap": (
        triton_rows.gradient_kernel,
        (1,),
        {"HAS_ENTROPY": True, "SOFT_CAP": 30.0},
    ),
    "jsd": (triton_jsd.jsd_kernel, (1, 1, 2, 2), {"BETA": 0.5, "HAS_GRADIENT": True}),
    "forward KL": (triton_jsd.jsd_kernel, (1, 1, 2, 2), {"BETA": 0.0, "HAS_GRADIENT": True}),
}


def row_case(name: str, lie: str, source: torch.dtype, target: torch.dtype) -> Case:
    """A kernel over rows of `source` logits that writes a `target` gradient: over its own float32
    logits where that is bf16."""
    kernel, sweeps, constants = KERNELS[name]
    logits, gradient = LIES[lie].tensors(source, target)
    found = rows_of(logits, gradient, rows_read=max(sweeps), shares_rows="rows" in kernel.arg_names)
    options = {key: found.pop(key) for key in ("num_warps", "maxnreg") if key in found}
    constants = {"SOFT_CAP": 0.0, "SHARES_STORAGE": source != target, **constants, **found}
    types = {matrix: f"*{DTYPES[source]}" for matrix in MATRICES}
    strides = ("logits_stride", "student_stride", "teacher_stride", "stride")
    return Case(
        f"{name} {DTYPES[source]}->{DTYPES[target]}, {lie}",
        kernel,
        types | {"gradient": f"*{DTYPES[target]}"},
        {key: value for key, value in constants.items() if key in kernel.arg_names},
        options,
        dict.fromkeys(strides, logits.stride(0))
        | {"rows": len(logits), "vocabulary": logits.shape[1], "shared": logits.shape[1]}
        | {"gradient_stride": gradient.stride(0)},
        () if found["ROWS"] == "aligned" else MATRICES,
        source.itemsize,
        sweeps,
    )


def cases(is_short: bool = False) -> Iterator[Case]:
    """Everything the package launches, in the dtypes of bf16 training."""
    for name in KERNELS:
        for lie, pairs in PAIRS.items():
            for source, target in pairs:
                if not is_short or (name, lie, source) in SHORT:
                    yield row_case(name, lie, source, target)
    if is_short:
        return
    scale = {"BLOCK": SCALE_BLOCK}
    yield Case(
        "scale bf16",
        triton_rows.scale_kernel,
        {"matrix": "*bf16"},
        scale,
        {"num_warps": SCALE_WARPS},
    )
    samples = {"CORRECTION": 1, "HAS_BEHAVIOUR": True, "BLOCK": 1024}
    yield Case("samples", triton_samples.samples_kernel, {}, samples, {"num_warps": 4})
    modes = {"EPS": 1e-6, "MODE": "norm_without_zero", "IS_GIVEN": False, "BLOCK": ADVANTAGE_BLOCK}
    yield Case("advantages", triton_advantages.advantages_kernel, {}, modes, {"num_warps": 16})


def compiled(case: Case, architecture: int) -> Any:
    """The kernel for one architecture, specialised as a launch does it: pointers at multiples of
    16, integers that are such multiples, and integers that are 1."""
    constants = dict(case.constants)
    signature, attributes = {}, {}
    for index, parameter in enumerate(case.kernel.params):
        name = parameter.name
        kind = (TYPES | case.types).get(name, "i32")
        value = case.integers.get(name, 16)
        if kind == "i32" and value == 1 and not parameter.do_not_specialize:
            constants[name] = 1
        signature[name] = "constexpr" if name in constants else kind
        is_multiple = value % 16 == 0 and not parameter.do_not_specialize
        if name in constants or kind == "fp32":
            continue
        if is_multiple if kind == "i32" else name not in case.unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)


def read_cubin(cubin: bytes, *options: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread (where spills go)."""
    text = read_cubin(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {text!r}")
    return int(found[1]), int(found[2])


def load_widths(ptx: str) -> Counter[int]:
    """How many load instructions from device memory there are of each width in bytes."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(
        r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](8|16|32|64)\b", ptx
    ):
        widths[int(vector or 1) * int(bits) // 8] += 1
    return widths


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each machine instruction."""
    return [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)
    ]


def full_tile_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The innermost loops that take exponentials of entries loaded without a mask."""
    spans = []
    for address, text in code:
        jump = re.match(r"(?:@\S+ )?BRA\S* .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address:
            spans.append((int(jump[1], 16), address))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in spans)
    ]
    loops = [[text for at, text in code if begin <= at <= end] for begin, end in inner]
    return [
        loop
        for loop in loops
        if any("MUFU.EX2" in text for text in loop)
        and any(text.startswith("LDG") for text in loop)
        and not any(re.match(r"@\S+ LDG", text) for text in loop)
    ]


def load_bytes(text: str) -> int:
    """Bytes that one LDG instruction loads."""
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", text.split()[0])
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


def loop_numbers(case: Case, sass: str) -> dict[str, float]:
    """Barriers of the kernel, and what its loops over full tiles cost."""
    code = instructions(sass)
    barriers = sum("BAR.SYNC" in text for _, text in code)
    loops = full_tile_loops(code) if case.sweeps else []
    if len(loops) != len(case.sweeps):
        raise RuntimeError(
            f"{case.name}: {len(loops)} loops over full tiles, expected {len(case.sweeps)}"
        )
    total, inside, narrow = 0.0, 0, 0
    for loop, rows in zip(loops, case.sweeps, strict=True):
        loads = [load_bytes(text) for text in loop if text.startswith("LDG")]
        total += len(loop) * rows * case.entry_bytes / sum(loads)
        inside += sum("BAR.SYNC" in text for text in loop)
        narrow += sum(load < 16 for load in loads)
    return {
        "barriers": barriers,
        "loop_barriers": inside,
        "loop_narrow_loads": narrow,
        "instructions": round(total, 1),
    }


def measured(case: Case, architecture: int) -> dict[str, float]:
    """The numbers that are held to the budget."""
    kernel = compiled(case, architecture)
    registers, stack = resources(kernel.asm["cubin"])
    widths = load_widths(kernel.asm["ptx"])
    wide = sum(count for width, count in widths.items() if width >= 16)
    return {
        "registers": registers,
        "spill_bytes": stack,
        "wide_loads": wide,
        "other_loads": sum(widths.values()) - wide,
        **loop_numbers(case, read_cubin(kernel.asm["cubin"], "-sass")),
    }


def complaints(key: str, found: dict[str, float], budget: dict[str, float] | None) -> list[str]:
    """What got worse, one sentence each."""
    if budget is None:
        return [f"{key}: not in the budget; run with --write"]
    worse = [name for name in LIMITED if found[name] > budget[name]]
    worse += ["wide_loads"] if found["wide_loads"] < budget["wide_loads"] else []
    return [f"{key}: {name} is {found[name]}; the budget is {budget[name]}" for name in worse]


def all_measured(is_short: bool, only: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Key and numbers of every case on every architecture; of a short run on sm_90, and policy on
    the others too."""
    for architecture in ARCHITECTURES:
        with using_tuning(TUNINGS.get(architecture // 10, Tuning())):
            for case in cases(is_short):
                key = f"{case.name} sm_{architecture}"
                is_wanted = not is_short or architecture == 90 or key.startswith("policy fp32")
                if only in key and is_wanted:
                    yield key, measured(case, architecture)


def main() -> int:
    """Measure the cases on all architectures; compare or write. Raises UserError."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="write the budget instead of comparing with it"
    )
    parser.add_argument("--short", action="store_true", help="a few cases only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    results, problems = {}, []
    for key, numbers in all_measured(options.short, options.only):
        results[key] = numbers
        problems += [] if options.write else complaints(key, numbers, budget.get(key))
        print(f"{key:60s} {numbers}", flush=True)
    if not results:
        raise UserError(f"--only: no case has {options.only!r} in its name")
    if options.write:
        kept = budget if options.only or options.short else {}
        BUDGET.write_text(
            json.dumps(kept | results | {"triton": triton.__version__}, indent=1, sort_keys=True)
            + "\n"
        )
        return 0
    if budget.get("triton") != triton.__version__:
        print(
            f"the budget was written with Triton {budget.get('triton')}, this is "
            f"{triton.__version__}"
        )
    print("\n".join(problems) or f"all {len(results)} within the budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
