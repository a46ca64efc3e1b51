"""What the tests of engine and trainer on pictures and on videos share: files of noise, tasks about
them, and what the trainer and a teacher make of the responses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from PIL import Image
from transformers_helpers import sample

from zppo.data.pictures import refer
from zppo.training.batch import assemble
from zppo.training.layout import deal_passes
from zppo.training.policy import Policy
from zppo_actors.engines.base import Engine
from zppo_protocol.messages import GenerateTask, ScoreTask, TrainWindow
from zppo_protocol.samples import GroupSamples, TokenScores, TrainGroup
from zppo_protocol.values import Media, PictureReference


def noise(folder: Path, name: str, size: tuple[int, int] = (64, 96)) -> PictureReference:
    """A picture of coloured noise, which depends on the name."""
    file = folder / f"{name}.png"
    pixels = np.random.default_rng([*name.encode()]).integers(0, 256, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return refer(file)


def about(task: GenerateTask, *media: Media) -> GenerateTask:
    """The task with a prompt about these pictures and videos."""
    return structs.replace(task, prompt=structs.replace(task.prompt, media=list(media)))


def of_sampled(log_probs_TV: torch.Tensor, samples: GroupSamples) -> np.ndarray:
    """Log-probs [T] of the tokens that were sampled."""
    ids_T = torch.from_numpy(samples.token_ids.astype(np.int64))
    return log_probs_TV.gather(1, ids_T[:, None])[:, 0].numpy()


def trained(task: GenerateTask, samples: GroupSamples) -> TrainGroup:
    return TrainGroup(
        group_id=task.task_id,
        question_id=task.task_id,
        kind="plain",
        samples=samples,
        rewards=np.arange(task.n, dtype=np.float32) % 2,
        media=task.prompt.media,
    )


def read_by(
    policy: Policy, tasks: list[GenerateTask], found: list[GroupSamples], positions: int
) -> np.ndarray:
    """The trainer's log-probs of all tokens, text and what is seen in the same passes of so many
    positions."""
    groups = [trained(*pair) for pair in zip(tasks, found, strict=True)]
    rollouts = assemble(
        TrainWindow(step=9, groups=groups),
        max_staleness=9,
        device=torch.device("cpu"),
        look=policy.look,
    )
    log_probs_T, every = torch.zeros(rollouts.tokens), np.arange(rollouts.sequences)
    for batch in deal_passes(rollouts, every, positions, share=policy.shares_prompts).batches:
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        log_probs_T[batch.tokens_R] = policy.log_probs(batch, targets_R, temperature=1.0)[0]
    return log_probs_T.numpy()


@torch.no_grad()
def moved(model: Any) -> Any:
    """Another version of a model: text, head and tower are all other ones."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return other


async def sampled_and_scored(
    engine: Engine, task: GenerateTask, top_k: int
) -> tuple[GroupSamples, TokenScores]:
    """A group of the task, and the engine's own most probable tokens at each of its tokens."""
    [found] = await sample(engine, task)
    score = ScoreTask(
        task_id="s",
        prompt_ids=found.prompt_ids,
        token_ids=found.token_ids,
        offsets=found.offsets,
        top_k=top_k,
        media=task.prompt.media,
        media_tokens=found.media_tokens,
    )
    return found, await engine.score(score)
