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


def compared(trainer: Any, theirs: Any, ratio: str | None) -> list[tuple[float, float, float]]:
    """Train; for each micro-batch our loss, TRL's, and the largest relative error of a gradient.

    `ratio`: weights as TRL gives them where vLLM samples, of a "token" or a "sequence".
    """
    ours, found = type(trainer)._compute_loss, []

    def both(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if ratio is not None:
            size, length = inputs["completion_ids"].shape
            weights = torch.rand(size, length if ratio == "token" else 1) + 0.5
            weights[0] = 0.0  # masked
            inputs = inputs | {"importance_sampling_ratio": weights}
        parameters = [p for p in model.parameters() if p.requires_grad]
        trainer.use_vllm = ratio is not None
        expected = theirs._compute_loss(trainer, model, inputs)
        wanted = torch.autograd.grad(expected, parameters)
        loss = ours(trainer, model, inputs)
        trainer.use_vllm = False
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        error = max(map(relative_error, gradients, wanted))
        found.append((loss.item(), expected.item(), error))
        return loss

    trainer._compute_loss = both
    trainer.train()
    return found


CASES: dict[str, dict[str, Any]] = {
    "dapo": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "ratio": "token"},
    "grpo": {"num_iterations": 2, "beta": 0.1, "delta": 4.0, "ratio": "sequence"},
    "dr_grpo": {"num_iterations": 2, "importance_sampling_level": "sequence", "beta": 0.1},
    "luspo": {"num_iterations": 2, "importance_sampling_level": "sequence"},
    "bnpo": {
        "gradient_accumulation_steps": 2,
        "temperature": 0.7,
        "beta": 0.1,
        "use_bias_correction_kl": False,
    },
    "cispo": {"num_iterations": 2, "epsilon_high": 1.2, "gradient_accumulation_steps": 2},
    "sapo": {"num_iterations": 2, "ratio": "token"},
}


@pytest.mark.parametrize("loss_type", CASES)
def test_loss_and_gradients_equal_trls(example: ModuleType, loss_type: str, tmp_path: Path) -> None:
    """From the first step, whose ratio is 1, to later ones that are off policy."""
    changes = {"loss_type": loss_type, "max_steps": 4, "logging_steps": 1, **CASES[loss_type]}
    ratio = changes.pop("ratio", None)
    trainer = example.trainer_for(example.FusedGRPOTrainer, str(tmp_path), **changes)
    found = compared(trainer, example.GRPOTrainer, ratio)
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
            {"loss_type": "vespo"},
            "loss_type is 'vespo'; expected one of dapo, bnpo, grpo, dr_grpo, luspo, cispo, sapo",
        ),
        (
            {"entropy_coef": 0.1},
            "top_entropy_quantile, entropy_coef, off_policy_mask_threshold and "
            "router_aux_loss_coef are not in this loss",
        ),
    ],
)
def test_what_it_lacks_is_refused(
    example: ModuleType, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        example.trainer_for(example.FusedGRPOTrainer, str(tmp_path), **changes)
    assert str(caught.value) == message
