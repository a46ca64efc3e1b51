"""Put torchvision into a folder of its own, for tests of vLLM beside the CPU build of torch.

    python tools/get_torchvision.py --out .venv/torchvision

vLLM's code of Qwen3.5 imports torchvision. On PyPI that is built for GPUs: beside the CPU build of
torch its compiled part cannot be loaded, and its Python part stops where it registers two operators
of that. What turns pictures into pixels is Python and torch alone, so here the two are declared,
with nothing behind them. Only a process that has the folder on its path finds it; transformers in
any other must not, because it would take torchvision for whole. Where pip finds a build that fits
(https://download.pytorch.org/whl/cpu), nothing of this is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from zppo.errors import Parser, run_command

LOCK = Path(__file__).parents[1] / "requirements.lock"
DECLARED = """

if not _has_ops():
    # Added by tools/get_torchvision.py: operators without kernels, for the rest to be imported.
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
"""
PROBE = (
    "import torch; from torchvision.transforms.v2 import functional as f; "
    "assert f.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), (4, 4)).shape == (3, 4, 4)"
)


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    wanted = ["--no-deps", "--target", str(out), "-c", str(LOCK), "torchvision"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    if subprocess.run([sys.executable, "-m", "pip", *quiet, "install", *wanted]).returncode:
        return 1
    with (out / "torchvision" / "extension.py").open("a") as file:
        file.write(DECLARED)
    version = out / "torchvision" / "version.py"
    version.write_text(re.sub(r"\+\w+", "+python", version.read_text()))
    usable = subprocess.run(
        [sys.executable, "-P", "-c", PROBE], env={**os.environ, "PYTHONPATH": str(out)}
    )
    if usable.returncode:
        shutil.rmtree(out)
        print(f"torchvision cannot be used beside the installed torch; {out} is removed")
    return usable.returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
