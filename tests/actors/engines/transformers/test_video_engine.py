"""Videos in the engine `transformers` and in the trainer, against plain forward passes of
transformers over what its own processor makes of them, one sequence at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recurrent_models
import torch
from engine_helpers import completions, make_task
from media_helpers import about, moved, noise, of_sampled, read_by, sampled_and_scored
from msgspec import structs
from PIL import Image
from transformers_helpers import build, run, sample
from video_reference import processed, processor_of

from zppo.data.pictures import refer
from zppo.errors import UserError
from zppo.prompting.picture_layout import PictureLayout
from zppo.prompting.tokenization import encode_prompts, load_tokenizer
from zppo.training.policy import Policy
from zppo_actors.engines.base import EngineError
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Media, PolicyManifest, VideoReference

pytestmark = pytest.mark.slow

ROUNDING = 1e-4
UNSAMPLED = [3, 4, 5, 6]
SIZE = (64, 96)


def film(
    folder: Path, name: str, count: int, size: tuple[int, int] = SIZE, step: float = 0.7
) -> VideoReference:
    frames = tuple(noise(folder, f"{name}-{i}", size) for i in range(count))
    return VideoReference(frames=frames, seconds=tuple(step * i for i in range(count)))


def tasks_of(folder: Path) -> list[GenerateTask]:
    """Groups with videos of 1, 2, 3 and 5 frames, beside pictures, in any order, and with none;
    more sequences than the engine has slots."""
    picture, shot = noise(folder, "p", (100, 70)), film(folder, "shot", 1)
    pair, three = film(folder, "pair", 2, (32, 32)), film(folder, "three", 3, (90, 50))
    long = film(folder, "long", 5, (200, 160))
    shown: list[list[Media]] = [
        [three], [], [picture, pair], [long, picture, three], [shot], [picture], [long, long]
    ]  # fmt: skip
    return [
        about(make_task("how many", n=2, task_id=f"t{i}", seed=i, max_new_tokens=4 + i), *media)
        for i, media in enumerate(shown)
    ]


def marked(media: Sequence[Media]) -> str:
    """What the chat template of the folder writes of media and of the words of `tasks_of`."""
    kinds = ["video" if isinstance(one, VideoReference) else "image" for one in media]
    return "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in kinds) + "how many"


def distributions(
    model: Any, folder: Path, samples: GroupSamples, media: Sequence[Media]
) -> torch.Tensor:
    """Log-probs [T, V] at a group's tokens by the model's own pass over what transformers makes of
    text, pictures and videos, in the softmax over what may be sampled."""
    made = processed(processor_of(folder), marked(media), media)
    prompt, kinds = made.pop("input_ids"), made.pop("mm_token_type_ids")
    made.pop("attention_mask")
    assert samples.prompt_ids.tolist() == prompt[0].tolist()
    parts = []
    for token_ids in completions(samples):
        ids = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        types = torch.nn.functional.pad(kinds, (0, len(token_ids)))
        given = {**made, "mm_token_type_ids": types} if made else {}
        logits = model(input_ids=ids, use_cache=False, **given).logits[0].float()
        logits[:, UNSAMPLED] = -torch.inf
        parts.append(logits.log_softmax(-1)[len(samples.prompt_ids) - 1 : -1])
    return torch.cat(parts)


def policy_of(model: Any, folder: Path, **settings: Any) -> Policy:
    policy = Policy(copy.deepcopy(model))
    policy.open_eyes(str(folder), **settings)
    return policy


def published(model: Any, version: int, folder: Path) -> PolicyManifest:
    folder.mkdir(exist_ok=True)
    return shared_memory.publish(model.state_dict(), version, folder)


def test_engine_and_trainer_read_videos_as_transformers_does(tmp_path: Path) -> None:
    """Before and after new weights, with a tower that is frozen and one that is trained; the second
    time from what is kept of every view."""
    first = recurrent_models.make_seeing()
    second = moved(first)
    folder = recurrent_models.save_seeing(first, tmp_path / "model")
    engine, tasks = build(folder, max_sequences=5), tasks_of(tmp_path)

    async def work() -> list[list[GroupSamples]]:
        before = [await sample(engine, *tasks), await sample(engine, *tasks)]
        await engine.load_policy(published(second, 1, tmp_path / "shared"))
        return [*before, await sample(engine, *tasks)]

    found = run(engine, work())
    for model, groups in zip((first, first, second), found, strict=True):
        behaviour = np.concatenate([group.log_probs for group in groups])
        expected = np.concatenate(
            [
                of_sampled(distributions(model, folder, group, task.prompt.media), group)
                for task, group in zip(tasks, groups, strict=True)
            ]
        )
        assert np.abs(behaviour - expected).max() < ROUNDING
    for model, groups in ((first, found[0]), (second, found[2])):
        behaviour = np.concatenate([group.log_probs for group in groups])
        for train_tower in (False, True):
            policy = policy_of(model, folder, train_tower=train_tower)
            for _ in range(2):
                assert np.abs(read_by(policy, tasks, groups, 300) - behaviour).max() < 2 * ROUNDING


def test_a_trained_tower_learns_from_every_frame(tmp_path: Path) -> None:
    """Its gradient is that of transformers' own pass."""
    model = recurrent_models.make_seeing().requires_grad_(True)
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    tower = policy_of(model, folder, train_tower=True)._tower
    assert tower is not None
    media = [film(tmp_path, "f", 3), noise(tmp_path, "p")]
    made = processed(processor_of(folder), marked(media), media)
    made.pop("attention_mask")
    ids = made["input_ids"]
    seen = tower.seen(ids[0].numpy(), media)
    own = tower._model
    gradients = []
    for one, given in (
        (model, {name: value for name, value in made.items() if name != "input_ids"}),
        (own, tower.inputs([seen], torch.arange(ids.shape[1])[None])),
    ):
        one(input_ids=ids, use_cache=False, **given).logits[0, -1].log_softmax(-1)[50].backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if ".visual." in name})
    theirs, ours = gradients
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    assert theirs["model.visual.patch_embed.proj.weight"].abs().max() > 1e-3


