"""Pictures through the vLLM engine, against the model's own Hugging Face processor and forward
pass."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_helpers import completions, make_model, make_task, save, versions
from vision_helpers import (
    IMAGE_ID,
    PICTURE_TOKENS,
    make_seeing,
    make_tokenizer,
    picture,
    save_seeing,
    seeing_logits,
    seen,
)
from vllm_helpers import spec_of

from zppo.errors import UserError
from zppo_actors.engines import create
from zppo_actors.engines.base import EngineError
from zppo_actors.engines.vllm.media import (
    PictureTokenizer,
    Shown,
    takes_pictures,
)
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask
from zppo_protocol.places import PLACE
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import (
    ChatMessage,
    PictureReference,
    Prompt,
    ResponseStart,
    VideoReference,
)

TOLERANCE = 1e-3
SECONDS = 1800.0
PROMPT = "USER <image> w5 w6 w7 "
AS_PICTURES = Shown(None, videos=False, folder="", where="")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


# ---- prompts -------------------------------------------------------------------------------------


def prompt(*messages: tuple[Any, str], media: list[PictureReference] | None = None) -> Prompt:
    return Prompt(
        messages=[ChatMessage(role=role, content=text) for role, text in messages],
        media=media or [],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing(make_seeing(), tmp_path_factory.mktemp("seeing"))


def test_prompt_has_one_placeholder_a_picture_and_ends_with_the_start_of_the_response(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = PictureTokenizer(str(folder), "teacher.model")
    asked = prompt(("system", "w3"), ("user", "w4"), media=[picture(tmp_path, 1)])
    ids = make_tokenizer()("SYSTEM w3 USER <image> w4")["input_ids"]
    assert tokenizer.encode(asked).tolist() == ids
    begun = msgspec.structs.replace(asked, start=ResponseStart(text="w8 w9 w10 w11", share=0.5))
    assert tokenizer.encode(begun).tolist() == ids + make_tokenizer()("w8 w9")["input_ids"]


@pytest.mark.parametrize(
    "template", [None, "{% for message in messages %}{{ message.content }}{% endfor %}"]
)
def test_template_without_a_place_for_pictures_is_a_user_error(
    folder: Path, tmp_path: Path, template: str | None
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        PictureTokenizer(str(tmp_path), "teacher.model")
    assert str(caught.value) == (
        f"teacher.model: the model {str(tmp_path)!r} takes pictures, but its tokenizer has no chat "
        "template that takes messages of text and pictures"
    )


@pytest.mark.parametrize("pictures", [0, 1])
def test_words_that_hold_the_mark_of_a_picture_are_refused(
    folder: Path, tmp_path: Path, pictures: int
) -> None:
    tokenizer = PictureTokenizer(str(folder), "teacher.model")
    media = [picture(tmp_path, i) for i in range(pictures)]
    with pytest.raises(
        EngineError, match="the words of the prompt hold the mark of a picture"
    ) as caught:
        tokenizer.encode(prompt(("user", "w4 <image>"), media=media))
    assert not caught.value.retryable


def test_pictures_stand_at_their_places(folder: Path, tmp_path: Path) -> None:
    """Between words and in earlier messages; places that are not one for each are refused."""
    tokenizer = PictureTokenizer(str(folder), "teacher.model")
    media = [picture(tmp_path, 1)] * 3
    turns = ("user", PLACE), ("assistant", "w3"), ("user", f"w4 {PLACE} w5 {PLACE}")
    ids = make_tokenizer()("USER <image> ASSISTANT w3 USER w4 <image> w5 <image>")["input_ids"]
    assert tokenizer.encode(prompt(*turns, media=media)).tolist() == ids
    with pytest.raises(EngineError) as caught:
        tokenizer.encode(prompt(*turns, media=media[:2]))
    assert str(caught.value) == "the prompt has 3 places for 2 pictures and videos"
    assert not caught.value.retryable


def test_which_models_take_pictures(folder: Path, tmp_path: Path) -> None:
    assert takes_pictures(str(folder))
    assert not takes_pictures(str(save(make_model(), tmp_path)))


def test_pictures_are_opened_in_their_order(tmp_path: Path) -> None:
    media = [picture(tmp_path, seed) for seed in (1, 2)]
    first, second = AS_PICTURES.open(media)["multi_modal_data"]["image"]
    assert first.mode == "RGB" and first.size == (90, 70)
    assert first.getpixel((0, 0)) != second.getpixel((0, 0))


def test_a_picture_that_is_not_what_it_was_is_refused_for_good(tmp_path: Path) -> None:
    whole, gone = picture(tmp_path, 1), picture(tmp_path, 2)
    Path(gone.path).unlink()
    with pytest.raises(EngineError, match=r"picture-2.png' does not exist") as caught:
        AS_PICTURES.open([whole, gone])
    assert not caught.value.retryable


def test_tokens_of_a_video_are_those_of_its_frames(tmp_path: Path) -> None:
    one = picture(tmp_path, 1)
    video = VideoReference(frames=(one, one, one), seconds=(0.0, 0.5, 1.0))
    assert AS_PICTURES.tokens([one, video, one], {"image": [1, 2, 3, 4, 5]}) == [1, 9, 5]
    assert len(AS_PICTURES.open([one, video])["multi_modal_data"]["image"]) == 4


# ---- the real engine -----------------------------------------------------------------------------


class Seeing:
    """An engine that serves a model with eyes, and its loop."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        self.model = make_seeing()
        self.engine: Any = create(spec_of(folder))
        self.runner = runner

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, SECONDS))

    def sample(
        self, media: list[PictureReference], text: str = "w5 w6 w7", **options: Any
    ) -> GroupSamples:
        samples: GroupSamples = self.run(self.engine.generate(ask(text, media, **options)))
        return samples


