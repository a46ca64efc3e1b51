"""Models with recurrent layers in the trainer: rows padded on the right, one rollout a row, against
transformers' eager pass over each sequence alone; and towers, which text does not train."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recurrent_models import FAMILIES, make_recurrent, make_seeing, save_seeing
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from training_cases import CPU, group, longhand_log_probs, trainer_of, window
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from zppo.errors import UserError
from zppo.training.batch import assemble
from zppo.training.loading import freeze_tower, load_folder
from zppo.training.policy import Policy

pytestmark = pytest.mark.slow

MODELS: dict[str, Callable[[], Any]] = {
    **{family: partial(make_recurrent, family) for family in FAMILIES},
    "qwen3_5": partial(make_seeing, first_mark=100),
}
TASK = window(
    group("a", [1, 0, 0], lengths=[14, 1, 70]),
    group("b", [1, 0], lengths=[3, 20]),
    group("c", [0, 1], lengths=[66, 2]),
)


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_give_the_log_probs_and_gradients_of_each_sequence_alone(name: str) -> None:
    model = MODELS[name]().requires_grad_(True)
    freeze_tower(model)
    alone = copy.deepcopy(model)
    alone.set_attn_implementation("eager")
    trainer = trainer_of(model)
    policy = trainer.policy
    assert not policy.shares_prompts and policy.head is not None
    rollouts = assemble(TASK, max_staleness=0, device=CPU)
    weights_T = torch.linspace(-1.0, 1.0, rollouts.tokens)
    found_T = torch.zeros(rollouts.tokens)
    batches = trainer.micro_batches(rollouts, np.arange(rollouts.sequences))
    assert max(len(batch.input_ids_BL) for batch in batches) > 1
    for batch in batches:
        log_probs_RV = policy.head.logits(policy.hidden(batch)).log_softmax(-1)
        targets_R1 = rollouts.token_ids_T[batch.tokens_R][:, None]
        log_probs_R = log_probs_RV.gather(-1, targets_R1)[:, 0]
        (log_probs_R * weights_T[batch.tokens_R]).sum().backward()
        found_T[batch.tokens_R] = log_probs_R.detach()
    expected_T = torch.cat(
        [
            longhand_log_probs(alone, one.samples, index)
            for one in TASK.groups
            for index in range(len(one.rewards))
        ]
    )
    (expected_T * weights_T).sum().backward()
    torch.testing.assert_close(found_T.double(), expected_T.detach(), rtol=0, atol=1e-4)
    for (parameter, found), expected in zip(
        model.named_parameters(), alone.parameters(), strict=True
    ):
        if expected.grad is None:
            assert found.grad is None, parameter
        else:
            assert bool(found.grad.isfinite().all()), parameter
            scale = float(expected.grad.abs().max())
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3 * scale)


def test_text_leaves_the_tower_without_gradient_and_moments() -> None:
    model = make_seeing(first_mark=100).requires_grad_(True)
    freeze_tower(model)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "visual" in name} != set()
    trained = Policy(model).parameters()
    assert "lm_head.weight" in trained and not names & trained.keys()
    text = make_recurrent("qwen3_5_text").requires_grad_(True)
    freeze_tower(text)
    assert all(parameter.requires_grad for parameter in text.parameters())


def test_all_of_a_model_without_tower_is_trained() -> None:
    """What transformers calls the decoder of this family is its head."""
    config = tiny_config("modernbert-decoder")
    model = AutoModelForCausalLM.from_config(config).requires_grad_(True)
    freeze_tower(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_is_opened_as_what_it_says_it_is(tmp_path: Path) -> None:
    model = make_seeing()
    opened = load_folder(str(save_seeing(model, tmp_path)), "float32", "student.model")
    assert type(opened) is type(model) is not type(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(opened) is type(AutoModelForImageTextToText.from_pretrained(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, opened.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r".*AWQ.*"),
        ({"hidden_size": "wide"}, r".*hidden_size.*"),
    ],
)
def test_a_folder_that_transformers_cannot_open_is_one_sentence(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_recurrent("lfm2_moe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        load_folder(str(tmp_path), "float32", "student.model")
    sentence = f"student.model: cannot load {re.escape(repr(str(tmp_path)))}: {reason}"
    assert re.fullmatch(sentence, str(caught.value)), caught.value


def test_weights_of_other_shapes_than_the_configuration_says_are_one_sentence(
    tmp_path: Path,
) -> None:
    make_recurrent("lfm2_moe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 9}))
    with pytest.raises(UserError) as caught:
        load_folder(str(tmp_path), "float32", "student.model")
    assert str(caught.value) == (
        f"student.model: the weights in {str(tmp_path)!r} have other shapes than its config.json "
        "says; expected both as save_pretrained wrote them together"
    )


def test_weights_that_a_folder_lacks_are_named_and_not_made_up(tmp_path: Path) -> None:
    save_seeing(make_seeing(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.visual.pos_embed.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_folder(str(tmp_path), "float32", "student.model")
    assert str(caught.value) == (
        f"student.model: {str(tmp_path)!r} lacks weights of its model: "
        "model.visual.pos_embed.weight; expected a folder as save_pretrained writes it"
    )
