"""The trainer's attention on a CPU against torch's own: values, gradients, masks, and when it steps
aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from zppo.training import attention
from zppo.training.layout import attention_mask


class Layer(nn.Module):
    """What transformers passes besides the tensors."""

    is_causal = True
    num_key_value_groups = 3


def tensors(length: int = 11, heads: int = 6, key_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, count, length, 8) for count in (heads, key_heads, key_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def shared_mask() -> Tensor:
    """Two rollouts behind a prompt; and three, two of which begin alike, and some padding."""
    ends = torch.tensor(
        [[11, 11, 11, 6, 6, 6, 11, 11, 11, 11, 11], [9, 9, 7, 5, 5, 7, 7, 9, 9, 11, 11]]
    )
    return attention_mask(ends, torch.float64)


MASKS = {"causal": None, "shared": shared_mask(), "boolean": shared_mask() == 0}


@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients_are_those_of_torch(kind: str) -> None:
    own, theirs = tensors(), tensors()
    mask = MASKS[kind]
    found, weights = attention.products_attention(Layer(), *own, attention_mask=mask)
    expected = scaled_dot_product_attention(
        *theirs, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert weights is None
    direction = torch.randn(
        found.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    (found * direction).sum().backward()
    (expected.transpose(1, 2) * direction).sum().backward()
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_width", [5, 12])
@pytest.mark.parametrize("kind", MASKS)
def test_values_may_be_of_another_width_than_keys(kind: str, value_width: int) -> None:
    own, theirs = tensors(), tensors()
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(2, 2, 11, value_width, generator=generator, dtype=torch.float64)
    own[2], theirs[2] = values.clone().requires_grad_(), values.clone().requires_grad_()
    found, _ = attention.products_attention(Layer(), *own, attention_mask=MASKS[kind])
    expected = scaled_dot_product_attention(
        *theirs, attn_mask=MASKS[kind], is_causal=MASKS[kind] is None, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_scale_is_the_model_s_own() -> None:
    query, key, value = tensors()
    found, _ = attention.products_attention(
        Layer(), query, key, value, attention_mask=None, scaling=0.7
    )
    expected = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.7, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "reason", [*["long", "dropout", "not causal", "softcap"], "keys of before", "device"]
)
def test_everything_else_goes_to_transformers(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda *a, **k: asked.append(reason) or ("theirs", None),
    )
    query, key, value = tensors()
    more: dict[str, Any] = {"dropout": 0.1 if reason == "dropout" else 0.0}
    if reason == "long":
        monkeypatch.setattr(attention, "WIDEST", 10)
    if reason == "not causal":
        more["is_causal"] = False
    if reason == "softcap":
        more["softcap"] = 30.0
    if reason == "keys of before":
        query = query[:, :, -1:]
    if reason == "device":
        query, key, value = (one.to("meta") for one in (query, key, value))
    attention.products_attention(Layer(), query, key, value, attention_mask=None, **more)
    assert asked == [reason]


def test_nothing_quadratic_is_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []
    query, key, value = tensors(length=64)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention.products_attention(Layer(), query, key, value, attention_mask=None)
    assert sorted(kept) == [
        (1, 1, 64, 64),
        (2, 2, 64, 8),
        (2, 2, 64, 8),
        (2, 2, 192, 8),
    ]  # the mask is there once


def tiny(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **more)).eval()


def test_a_model_computes_the_same_with_it() -> None:
    model = tiny()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        attention.adopt(model)
        found = model(ids).logits
    assert model.config._attn_implementation == attention.NAME
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_masks_and_saved_folders_are_as_before(tmp_path: Any) -> None:
    model = tiny()
    ids, mask = torch.arange(20)[None].repeat(2, 1), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        attention.adopt(model)
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[:, 5:], expected[:, 5:], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()


def test_another_implementation_is_left_alone() -> None:
    model = tiny(attn_implementation="eager")
    attention.adopt(model)
    assert model.config._attn_implementation == "eager"
