"""`zppo join`: take part in a run of several hosts, as one of the further ones.

It becomes the host agent (`zppo_actors.hosts`), which runs this host's processes until the run is
over. The key file, which `zppo launch` has written on the controller's host, says which host this
is, where the run is, and proves that it may take part; no secret stands on a command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from zppo.config.options import seconds
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, become_actor, run_command

WAIT_SECONDS = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Become the agent of this host. Returns 2 after a user error; else it does not return."""
    parser = Parser(
        prog="zppo join", description="Run the processes that a run wants on this host."
    )
    parser.add_argument(
        "--key",
        required=True,
        type=Path,
        metavar="FILE",
        help="this host's key file, which zppo launch has written; it is waited for",
    )
    parser.add_argument(
        "--wait",
        type=seconds,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for the key file and the run (default: {WAIT_SECONDS:g})",
    )
    try:
        asked = parser.parse_args(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    become_actor("host", "--key", str(asked.key.absolute()), "--wait", str(asked.wait))


if __name__ == "__main__":
    sys.exit(run_command(main))
