"""Qwen3.5 in the vLLM engine, on text and with its tower, against transformers' own pass over what
its own processor makes of pictures and videos.

On a CPU vLLM computes its recurrent layers in bfloat16 alone. So the reference has the weights that
were rounded to bfloat16, and computes in float32; how far transformers is from it in bfloat16 says
how far one may be. One process serves all tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import engine_helpers
import numpy as np
import pytest
import recurrent_models
import torch
from engine_helpers import completions, make_task, versions
from msgspec import structs
from scoring_helpers import forward, to_score
from video_reference import processed, processor_of
from vision_helpers import picture
from vllm_helpers import spec_of
from vllm_process import (
    EngineProcess,
    generate,
    load,
    load_in_flight,
    pixels,
    reason_to_skip,
    score,
)

from zppo.prompting.tokenization import encode_prompts, load_picture_layout, load_tokenizer
from zppo.training.pictures import Tower
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import Media, PolicyManifest, VideoReference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}
"""The least for which vLLM has kernels on a CPU."""
TYPICAL, FAR = 0.06, 0.2
"""Mean differences of log-probs: transformers in bfloat16 has 0.03 to 0.045, another picture of noise
0.35, another policy 3."""
MARKS = (3, 4, 5, 6)
WORDS = "how many?"


def seeing(seed: int = 0) -> Any:
    """Its greedy responses never end."""
    model = recurrent_models.make_seeing(seed, **SIZES)
    model.lm_head.weight[recurrent_models.TOKENS.index("<eos>")] = 0.0
    return model


def text_only(seed: int = 0) -> Any:
    return recurrent_models.make_recurrent("qwen3_5_text", seed, **SIZES)


def rounded(model: Any) -> Any:
    return model.to(torch.bfloat16).float()


def published(model: Any, version: int, folder: Path) -> PolicyManifest:
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    return shared_memory.publish(weights, version, folder)


def about(*media: Media, **options: Any) -> GenerateTask:
    task = make_task(WORDS, **{"n": 2, "max_new_tokens": 24, **options})
    return structs.replace(task, prompt=structs.replace(task.prompt, media=list(media)))


def film(folder: Path, seed: int, count: int) -> VideoReference:
    frames = tuple(picture(folder, seed + i) for i in range(count))
    return VideoReference(frames=frames, seconds=tuple(0.7 * i for i in range(count)))


class World:
    """An engine process, the folders of its models, and what lies beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeing = recurrent_models.save_seeing(seeing(), folder / "seeing")
        self.text = engine_helpers.save(text_only(), folder / "text")
        self.process = EngineProcess()

    def start(self, name: str, folder: Path) -> None:
        spec = spec_of(folder, block_size=128)
        model = structs.replace(spec.served.model, dtype="bfloat16")
        served = structs.replace(spec.served, model=model)
        self.process.start(name, structs.replace(spec, served=served))

    def forward(self, model: Any, samples: GroupSamples, media: Sequence[Media]) -> np.ndarray:
        """Log-probs [T] at a group's tokens, in the softmax over what may be sampled."""
        kinds = ["video" if isinstance(one, VideoReference) else "image" for one in media]
        marks = "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in kinds)
        made = processed(processor_of(self.seeing), marks + WORDS, media)
        types = made.pop("mm_token_type_ids")
        assert samples.prompt_ids.tolist() == made.pop("input_ids")[0].tolist()
        made.pop("attention_mask")
        parts = []
        for token_ids in completions(samples):
            ids = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
            padded = torch.nn.functional.pad(types, (0, len(token_ids)))
            given = {**made, "mm_token_type_ids": padded} if made else {}
            logits = model(input_ids=ids, use_cache=False, **given).logits[0].float()
            logits[:, MARKS] = -torch.inf
            log_probs = logits.log_softmax(-1)[len(samples.prompt_ids) - 1 : -1]
            parts.append(log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0])
        return torch.cat(parts).numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("qwen"))
    try:
        yield world
    finally:
        world.process.close()


@pytest.fixture(scope="module")
def student(world: World) -> World:
    world.start("seeing", world.seeing)
    return world


@pytest.fixture(scope="module")
def text(world: World) -> World:
    world.start("text", world.text)
    return world


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).mean())


# ---- pictures and videos -------------------------------------------------------------------------


def test_pictures_and_videos_are_read_as_transformers_and_the_trainer_read_them(
    student: World,
) -> None:
    here, model = student.folder, rounded(seeing())
    one, two = picture(here, 1), picture(here, 2)
    three, shot = film(here, 10, 3), film(here, 20, 1)
    tasks = [about(), about(one), about(one, two), about(three), about(two, three, shot)]
    found = student.process.run(generate, "seeing", *tasks)
    tokenizer = load_tokenizer(str(student.seeing), "student.model")
    layout = load_picture_layout(str(student.seeing), tokenizer, "student.model")
    ours = encode_prompts(tokenizer, [task.prompt for task in tasks], layout)
    assert [samples.prompt_ids.tolist() for samples in found] == ours
    assert [samples.media_tokens for samples in found] == [[], [6], [6, 6], [12], [6, 12, 6]]
    for task, samples in zip(tasks, found, strict=True):
        assert not np.isin(samples.token_ids, MARKS).any()
        assert off(samples.log_probs, student.forward(model, samples, task.prompt.media)) < TYPICAL
    other = student.forward(model, found[1], [two])
    assert off(found[1].log_probs, other) > FAR, "the picture matters"


