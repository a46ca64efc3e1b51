"""`python -m zppo_actors ROLE …` starts one process: the supervisor or an actor of a run, the agent
of a further host, an evaluation, a suite, a calibration, an audit."""

from __future__ import annotations

import sys

from zppo.errors import EXIT_INTERRUPTED, run_command
from zppo.signals import take_for_ctrl_c


def main(argv: list[str]) -> int:
    """Hand over to the supervisor or to the named role. Ctrl-C or SIGTERM that the role does not
    take, as while its modules are still imported, ends it with one line."""
    take_for_ctrl_c()
    try:
        return _role(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _role(argv: list[str]) -> int:
    from zppo_actors import process

    if argv[:1] == ["supervisor"]:
        # Imported here because an actor needs neither the terminal view nor the process table.
        from zppo_actors.supervisor import supervisor

        return process.guarded(lambda: supervisor.main(argv[1:]))
    if argv[:1] == ["host"]:
        from zppo_actors.hosts import process as host

        return process.guarded(lambda: host.main(argv[1:]))
    if argv[:1] == ["seats"]:
        from zppo_actors.hosts import seats

        return process.guarded(lambda: seats.main(argv[1:]))
    if argv[:1] == ["evaluate"]:
        from zppo_actors.evaluator import process as evaluation

        return run_command(lambda: process.guarded(lambda: evaluation.main(argv[1:])))
    if argv[:1] == ["suite"]:
        from zppo_actors.suites import process as suite

        return run_command(lambda: process.guarded(lambda: suite.main(argv[1:])))
    if argv[:1] == ["calibrate"]:
        from zppo_actors.calibrator import process as calibration

        return process.guarded(lambda: calibration.main(argv[1:]))
    if argv[:1] == ["audit"]:
        from zppo_actors import audit

        return run_command(lambda: process.guarded(lambda: audit.main(argv[1:])))
    if argv[:1] == ["nursery"]:
        from zppo_actors import nursery

        return process.guarded(lambda: nursery.main(argv[1:]))
    return process.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
