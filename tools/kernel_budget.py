"""Compile every Triton kernel ahead of time, without a GPU, and hold it to a budget of registers,
spills and load widths.

    python tools/kernel_budget.py            compare with kernels/budget.json; exit 1 if worse
    python tools/kernel_budget.py --write    measure and write the budget

Each case is compiled as a launch on the named vocabulary would specialise it: 16-divisible sizes
and strides, and the tile that `rows_triton.block_and_warps` chooses. Registers and stack (spills)
are read from the cubin, load widths from the PTX.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before Triton is imported: compiled kernels are wanted here, and its default for fused
# multiply-add is about to change.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zppo_kernels import triton_advantages, triton_jsd, triton_rows, triton_samples
from zppo_kernels.launch_advantages import BLOCK as ADVANTAGE_BLOCK
from zppo_kernels.rows_triton import block_and_warps, policy_constants
from zppo_kernels.settings import PolicyLossSettings

BUDGET = Path(__file__).parents[1] / "kernels/budget.json"
ARCHITECTURES = (80, 90, 100)
VOCABULARIES = (151_936, 248_320)
SIZES = {"fp32": 4, "bf16": 2}

ROWS = {"mask": "*i1", "target_ids": "*i64", "sequence_ids": "*i64"}
FLOATS = (
    "proximal",
    "weights",
    "reference",
    "advantages",
    "scales",
    "partials",
    "row_metrics",
    "log_probs",
    "entropies",
    "lse",
)
FLOATS += (
    "probability",
    "label",
    "divergences",
    "scale",
    "behaviour",
    "cap",
    "rewards",
    "bounds",
    "factor",
)
TYPES = (
    ROWS | dict.fromkeys(FLOATS, "*fp32") | {"group_ids": "*i64", "sums": "*fp64", "given": "*fp64"}
)


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel; `types` adds to or overrides TYPES, integers default to
    i32."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def row_case(
    name: str, kernel: Any, vocabulary: int, source: str, target: str, **constants: Any
) -> Case:
    """A kernel over rows of `source` logits that writes a `target` gradient."""
    is_jsd = kernel is triton_jsd.jsd_kernel
    block, warps = block_and_warps(vocabulary, SIZES[source] * (2 if is_jsd else 1))
    names = kernel.arg_names
    if "SHARES_STORAGE" in names:
        constants["SHARES_STORAGE"] = source != target
    if "INVERSE_TEMPERATURE" in names:
        constants.setdefault("INVERSE_TEMPERATURE", 1.0)
    types = {
        "logits": f"*{source}",
        "student": f"*{source}",
        "teacher": f"*{source}",
        "gradient": f"*{target}",
    }
    types["matrix"] = f"*{source}"
    return Case(
        f"{name} {source}->{target} V={vocabulary}",
        kernel,
        types,
        constants | {"BLOCK": block},
        warps,
    )


def cases() -> list[Case]:
    """Everything the package launches, in the dtypes of bf16 training: float32 chunks that become
    bf16, or bf16 logits.
    """
    policy = policy_constants(PolicyLossSettings(), False) | {"HAS_GRADIENT": True}
    with_kl = policy_constants(PolicyLossSettings(kl_coefficient=0.1), True) | {
        "HAS_GRADIENT": True
    }
    result = []
    for vocabulary in VOCABULARIES:
        for source in ("fp32", "bf16"):
            for name, kernel, constants in (
                ("policy", triton_rows.policy_kernel, policy),
                ("policy, KL", triton_rows.policy_kernel, with_kl),
                ("statistics", triton_rows.statistics_kernel, {}),
                ("gradient", triton_rows.gradient_kernel, {"TEMPERATURE": 1.0}),
                ("jsd", triton_jsd.jsd_kernel, {"BETA": 0.5, "HAS_GRADIENT": True}),
            ):
                result.append(row_case(name, kernel, vocabulary, source, "bf16", **constants))
        result.append(row_case("scale", triton_rows.scale_kernel, vocabulary, "bf16", "bf16"))
    samples = {"CORRECTION": 1, "HAS_BEHAVIOUR": True, "HAS_KL": False, "BLOCK": 1024}
    result.append(Case("samples", triton_samples.samples_kernel, {}, samples, 4))
    modes = {
        "EPS": 1e-6,
        "IS_GRPO": False,
        "IS_CENTER_ONLY": False,
        "COUNTS_TRIVIAL": False,
        "IS_GIVEN": False,
    }
    modes["BLOCK"] = ADVANTAGE_BLOCK
    advantages = {"advantages": "*fp32"}
    result.append(Case("advantages", triton_advantages.advantages_kernel, advantages, modes, 16))
    return result


def compiled(case: Case, architecture: int) -> Any:
    """The kernel for one architecture, with the attributes that a launch would infer from its
    arguments."""
    names = case.kernel.arg_names
    types = TYPES | case.types
    signature = {
        name: "constexpr" if name in case.constants else types.get(name, "i32") for name in names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in case.constants
    }
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes
    )
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps}
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread (where spills go)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
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


def measured(case: Case, architecture: int) -> dict[str, int]:
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
    }


def complaints(key: str, found: dict[str, int], budget: dict[str, int] | None) -> list[str]:
    """What got worse, one sentence each."""
    if budget is None:
        return [f"{key}: not in the budget; run with --write"]
    worse = [
        name for name in ("registers", "spill_bytes", "other_loads") if found[name] > budget[name]
    ]
    worse += ["wide_loads"] if found["wide_loads"] < budget["wide_loads"] else []
    return [f"{key}: {name} is {found[name]}; the budget is {budget[name]}" for name in worse]


def main() -> int:
    """Measure all cases on all architectures; compare or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="write the budget instead of comparing with it"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    results, problems = {}, []
    for case in cases():
        for architecture in ARCHITECTURES:
            key = f"{case.name} sm_{architecture}"
            if options.only in key:
                results[key] = measured(case, architecture)
                problems += complaints(key, results[key], budget.get(key))
                print(f"{key:44s} {results[key]}", flush=True)
    if options.write:
        BUDGET.write_text(
            json.dumps(budget | results | {"triton": triton.__version__}, indent=1, sort_keys=True)
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
    sys.exit(main())
