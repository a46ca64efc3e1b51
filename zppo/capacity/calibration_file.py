"""The calibration as a file: YAML or JSON, read strictly and written so that people can edit it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import yaml

from zppo.config.strict_yaml import parse
from zppo.errors import UserError
from zppo.records.atomic_file import written_whole
from zppo.simulation import Calibration


def read_calibration(path: Path) -> Calibration:
    """The measured speeds in a YAML or JSON file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--calibration: cannot read {str(path)!r}: {reason}") from error
    try:
        return msgspec.convert(parse(text, str(path)).data, Calibration)
    except msgspec.ValidationError as error:
        raise UserError(
            f"--calibration: {str(path)!r} is not a calibration: {error}; see docs/plan.md"
        ) from error


def check_writable(path: Path) -> None:
    """Raises UserError for a file that is there already or has no folder, before anything is
    measured for it."""
    if path.exists():
        raise UserError(f"--write: {str(path)!r} exists already; name another file, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--write: there is no folder {str(path.parent)!r}; make it first")


def write_calibration(path: Path, calibration: Calibration, source: str) -> None:
    """Write the file whole or not at all; `source` says in its first line where it is from. Raises
    UserError."""
    data = msgspec.to_builtins(calibration)
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    try:
        with written_whole(path) as file:
            file.write(f"# {source}\n{body}".encode())
    except OSError as error:
        raise UserError(f"--write: cannot write {str(path)!r}: {error.strerror}") from error
