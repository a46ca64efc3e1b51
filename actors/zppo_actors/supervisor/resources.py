"""What an attempt at a run holds of the system, from its start to its end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from zppo.records.run_directory import RunRecord
from zppo_actors import runtime
from zppo_actors.supervisor.listening import Ears
from zppo_protocol.limits import limits_for
from zppo_protocol.sockets import Dealer
from zppo_protocol.values import SUPERVISOR


class Resources(Struct, frozen=True):
    """The runtime folder, the reading end of the parent pipe, the line to the controller."""

    folder: Path
    parent_fd: int
    dealer: Dealer


@contextmanager
def resources(record: RunRecord, roles: Mapping[str, str], ears: Ears) -> Iterator[Resources]:
    """Make the resources of one attempt, with the keys of `roles`, and take them away again, in the
    order that leaves nothing behind. Raises UserError if its folder cannot be made."""
    ears.hang_up()
    folder, lock = runtime.create(record.run_id)
    # Only the reading end is ever handed on: the end of this process, however it comes, is the end
    # of the file for all others.
    read_end, write_end = os.pipe()
    dealer = None
    try:
        runtime.issue_keys(folder, roles, *ears.addresses(folder))
        limits = limits_for(record.topology.transport.max_message_mib)
        dealer = Dealer(runtime.credentials(folder, SUPERVISOR), limits)
        yield Resources(folder, read_end, dealer)
    finally:
        if dealer is not None:
            dealer.close()
        runtime.remove(folder)
        # The lock after the folder, so that no sweep of another run meets it half removed.
        for descriptor in (read_end, write_end, lock):
            os.close(descriptor)