def ask(text: str, media: list[PictureReference], **options: Any) -> GenerateTask:
    task = make_task(text, **options)
    return msgspec.structs.replace(task, prompt=msgspec.structs.replace(task.prompt, media=media))


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Iterator[Seeing]:
    with asyncio.Runner() as runner:
        seeing = Seeing(folder, runner)
        try:
            yield seeing
        finally:
            runner.run(seeing.engine.close())


def check_agreement(
    seeing: Seeing, samples: GroupSamples, text: str, media: list[PictureReference]
) -> None:
    """Prompt ids, greedy tokens and log-probs are those of Hugging Face's processor and model."""
    inputs = seen(text, media)
    assert samples.prompt_ids.tolist() == inputs["input_ids"][0].tolist()
    assert samples.prompt_ids.tolist().count(IMAGE_ID) == PICTURE_TOKENS * len(media)
    assert samples.media_tokens == [PICTURE_TOKENS] * len(media)
    logits_TV = seeing_logits(seeing.model, samples, inputs)
    assert samples.token_ids.tolist() == logits_TV.argmax(-1).tolist()
    log_probs = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    expected = log_probs[np.arange(len(logits_TV)), samples.token_ids]
    assert np.abs(expected - samples.log_probs).max() < TOLERANCE


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_picture_changes_what_the_model_says_exactly_as_in_transformers(
    seeing: Seeing, tmp_path: Path
) -> None:
    said = []
    for media in ([picture(tmp_path, 1)], [picture(tmp_path, 2)]):
        samples = seeing.sample(media, temperature=0.0, max_new_tokens=24)
        check_agreement(seeing, samples, PROMPT, media)
        said.append(samples)
    first, second = said
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()
    assert completions(first) != completions(second)
    assert abs(float(first.log_probs[0] - second.log_probs[0])) > TOLERANCE


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_two_pictures_and_none(seeing: Seeing, tmp_path: Path) -> None:
    media = [picture(tmp_path, seed) for seed in (3, 4)]
    samples = seeing.sample(media, temperature=0.0)
    check_agreement(seeing, samples, "USER <image> <image> w5 w6 w7 ", media)
    check_agreement(seeing, seeing.sample([], temperature=0.0), "USER w5 w6 w7 ", [])


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_a_group_is_sampled_over_the_same_picture(seeing: Seeing, tmp_path: Path) -> None:
    media = [picture(tmp_path, 5)]
    samples = seeing.sample(media, n=4, max_new_tokens=20)
    assert len({tuple(tokens) for tokens in completions(samples)}) == 4
    inputs = seen(PROMPT, media)
    logits_TV = seeing_logits(seeing.model, samples, inputs)
    log_probs = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    expected = log_probs[np.arange(len(logits_TV)), samples.token_ids]
    assert np.abs(expected - samples.log_probs).max() < TOLERANCE


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_what_cannot_be_shown_is_refused_and_the_engine_goes_on(
    seeing: Seeing, tmp_path: Path
) -> None:
    one = [picture(tmp_path, 6)]
    gone = picture(tmp_path, 60)
    Path(gone.path).unlink()
    for media, text, reason in (
        ([gone], "w5", "picture-60.png' does not exist"),
        (one, "w5 " * 508, "longer than the maximum model length of 512"),
        (one, "w5 <image>", "the words of the prompt hold the mark of a picture"),
    ):
        with pytest.raises(EngineError, match=reason) as caught:
            seeing.sample(media, text)
        assert not caught.value.retryable, caught.value
    check_agreement(seeing, seeing.sample(one, temperature=0.0), PROMPT, one)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_new_weights_come_under_the_names_of_the_folder(seeing: Seeing, tmp_path: Path) -> None:
    """The tower stays, so what it has made of a picture before is right afterwards as well."""
    media = [picture(tmp_path, 7)]
    check_agreement(seeing, seeing.sample(media, temperature=0.0), PROMPT, media)
    new, old = make_seeing(1), seeing.model
    tower = {
        name: tensor
        for name, tensor in old.state_dict().items()
        if not name.startswith(("model.text_model.", "lm_head."))
    }
    assert tower
    new.load_state_dict(tower, strict=False)
    new.lm_head.weight[IMAGE_ID] = 0.0  # a sampled mark of a picture would have no features
    manifest = shared_memory.publish(new.state_dict(), 1, tmp_path)
    seeing.run(seeing.engine.load_policy(manifest))
    seeing.model = new
    for shown in (media, [], [picture(tmp_path, 8)]):
        samples = seeing.sample(shown, temperature=0.0)
        assert set(versions(samples)) == {1}
        text = PROMPT if shown else PROMPT.replace("<image> ", "")
        check_agreement(seeing, samples, text, shown)
