"""Pictures in the engine `transformers` and in the trainer, against plain forward passes of
transformers over the pixels, one sequence at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import engine_helpers
import numpy as np
import pytest
import recurrent_models
import torch
import vision_helpers
from engine_helpers import completions, make_task
from media_helpers import about, moved, noise, of_sampled, read_by, sampled_and_scored
from msgspec import structs
from PIL import Image
from transformers import AutoImageProcessor
from transformers_helpers import build, run, sample

from zppo.data.pictures import refer
from zppo.errors import UserError
from zppo.training.policy import Policy
from zppo_actors.engines.base import EngineError
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.places import PLACE
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import PictureReference, PolicyManifest

pytestmark = pytest.mark.slow

ROUNDING = 1e-4
SIZES = ((64, 96), (32, 32), (100, 70), (160, 40))
"""Pictures (width, height) of 6, 1, 6 and 5 features of Qwen3.5."""


class Family(NamedTuple):
    make: Callable[..., Any]
    save: Callable[[Any, Path], Path]
    words: tuple[str, ...]


FAMILIES = {
    "qwen3_5": Family(
        recurrent_models.make_seeing, recurrent_models.save_seeing, ("how many", "a", "where is it")
    ),
    "idefics3": Family(
        vision_helpers.make_seeing, vision_helpers.save_seeing, ("w3 w9 w4", "w7", "w4 w4 w30 w5")
    ),
}


def tasks_of(family: Family, folder: Path) -> list[GenerateTask]:
    """Groups with no, one and two pictures, more sequences than the engine has slots; two stand
    between the words."""
    one, two, three, four = (noise(folder, f"p{i}", size) for i, size in enumerate(SIZES))
    media = ([one], [], [two, three], [four], [one, one])
    words = list(family.words)
    words[2] = words[2].replace(" ", f" {PLACE} ", 2)
    return [
        about(
            make_task(words[i % 3], n=3, task_id=f"t{i}", seed=i, max_new_tokens=6 + 2 * i),
            *shown,
        )
        for i, shown in enumerate(media)
    ]


def seen(folder: Path, media: list[PictureReference]) -> dict[str, torch.Tensor]:
    """What the folder's own processor makes of the files."""
    if not media:
        return {}
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(one.path).convert("RGB") for one in media]
    return dict(processor(images=images, return_tensors="pt"))


def distributions(
    model: Any, folder: Path, samples: GroupSamples, media: list[PictureReference]
) -> torch.Tensor:
    """Log-probs [T, V] at a group's tokens by the model's own forward pass over ids and pixels, without
    a cache, in the softmax over what may be sampled."""
    unsampled = [
        index
        for name in ("image", "video", "vision_start", "vision_end")
        if (index := getattr(model.config, f"{name}_token_id", None)) is not None
    ]
    pixels, parts = seen(folder, media), []
    for token_ids in completions(samples):
        ids = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        inputs = dict(pixels)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0].float()
        logits[:, unsampled] = -torch.inf
        parts.append(logits.log_softmax(-1)[len(samples.prompt_ids) - 1 : -1])
    return torch.cat(parts)


