"""The parser of every command: a mistake on the command line is one sentence, like every other user error."""

from __future__ import annotations

import argparse
from typing import NoReturn

from zppo.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
