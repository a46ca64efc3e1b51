"""A dealer in a process of its own, for tests that stop or kill it: greets, then does what its last
argument says. Its credentials come on standard input."""

from __future__ import annotations

import os
import sys

from zppo_protocol.keys import unpack_credentials
from zppo_protocol.messages import Hello
from zppo_protocol.sockets import Dealer


def main(incarnation: str, then: str) -> None:
    credentials = unpack_credentials(sys.stdin.buffer.read())
    dealer = Dealer(credentials)
    dealer.send(
        Hello(
            protocol_version=1, run_id="r", actor=credentials.name, role="rollout",
            incarnation=int(incarnation), pid=os.getpid(), capacity=1,
        )
    )  # fmt: skip
    while (message := dealer.receive(60.0)) is not None:
        if then == "echo":
            dealer.send(message)


if __name__ == "__main__":
    main(*sys.argv[1:])