def published(model: Any, version: int, folder: Path) -> PolicyManifest:
    return shared_memory.publish(model.state_dict(), version, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_engine_and_trainer_read_pictures_as_transformers_does(name: str, tmp_path: Path) -> None:
    """Before and after new weights, a tower's among them: what was made of a picture under the old
    ones would be seen at once."""
    family, (folder, shared) = FAMILIES[name], (tmp_path / "model", tmp_path / "shared")
    shared.mkdir()
    first = family.make()
    second = moved(first)
    family.save(first, folder)
    engine, tasks = build(folder, max_sequences=5), tasks_of(family, tmp_path)

    async def work() -> tuple[list[GroupSamples], list[GroupSamples]]:
        before = await sample(engine, *tasks)
        await engine.load_policy(published(second, 1, shared))
        return before, await sample(engine, *tasks)

    for model, found in zip((first, second), run(engine, work()), strict=True):
        behaviour = np.concatenate([group.log_probs for group in found])
        expected = np.concatenate(
            [
                of_sampled(distributions(model, folder, group, task.prompt.media), group)
                for task, group in zip(tasks, found, strict=True)
            ]
        )
        policy = Policy(copy.deepcopy(model))
        policy.open_eyes(str(folder))
        assert np.abs(behaviour - expected).max() < ROUNDING
        assert np.abs(read_by(policy, tasks, found, 200) - expected).max() < ROUNDING


def test_a_remote_teacher_scores_responses_to_pictures(tmp_path: Path) -> None:
    model = recurrent_models.make_seeing()
    folder = recurrent_models.save_seeing(model, tmp_path / "model")
    engine, media = build(folder, max_sequences=4), [noise(tmp_path, "p", (64, 96))]

    task = about(make_task("how many", n=3), *media)
    found, scores = run(engine, sampled_and_scored(engine, task, 4))
    best = distributions(model, folder, found, media).topk(4)
    np.testing.assert_array_equal(scores.token_ids, best.indices.numpy())
    np.testing.assert_allclose(scores.log_probs, best.values.numpy(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("damage", "cannot"),
    [
        (
            lambda text: text.replace('"size": {', '"size": {"min_pixels": 1,'),
            "has no processor of pictures that can be loaded .*, and a question has pictures",
        ),
        (lambda text: text[:40], "'.*preprocessor_config.json' cannot be read: "),
        (lambda text: '{"size": 1}', "does not say how its model reads pictures"),
        (
            lambda text: text.replace('"do_resize": true', '"do_resize": false'),
            "cannot be shown pictures: its processor of pictures has do_resize false",
        ),
    ],
)
def test_settings_that_cannot_be_used_stop_nothing_but_pictures(
    damage: Callable[[str], str], cannot: str, tmp_path: Path
) -> None:
    folder = recurrent_models.save_seeing(recurrent_models.make_seeing(), tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(damage(file.read_text()))
    engine, media = build(folder, max_sequences=4), [noise(tmp_path, "p", (64, 96))]

    async def work() -> list[GroupSamples]:
        found = await sample(engine, make_task("how many", n=2))
        with pytest.raises((UserError, EngineError), match=cannot):
            await sample(engine, about(make_task("how many"), *media))
        marks = np.array([3, *[5] * 6, 4], np.int32)
        task = ScoreTask(
            task_id="s",
            prompt_ids=marks,
            token_ids=found[0].token_ids,
            offsets=found[0].offsets,
            top_k=4,
            media=media,
            media_tokens=[6],
        )
        with pytest.raises((UserError, EngineError), match=cannot):
            await engine.score(task)
        return found

    [found] = run(engine, work())
    assert len(completions(found)) == 2


def test_a_stale_feature_a_changed_pixel_and_a_mark_are_found(tmp_path: Path) -> None:
    """What the test above would find: features that outlive their weights, another picture, and a
    response that holds the mark of one."""
    folder, shared = tmp_path / "model", tmp_path / "shared"
    shared.mkdir()
    first = recurrent_models.make_seeing()
    with torch.no_grad():  # a model that would write marks of pictures, and nothing else
        first.lm_head.weight[3:7] *= 40
    second = moved(first)
    recurrent_models.save_seeing(first, folder)
    engine = build(folder, max_sequences=4)
    picture = noise(tmp_path, "p", (64, 96))
    task = about(make_task("how many", n=3, max_new_tokens=8), picture)

    async def work() -> tuple[GroupSamples, GroupSamples]:
        [before] = await sample(engine, task)
        engine._tower.renew = lambda weights: None
        await engine.load_policy(published(second, 1, shared))
        return before, (await sample(engine, task))[0]

    before, stale = run(engine, work())
    assert not np.isin(before.token_ids, [3, 4, 5, 6]).any()
    assert before.media_tokens == [6]
    media = task.prompt.media
    assert (
        np.abs(
            before.log_probs - of_sampled(distributions(first, folder, before, media), before)
        ).max()
        < ROUNDING
    )
    assert (
        np.abs(
            stale.log_probs - of_sampled(distributions(second, folder, stale, media), stale)
        ).max()
        > 100 * ROUNDING
    )

    pixels = np.asarray(Image.open(picture.path)).copy()
    pixels[:32, :32] = 255 - pixels[:32, :32]
    Image.fromarray(pixels).save(tmp_path / "other.png")
    other = [refer(tmp_path / "other.png")]
    assert (
        np.abs(
            before.log_probs - of_sampled(distributions(first, folder, before, other), before)
        ).max()
        > 100 * ROUNDING
    )
    policy = Policy(copy.deepcopy(first))
    policy.open_eyes(str(folder))
    as_trained = read_by(policy, [about(task, *other)], [before], 200)
    assert np.abs(before.log_probs - as_trained).max() > 100 * ROUNDING


def test_other_pictures_than_were_referred_to_are_refused_by_both_sides(tmp_path: Path) -> None:
    folder = recurrent_models.save_seeing(recurrent_models.make_seeing(), tmp_path / "model")
    engine, picture = build(folder, max_sequences=4), noise(tmp_path, "p", (64, 96))
    task = about(make_task("how many", n=2, max_new_tokens=4), picture)
    marked = make_task("how <|image_pad|> many")
    policy = Policy(recurrent_models.make_seeing())
    policy.open_eyes(str(folder))

    async def work() -> tuple[GroupSamples, str, str]:
        [found] = await sample(engine, task)
        Path(picture.path).write_bytes(Path(noise(tmp_path, "q", (64, 96)).path).read_bytes())
        with pytest.raises(EngineError) as changed:
            await engine.generate(task)
        with pytest.raises(EngineError) as words:
            await engine.generate(marked)
        assert not changed.value.retryable and not words.value.retryable
        return found, str(changed.value), str(words.value)

    found, changed, words = run(engine, work())
    start = f"the picture {picture.path!r} has changed since the data was read"
    assert changed.startswith(start)
    assert words == "the prompt holds 1 mark of pictures for 0 pictures"
    with pytest.raises(UserError, match=re.escape(f"data.train: {start}")):
        read_by(policy, [task], [found], 200)
    wider = structs.replace(picture, width=96)
    with pytest.raises(UserError) as refused:
        read_by(policy, [about(task, wider)], [found], 200)
    assert str(refused.value) == (
        "student.model: the engine read the pictures of the question 't' as other tokens than the "
        "trainer (picture 1 of 1, of 96 × 96 pixels, should be 9 tokens, and other ones stand in "
        "the prompt); expected the same preprocessor_config.json and "
        "video_preprocessor_config.json for both"
    )
    blind = Policy(engine_helpers.make_model())
    with pytest.raises(UserError) as unseen:
        read_by(blind, [task], [found], 200)
    assert str(unseen.value) == (
        "student.model: the question 't' has pictures, and the trainer shows none to '' (qwen3); "
        "expected a family that docs/pictures.md names"
    )
