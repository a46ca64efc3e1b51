"""The package alone: what it loads, what it needs, and the example of its README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zppo_kernels

README = Path(__file__).parents[2] / "kernels/README.md"

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "triton", "zppo", "zppo_actors", "zppo_protocol", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch
import zppo_kernels as kernels
from zppo_kernels.backends import backend_for

assert backend_for(torch.zeros(1)).name == "torch"
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
ids = torch.tensor([1, 2, 3, 4, -100])
log_probs, _ = kernels.token_log_probs(hidden, weight, ids)
advantages = kernels.group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
output = kernels.policy_loss_from_hidden(
    hidden, weight, ids, sequence_ids_T=torch.tensor([0, 0, 1, 1, 1]), advantages_S=advantages,
    proximal_log_probs_T=log_probs, token_count=4,
)
output.loss.backward()
assert weight.grad.abs().max() > 0
assert kernels.balanced_partition([3, 2, 1], 2) == [[0], [1, 2]]
print("fine")
"""


@pytest.mark.slow
def test_plain_torch_is_enough() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.slow
def test_triton_is_imported_late() -> None:
    script = "import sys, zppo_kernels; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_nothing_is_loaded_but_torch_numpy_and_numba() -> None:
    """Whatever these three load themselves is theirs."""
    script = (
        "import sys, torch, numpy, numba; before = {name.split('.')[0] for name in sys.modules}; "
        "import zppo_kernels;"
        "after = {name.split('.')[0] for name in sys.modules}; print(*after - before - "
        "sys.stdlib_module_names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["zppo_kernels"]


@pytest.mark.slow
def test_the_example_of_the_readme_runs_and_learns() -> None:
    example, _ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    script = (
        example
        + "\nassert after.loss.item() < output.loss.item(), (after, output)\nprint('learnt')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.split()[-1:] == ["learnt"], done.stderr
    assert len(example.splitlines()) <= 50, "one screen"


def test_the_readme_names_what_is_stable() -> None:
    _, stable = README.read_text(encoding="utf-8").split("## Stable names\n")
    assert set(re.findall(r"`(\w+)`", stable.split("\n\n")[0])) == set(zppo_kernels.__all__)
