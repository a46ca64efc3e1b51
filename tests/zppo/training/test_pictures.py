"""Pictures in the trainer: whose features stand where, and every model that reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from picture_files import coloured
from recurrent_models import make_seeing, save_seeing
from tiny_models import tiny_config
from torch import Tensor
from training_cases import CPU, group, llama, method, settings_of, trainer_of, window
from transformers import AutoImageProcessor, AutoModelForCausalLM

from zppo.config.method import MethodConfig
from zppo.config.topology import (
    DataConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
)
from zppo.data.pictures import read_picture
from zppo.errors import UserError
from zppo.training.batch import Rollouts, assemble
from zppo.training.pictures import Tower
from zppo.training.policy import Policy
from zppo.training.state import load_reference, load_teacher
from zppo.training.step import train_step
from zppo.training.trainer import Trainer
from zppo_protocol.samples import TrainGroup
from zppo_protocol.values import PictureReference, Sampling, VideoReference

pytestmark = pytest.mark.slow

START, END, MARK, VIDEO = 3, 4, 5, 6
MARKS = [START, *[MARK] * 6, END]
"""What a picture of 64 by 96 is in a prompt of `make_seeing`."""
SIZE = (64, 96)
ROUNDING = 1e-4


def words(one: TrainGroup) -> TrainGroup:
    """The group without ids that are marks."""
    samples = one.samples
    return structs.replace(
        one,
        samples=structs.replace(
            samples, prompt_ids=samples.prompt_ids + 40, token_ids=samples.token_ids + 40
        ),
    )


def shown(one: TrainGroup, picture: PictureReference) -> TrainGroup:
    """The group behind a picture."""
    prompt_ids = np.array([*MARKS, *one.samples.prompt_ids], np.int32)
    samples = structs.replace(one.samples, prompt_ids=prompt_ids, media_tokens=[6])
    return structs.replace(one, samples=samples, media=[picture])


def plain_log_probs(model: Any, folder: Path, one: TrainGroup) -> Tensor:
    """[T, V] at a group's tokens by the model's own pass over ids and pixels, each response alone,
    in the softmax over what may be sampled."""
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = dict(processor(images=[read_picture(p) for p in one.media], return_tensors="pt"))
    parts, samples = [], one.samples
    for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        ids = torch.tensor([[*samples.prompt_ids.tolist(), *samples.token_ids[start:end].tolist()]])
        logits = model(
            input_ids=ids, mm_token_type_ids=(ids == MARK).int(), use_cache=False, **pixels
        ).logits[0, len(samples.prompt_ids) - 1 : -1]
        logits[:, [3, 4, 5, 6]] = -torch.inf
        parts.append(logits.double().log_softmax(-1))
    return torch.cat(parts)


def read_by(policy: Policy, trainer: Trainer, rollouts: Rollouts) -> np.ndarray:
    found_T = torch.zeros(rollouts.tokens)
    for batch in trainer.micro_batches(rollouts, np.arange(rollouts.sequences)):
        targets_R = rollouts.token_ids_T[batch.tokens_R]
        found_T[batch.tokens_R] = policy.log_probs(batch, targets_R, temperature=1.0)[0]
    return found_T.numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_seeing(make_seeing(), tmp_path / "model")


@torch.no_grad()
def test_every_model_of_the_trainer_reads_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    """Student, colocated teacher and the reference of a KL, of two questions that are the same
    tokens about two pictures, in one pass and against passes of transformers."""
    other = save_seeing(make_seeing(seed=7), tmp_path / "teacher")
    topology = Topology(
        data=DataConfig(train="x"),
        student=StudentConfig(model=str(folder), sampling=Sampling(max_new_tokens=8)),
        teacher=TeacherConfig(model=str(other), dtype="float32", scoring="colocated"),
        method=MethodConfig(name="on_distill", kl_coefficient=0.1),
    )
    topology = structs.replace(topology, student=structs.replace(topology.student, dtype="float32"))
    teacher, reference = load_teacher(topology, "cpu"), load_reference(topology, "cpu")
    assert teacher is not None and reference is not None
    trainer = trainer_of(make_seeing().requires_grad_(True), micro_batch_tokens=4096)
    trainer.teacher = teacher
    trainer.policy.open_eyes(str(folder))

    red, blue = (coloured(tmp_path / f"{name}.png", name, SIZE) for name in ("red", "blue"))
    one = words(group("a", [1, 0], lengths=[5, 3]))
    first, second = shown(one, red), shown(structs.replace(one, group_id="b"), blue)
    rollouts = assemble(window(first, second), max_staleness=0, device=CPU, look=trainer.look)
    for policy, made in ((trainer.policy, 0), (teacher, 7), (reference, 0)):
        model = make_seeing(seed=made)
        expected = [
            plain_log_probs(model, folder, seen)
            .gather(1, torch.from_numpy(seen.samples.token_ids.astype(np.int64))[:, None])[:, 0]
            .numpy()
            for seen in (first, second)
        ]
        assert np.abs(expected[0] - expected[1]).max() > 100 * ROUNDING
        for _ in range(2):  # seen, and then kept
            found = read_by(policy, trainer, rollouts)
            assert np.abs(found - np.concatenate(expected)).max() < ROUNDING


def test_a_pass_without_pictures_decays_a_trained_tower_all_the_same(folder: Path) -> None:
    """As on several ranks, each of which goes through its share of the tower."""
    model = make_seeing().requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.5, state_dtype="float32")
    trainer = trainer_of(model, optimizer=optimizer, **settings_of(method(updates_per_step=1)))
    trainer.policy.open_eyes(str(folder), train_tower=True)
    text = window(words(group("a", [1, 0], lengths=[4, 3])))
    assert train_step(trainer, text)["updates"] == 1
    tower = {name: p for name, p in model.named_parameters() if ".visual." in name}
    assert tower
    for name, parameter in tower.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.01 * 0.5))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_divergence_is_over_what_both_models_may_sample(beta: float) -> None:
    """One of the two has tokens that stand for pictures; under the other these have a
    probability, and the divergence would be infinite."""
    seeing = make_seeing()
    sizes = {"vocab_size": seeing.get_output_embeddings().weight.shape[0]}
    blind = AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text", **sizes)).float()
    task = window(words(group("a", [1, 0], lengths=[4, 3])))
    for student, teacher in ((seeing, blind), (blind, seeing)):
        trainer = trainer_of(
            copy.deepcopy(student).requires_grad_(True),
            teacher=copy.deepcopy(teacher),
            objective="jsd",
            **settings_of(method(name="on_distill", jsd_beta=beta)),
        )
        assert trainer.policy.unsampled == trainer.teacher.unsampled == (3, 4, 5, 6)
        metrics = train_step(trainer, task)
        assert metrics["updates"] >= 1 and metrics["updates_skipped"] == 0


def test_text_alone_has_every_token_and_the_head_as_it_was() -> None:
    policy = trainer_of(llama()).policy
    assert policy.unsampled == () and policy.head is not None and policy.head.bias_V is None


def test_what_is_kept_of_a_picture_holds_nothing_else(folder: Path, tmp_path: Path) -> None:
    """Features of several pictures come out of one pass of the tower, as parts of one tensor."""
    policy = Policy(make_seeing())
    policy.open_eyes(str(folder))
    tower = policy._tower
    assert tower is not None
    pictures = [coloured(tmp_path / f"{name}.png", name, SIZE) for name in ("red", "blue")]
    seen = [tower.seen(np.array(MARKS), [one]) for one in pictures]
    tower.features([one for one in seen if one is not None])
    for picture in pictures:
        kept = tower._features.get((picture.sha256, *SIZE, None))
        assert kept is not None
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_frames_are_kept_by_what_they_are_merged_with_and_resized_to(
    folder: Path, tmp_path: Path
) -> None:
    """The first two frames of a long video are smaller than those of a short one, whose bound they
    share; what is kept of the one is not shown of the other."""
    policy = Policy(make_seeing())
    policy.open_eyes(str(folder))
    tower = policy._tower
    assert tower is not None
    frames = [coloured(tmp_path / f"{i}.png", f"#{i}0{i}0f0", (190, 160)) for i in range(8)]
    videos = [
        VideoReference(frames=tuple(frames[:count]), seconds=tuple(map(float, range(count))))
        for count in (2, 8, 3)
    ]
    turned = structs.replace(videos[0], frames=tuple(frames[1::-1]))
    seen = []
    for video in (*videos, turned):
        ids = np.asarray(tower.layout.expansion(video))
        prompt = tower.seen(ids, [video])
        assert prompt is not None
        assert prompt.media_tokens == [int((ids == VIDEO).sum())]
        seen.append(prompt)
    kept = [torch.cat(tower.features([prompt])) for prompt in seen]
    for prompt, features in zip(seen, kept, strict=True):
        tower._features.clear()
        torch.testing.assert_close(torch.cat(tower.features([prompt])), features)


def test_rows_of_one_prompt_go_through_a_trained_tower_once(folder: Path, tmp_path: Path) -> None:
    """And each has its part in the gradient."""
    policy = Policy(make_seeing().requires_grad_(True))
    policy.open_eyes(str(folder), train_tower=True)
    tower, red = policy._tower, coloured(tmp_path / "red.png", "red", SIZE)
    assert tower is not None
    seen = tower.seen(np.array(MARKS), [red])
    assert seen is not None
    passes, see = [], tower._see
    tower._see = lambda pictures: passes.append(len(pictures)) or see(pictures)  # type: ignore[func-returns-value, method-assign]
    weight = policy.model.model.visual.patch_embed.proj.weight
    weights_N1 = torch.linspace(-1.0, 1.0, 18)[:, None]
    (torch.cat(tower.features([seen] * 3)) * weights_N1).sum().backward()
    together, weight.grad = weight.grad, None
    for part_n1 in weights_N1.split(6):
        (tower.features([seen])[0] * part_n1).sum().backward()
    torch.testing.assert_close(together, weight.grad)
    assert passes == [1] * 4 and bool(together.any())


def test_a_processor_that_cannot_be_loaded(folder: Path) -> None:
    """A run on text alone does without; the first picture names it."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["size"] |= {"min_pixels": 1}
    file.write_text(json.dumps(settings))
    policy = Policy(make_seeing())
    policy.open_eyes(str(folder))
    tower = policy._tower
    assert tower is not None and tower.seen(np.array([40, 41]), []) is None
    seen = tower.seen(np.array(MARKS), [coloured(folder / "red.png", "red", SIZE)])
    assert seen is not None
    with pytest.raises(UserError) as refused:
        tower.features([seen])
    begin, end = (
        f"student.model: {str(folder)!r} has no processor of pictures that can be loaded (",
        "), and a question has pictures; expected preprocessor_config.json as save_pretrained "
        "writes it, or text only",
    )
    said = str(refused.value)
    assert said.startswith(begin) and said.endswith(end) and len(said) < 800
    file.unlink()
    assert Tower.of(None, str(folder), "student.model") is None