def test_a_remote_teacher_scores_responses_to_videos(tmp_path: Path) -> None:
    model = recurrent_models.make_seeing()
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    engine, media = build(folder, max_sequences=4), [film(tmp_path, "f", 3)]

    task = about(make_task("how many", n=3), *media)
    found, scores = run(engine, sampled_and_scored(engine, task, 4))
    assert found.media_tokens == [12]
    best = distributions(model, folder, found, media).topk(4)
    np.testing.assert_array_equal(scores.token_ids, best.indices.numpy())
    np.testing.assert_allclose(scores.log_probs, best.values.numpy(), rtol=0, atol=ROUNDING)


def test_one_patch_of_one_frame_is_seen_and_the_order_of_frames(tmp_path: Path) -> None:
    """What the first test would find."""
    model = recurrent_models.make_seeing()
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    engine, video = build(folder, max_sequences=4), film(tmp_path, "f", 4)
    task = about(make_task("how many", n=3, max_new_tokens=8), video)

    async def work() -> GroupSamples:
        return (await sample(engine, task))[0]

    found = run(engine, work())
    third = video.frames[2]
    pixels = np.asarray(Image.open(third.path)).copy()
    pixels[16:32, 16:32] = 255 - pixels[16:32, 16:32]
    Image.fromarray(pixels).save(tmp_path / "other.png")
    first, second, _, last = video.frames
    others = [
        (first, second, refer(tmp_path / "other.png"), last),
        (second, first, third, last),
        (third, last, first, second),
    ]
    policy = policy_of(model, folder)
    assert np.abs(read_by(policy, [task], [found], 300) - found.log_probs).max() < ROUNDING
    for frames in others:
        other = about(task, structs.replace(video, frames=frames))
        read = read_by(policy, [other], [found], 300)
        assert np.abs(read - found.log_probs).max() > 100 * ROUNDING
        expected = of_sampled(distributions(model, folder, found, other.prompt.media), found)
        assert np.abs(read - expected).max() < ROUNDING


def test_other_frames_or_times_than_were_referred_to_are_refused_by_both_sides(
    tmp_path: Path,
) -> None:
    model = recurrent_models.make_seeing()
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    engine, video = build(folder, max_sequences=4), film(tmp_path, "f", 3)
    task = about(make_task("how many", n=2, max_new_tokens=4), video)
    changed = video.frames[1]

    async def work() -> tuple[GroupSamples, str]:
        [found] = await sample(engine, task)
        Path(changed.path).write_bytes(Path(noise(tmp_path, "q").path).read_bytes())
        with pytest.raises(EngineError) as refused:
            await engine.generate(task)
        assert not refused.value.retryable
        return found, str(refused.value)

    found, said = run(engine, work())
    start = f"the picture {changed.path!r} has changed since the data was read"
    assert said.startswith(start)
    with pytest.raises(UserError, match=re.escape(f"data.train: {start}")):
        read_by(policy_of(model, folder), [task], [found], 300)
    later = structs.replace(video, seconds=(0.0, 0.7, 2.4))
    with pytest.raises(UserError) as refused:
        read_by(policy_of(model, folder), [about(task, later)], [found], 300)
    assert str(refused.value) == (
        "student.model: the engine read the pictures of the question 't' as other tokens than the "
        "trainer (video 1 of 1, of 3 frames of 64 × 96 pixels, should be 42 tokens, and other ones "
        "stand in the prompt); expected the same preprocessor_config.json and "
        "video_preprocessor_config.json for both"
    )


def test_what_an_engine_showed_as_frames_is_trained_on_as_frames(tmp_path: Path) -> None:
    """By a student that takes videos, when its engine shows several pictures."""
    model = recurrent_models.make_seeing()
    pictures = recurrent_models.save_seeing(
        model, tmp_path / "frames", recurrent_models.PICTURES_ALONE
    )
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    engine, video = build(pictures, max_sequences=4), film(tmp_path, "f", 3)
    task = about(make_task("how many", n=2, max_new_tokens=6), video)

    async def work() -> GroupSamples:
        return (await sample(engine, task))[0]

    found = run(engine, work())
    assert found.media_tokens == [18]
    policy = policy_of(model, folder)
    assert policy._tower is not None and policy._tower.layout.shows_videos
    tokenizer = load_tokenizer(str(folder), "student.model")
    frames = PictureLayout(policy._tower.layout.family, tokenizer, "asked to")
    assert encode_prompts(tokenizer, [task.prompt], frames) == [found.prompt_ids.tolist()]
    assert np.abs(read_by(policy, [task], [found], 300) - found.log_probs).max() < ROUNDING
