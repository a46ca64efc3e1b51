"""What a trainer whose card is full says, the first rank as any other."""

from __future__ import annotations

import sys

from zppo.config.topology import TrainerConfig
from zppo.errors import EXIT_FAILED, first_line


def out_of_memory(error: Exception, trainer: TrainerConfig) -> int:
    """Say on stderr what would need less memory; the exit code, with which the run begins again
    from its last checkpoint: an engine on the same card may have held more for a moment."""
    ways = [f"lower actors.trainer.micro_batch_tokens ({trainer.micro_batch_tokens})"]
    if not trainer.gradient_checkpointing:
        ways.append("set actors.trainer.gradient_checkpointing to true")
    print(f"{first_line(error).rstrip('.')}; {' or '.join(ways)}", file=sys.stderr, flush=True)
    return EXIT_FAILED
