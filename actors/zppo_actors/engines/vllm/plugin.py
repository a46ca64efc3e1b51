"""What vLLM loads into each of its processes: our way of taking weights, and a tie to the process
that started it.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package, in the actor, in
the engine core and in every worker. It must stay light and harmless, because it is loaded wherever
vLLM runs next to this package.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

from zppo.signals import die_with_parent

BACKEND = "zppo_shared_memory"
"""Name of our weight transfer engine, as in vLLM's `weight_transfer_config`."""
ENTRY_POINT = "zppo"
TIE_VARIABLE = "ZPPO_TIE_TO_PARENT"


def register() -> None:
    """Make the weight transfer engine known; tie child processes to their parent where the actor
    asks for it."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "zppo_actors.engines.vllm.weights", "SharedMemoryWeightTransferEngine"
        )
    if os.environ.get(TIE_VARIABLE) == "1":
        tie_to_parent()


def tie_to_parent() -> None:
    """End this child process when its parent has ended in whatever way, so that no engine outlives
    its actor.

    Engine core and workers are started by the main thread of their parent, so the end of that
    thread is the end of the process. Does nothing in a process that multiprocessing did not start,
    or on another system than Linux.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before the tie was made
        os._exit(1)
