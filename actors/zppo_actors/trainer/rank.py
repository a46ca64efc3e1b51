"""A rank of the trainer beyond the first: does what the first is told, and says nothing.

Only the first rank speaks with the controller and writes files. This one has its share of weights
and optimizer, computes its share of every step, and takes part when whole tensors are gathered.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers.utils.logging import disable_progress_bar

from zppo.errors import EXIT_FATAL
from zppo.training.batch import StalenessError
from zppo.training.state import build_trainer, exhaust, gather_moments
from zppo.training.step import train_step
from zppo_actors.process import ActorContext
from zppo_actors.trainer.checkpoint import starting_checkpoint
from zppo_actors.trainer.meeting import Meeting, is_loss, meet
from zppo_actors.trainer.memory import out_of_memory
from zppo_protocol.messages import SaveCheckpoint, Shutdown, TrainWindow


def main(context: ActorContext) -> int:
    """Follow the first rank until it leaves; returns the exit code of the process."""
    disable_progress_bar()
    meeting = meet(context)
    try:
        return follow(context, meeting)
    except StalenessError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_FATAL
    except torch.OutOfMemoryError as error:
        return out_of_memory(error, context.topology.actors.trainer)
    except Exception as error:
        if is_loss(error):
            return meeting.lost()
        raise


def follow(context: ActorContext, meeting: Meeting) -> int:
    """Load the student and obey.

    consumes: TrainWindow, SaveCheckpoint, Shutdown, from the first rank. produces: its part of
    every sum and of every tensor that is gathered. waits for: the next order. is unblocked by: an
    order, the end of another rank, the end of the supervisor.
    """
    checkpoint = starting_checkpoint(context, meeting.run_dir)
    trainer = build_trainer(context.topology, time.perf_counter, checkpoint, meeting.ranks)
    exhaust(trainer.policy.weights())
    while True:
        match meeting.hear():
            case TrainWindow() as window:
                train_step(trainer, window)
                exhaust(trainer.policy.weights())
            case SaveCheckpoint():
                exhaust(gather_moments(trainer))
            case Shutdown():
                return 0