def test_vllm_makes_the_pixels_that_the_trainer_makes(student: World) -> None:
    """Its own resize, of torchvision, would be off by tens of levels of 255."""
    media = [picture(student.folder, 3), film(student.folder, 30, 3)]
    found = student.process.run(pixels, "seeing", about(*media))
    tower = Tower.of(seeing(), str(student.seeing), "student.model")
    assert tower is not None
    tokenizer = load_tokenizer(str(student.seeing), "student.model")
    [ids] = encode_prompts(tokenizer, [about(*media).prompt], tower.layout)
    seen = tower.seen(np.asarray(ids), media)
    assert seen is not None
    expected = [tower.pixels(view)["pixel_values"].bfloat16().float() for view in seen.views]
    for made, wanted in zip(found, (expected[0], torch.cat(expected[1:])), strict=True):
        np.testing.assert_allclose(made, wanted.numpy(), atol=2**-7)  # the last bit of bfloat16


def test_a_prompt_of_one_token_fails_alone(student: World) -> None:
    """On a CPU the engine core would die of it, and every engine after that."""
    asked = to_score([9, 4])
    single = [
        (generate, structs.replace(about(), prompt=make_task("q").prompt)),
        (score, structs.replace(asked, prompt_ids=asked.prompt_ids[:1])),
    ]
    for work, task in single:
        with pytest.raises(RuntimeError) as refused:
            student.process.run(work, "seeing", task)
        assert str(refused.value).endswith(
            "EngineError: the prompt has a single token, of which vLLM's engine core dies on a CPU "
            "where layers are recurrent\n"
        )
    two = structs.replace(about(), prompt=make_task("qq").prompt)
    [samples] = student.process.run(generate, "seeing", two)
    assert len(samples.prompt_ids) == 2


# ---- new weights ---------------------------------------------------------------------------------


def test_new_weights_are_right_on_text_and_pictures(student: World) -> None:
    """All of them, those of the tower too, on a picture that was not seen before. They are laid out
    beside the model, with biases, which text alone has none of."""
    new = seeing(1)
    assert student.process.run(load, "seeing", published(new, 1, student.folder)) == 1
    task = about(picture(student.folder, 4))
    [samples] = student.process.run(generate, "seeing", task)
    assert set(versions(samples)) == {1}
    expected = student.forward(rounded(new), samples, task.prompt.media)
    assert off(samples.log_probs, expected) < TYPICAL


def in_flight(
    student: World, version: int, policy: str, *media: Media
) -> tuple[GroupSamples, np.ndarray]:
    """Load a version while greedy responses to the one before it are sampled; which tokens are
    new."""
    task = about(*media, max_new_tokens=100, temperature=0.0)
    manifest = published(seeing(version), version, student.folder)
    samples = student.process.run(load_in_flight, "seeing", task, manifest, policy, 40)
    assert samples.version_spans[:, 1].tolist() == [version - 1, version] * 2
    return samples, np.array(versions(samples)) == version


@torch.no_grad()
def continued(old: Any, new: Any, samples: GroupSamples) -> np.ndarray:
    """Log-probs of the new policy's tokens where keys, values and states before them are those of
    the old one, token by token."""
    found = []
    counts = samples.version_spans[::2, 0]
    for token_ids, before in zip(completions(samples), counts.tolist(), strict=True):
        ids = torch.tensor([[*samples.prompt_ids.tolist(), *token_ids]])
        start = len(samples.prompt_ids) + before - 1  # the last old token is read by the new policy
        cache = old(input_ids=ids[:, :start], use_cache=True).past_key_values
        for place in range(start, ids.shape[1] - 1):
            made = new(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            logits = made.logits[0, -1].float()
            logits[list(MARKS)] = -torch.inf
            found.append(float(logits.log_softmax(-1)[ids[0, place + 1]]))
    return np.array(found)


def test_keep_goes_on_from_the_states_that_the_old_policy_left(student: World) -> None:
    """As it does from its keys and values: the log-probs are true to that mixture."""
    samples, new = in_flight(student, 2, "keep")
    plain = student.forward(rounded(seeing(1)), samples, [])
    assert off(samples.log_probs[~new], plain[~new]) < TYPICAL
    mixed = continued(rounded(seeing(1)), rounded(seeing(2)), samples)
    assert off(samples.log_probs[new], mixed) < TYPICAL


def test_recompute_makes_the_new_policy_read_picture_and_tokens_again(student: World) -> None:
    media = [picture(student.folder, 5)]
    samples, new = in_flight(student, 3, "recompute", *media)
    plain = student.forward(rounded(seeing(3)), samples, media)
    assert off(samples.log_probs[new], plain[new]) < TYPICAL
    assert off(samples.log_probs[~new], plain[~new]) > FAR


# ---- on text -------------------------------------------------------------------------------------


def test_a_folder_of_text_alone_samples_scores_and_takes_new_weights(text: World) -> None:
    task = make_task("w3 w4 w5 w9", n=2, max_new_tokens=24)
    for version, model in enumerate(map(rounded, (text_only(0), text_only(1)))):
        if version:
            text.process.run(load, "text", published(model, version, text.folder))
        [samples] = text.process.run(generate, "text", task)
        expected = engine_helpers.forced_log_probs(model, samples)
        assert off(samples.log_probs, expected) < TYPICAL
        asked = to_score([9, 4])
        scores = text.process.run(score, "text", asked)
        expected_TV = forward(model, asked)
        named_TK = np.take_along_axis(expected_TV, scores.token_ids.astype(np.int64), axis=1)
        assert off(scores.log_probs, named_TK) < TYPICAL
        assert off(scores.log_probs, -np.sort(-expected_TV, axis=1)[:, :6]) < TYPICAL
