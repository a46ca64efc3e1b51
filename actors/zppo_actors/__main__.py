"""`python -m zppo_actors ROLE …` starts one process of a run: the supervisor, or an actor that it spawns."""

from __future__ import annotations

import sys

from zppo_actors import process


def main(argv: list[str]) -> int:
    """Hand over to the supervisor or to the named role."""
    if argv[:1] == ["supervisor"]:
        # Imported here because an actor needs neither the terminal view nor the process table.
        from zppo_actors import supervisor

        return process.guarded(lambda: supervisor.main(argv[1:]))
    return process.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
