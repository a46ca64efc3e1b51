"""The losses in other people's training loops: compiled with the model, and sharded by FSDP2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fsdp_ranks
import pytest
import torch
from kernel_cases import relative_error
from torch import nn

from zppo_kernels import policy_loss_from_hidden

WORLD = 2


@pytest.mark.slow
def test_ranks_of_fsdp2_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Two processes over gloo, parameters in shards, against plain torch in this one."""
    command = [sys.executable, "-P", fsdp_ranks.__file__, str(WORLD), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    loss, gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected, wanted = fsdp_ranks.whole()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) < 1e-5, name


@pytest.mark.slow
def test_a_whole_step_compiles_into_one_graph() -> None:
    """Body, head and loss through the compiler that makes code, where there is one for C++."""
    body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16))
    head = nn.Linear(16, 50)
    inputs = torch.randn(7, 8)
    ids = torch.arange(7)

    def step(inputs_TI: torch.Tensor) -> torch.Tensor:
        output = policy_loss_from_hidden(
            body(inputs_TI),
            head.weight,
            ids,
            bias_V=head.bias,
            sequence_ids_T=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
            advantages_S=torch.tensor([1.0, -1.0]),
            proximal_log_probs_T=torch.full((7,), -4.0),
            token_count=7,
        )
        return 2.0 * output.loss

    parameters = [*body.parameters(), *head.parameters()]
    eager = step(inputs)
    wanted = torch.autograd.grad(eager, parameters)
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)(inputs)
    gradients = torch.autograd.grad(compiled, parameters)
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-6)
    assert max(map(relative_error, gradients, wanted)) < 1e-5
