"""The trainer and the engine 'transformers' on a card that is none (`card.py`): what would break at
the first touch of a GPU. All checks: see `card_checks.py`; here are those that take seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import card
import card_checks
import pytest
import torch

FEW = ("refusals", "full card", "engine", "clip")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None
    or importlib.util.find_spec("triton") is None
    or torch.version.cuda is not None,
    reason="needs g++, Triton and a torch without CUDA",
)
def test_a_card_does_what_a_cpu_does_and_is_full_in_one_sentence(tmp_path: Path) -> None:
    library = card.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", card.__file__, library, card_checks.__file__, *FEW],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    assert (
        "CUDA out of memory. Tried to allocate 5120 bytes; lower actors.trainer."
        "micro_batch_tokens (16384) or set actors.trainer.gradient_checkpointing to true"
    ) in done.stderr.splitlines()
