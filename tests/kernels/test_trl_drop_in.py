"""The example that puts our loss into TRL's GRPOTrainer: on every micro-batch of a real training,
TRL's own loss and gradients are computed from the same inputs and compared.

`make peers` installs TRL and runs these tests; they are skipped where it is absent.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.peers]
EXAMPLE = Path(__file__).parents[2] / "examples/trl_drop_in.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("trl", reason="TRL is not installed")
    spec = importlib.util.spec_from_file_location("trl_drop_in", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compared(trainer: Any, theirs: Any) -> list[tuple[float, float, float]]:
    """Train; for each micro-batch our loss, TRL's, and the largest relative error of a gradient."""
    ours, found = type(trainer)._compute_loss, []

    def both(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = theirs._compute_loss(trainer, model, inputs)
        wanted = torch.autograd.grad(expected, parameters)
        loss = ours(trainer, model, inputs)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        error = max(map(relative_error, gradients, wanted))
        found.append((loss.item(), expected.item(), error))
        return loss

    trainer._compute_loss = both
    trainer.train()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {
            "loss_type": "grpo",
            "num_iterations": 2,
            "delta": 4.0,
            "beta": 0.1,
            "use_bias_correction_kl": False,
        },
        {"loss_type": "dr_grpo", "num_iterations": 2, "importance_sampling_level": "sequence"},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "temperature": 0.7},
    ],
    ids=lambda changes: changes["loss_type"],
)
def test_loss_and_gradients_equal_trls(
    example: ModuleType, changes: dict[str, Any], tmp_path: Path
) -> None:
    """From the first step, whose ratio is 1, to later ones that are off policy."""
    changes = {"max_steps": 4, "logging_steps": 1, **changes}
    trainer = example.trainer_for(example.FusedGRPOTrainer, str(tmp_path), **changes)
    found = compared(trainer, example.GRPOTrainer)
    assert len(found) == 4 * changes.get("gradient_accumulation_steps", 1)
    for loss, expected, error in found:
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert error < 1e-4
    moved = [line.get("approximate_kl", 0.0) for line in trainer.state.log_history]
    off_policy = "num_iterations" in changes or "steps_per_generation" in changes
    assert (max(moved) > 1e-6) == off_policy


def test_it_learns(example: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    example.main()
    first, *_, last = (float(word) for word in capfd.readouterr().out.split()[-5::2])
    assert last > first + 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_type": "sapo"},
            "loss_type is 'sapo'; expected one of dapo, bnpo, grpo, dr_grpo",
        ),
        (
            {"beta": 0.1},
            "use_vllm, top_entropy_quantile, entropy_coef and use_bias_correction_kl (with beta) "
            "are not in this loss",
        ),
    ],
)
def test_what_it_lacks_is_refused(
    example: ModuleType, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        example.trainer_for(example.FusedGRPOTrainer, str(tmp_path), **changes)
    assert str(caught.value) == message
