"""A training run with the fused loss is the run with plain torch, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.mark.slow
def test_loss_curves_coincide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(
        BENCHES
    )  # for this test alone: its `kernels.py` bears the name of a package
    from kernel_curves import both_curves

    curves = both_curves(25)
    assert max(map(abs, curves["plain"])) > 1e-3, "the run learns something"
    assert curves["fused"] == pytest.approx(curves["plain"], abs=1e-6)
