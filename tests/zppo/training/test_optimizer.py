"""AdamW against torch's own, stochastic rounding, fp32 gradient sums, saved moments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from zppo.config.topology import OptimizerConfig
from zppo.training import optimizer as module
from zppo.training import tensor_file
from zppo.training.optimizer import (
    AdamW,
    Gradients,
    round_stochastically,
    rounding_bits,
    rounding_stream,
)
from zppo.training.tensor_file import Kind, kind_of

SHAPES = {"matrix": (7, 5), "vector": (5,), "scalar": ()}
CPU = torch.device("cpu")


class Saved(dict[str, Tensor]):
    """Tensors in memory, as a file of them is read."""

    def kinds(self) -> dict[str, Kind]:
        return {name: kind_of(tensor) for name, tensor in self.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        tensor = self[name]
        return tensor[start : start + count] if tensor.dim() else tensor


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torch_adamw(own: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        own.values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    learning_rate=st.floats(1e-6, 1e-1),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    weight_decay=st.floats(0.0, 1.0),
)
def test_fp32_is_torch_adamw(
    learning_rate: float, beta1: float, beta2: float, weight_decay: float
) -> None:
    config = OptimizerConfig(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        state_dtype="float32",
    )
    own, theirs = parameters(), parameters()
    ours, reference = AdamW(own, config, seed=0), torch_adamw(theirs, config)
    for step in range(5):
        ours.step(gradients(step))
        for name, gradient in gradients(step).items():
            theirs[name].grad = gradient
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    config = OptimizerConfig(learning_rate=0.1, state_dtype="bfloat16")
    whole, cut = parameters(dtype), parameters(dtype)
    AdamW(whole, config, seed=0).step(gradients(0))
    monkeypatch.setattr(module, "CHUNK", 4)
    AdamW(cut, config, seed=0).step(gradients(0))
    assert all(torch.equal(whole[name], cut[name]) for name in SHAPES)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_fused_loop_is_the_update_in_tensor_operations(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    state_dtype: Literal["float32", "bfloat16"],
    beta1: float,
) -> None:
    """Two updates of 5,000 numbers. A last bit of float32 may differ, and then, where the noise
    falls between the two, a bf16 goes to the other neighbour."""
    config = OptimizerConfig(learning_rate=0.01, beta1=beta1, state_dtype=state_dtype)
    generator = torch.Generator().manual_seed(0)
    start, first, second = torch.randn(3, 5000, generator=generator)
    found = list[dict[str, Tensor]]()
    for fuses in (True, False):
        monkeypatch.setattr(module, "fuses_adamw", lambda device, fuses=fuses: fuses)
        own = {"w": nn.Parameter(start.to(dtype, copy=True))}
        ours = AdamW(own, config, seed=0)
        ours.step({"w": first})
        ours.step({"w": second})
        found.append({"w": own["w"].detach(), **dict(ours.tensors())})
    exact = dtype == torch.float32 and state_dtype == "float32"
    for name, fused in found[0].items():
        plain = found[1][name]
        far = ~torch.isclose(fused, plain, rtol=1e-5, atol=1e-7)
        assert float(far.float().mean()) <= (0 if exact else 0.01), name
        torch.testing.assert_close(fused, plain, rtol=2**-6, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuses", [True, False])
def test_how_elements_lie_does_not_show(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fuses: bool
) -> None:
    """A transposed weight, one with gaps, and a gradient that is one number repeated."""
    monkeypatch.setattr(module, "fuses_adamw", lambda device: fuses)
    config = OptimizerConfig(learning_rate=0.1)
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    laid = {
        "in order": start.clone(),
        "transposed": start.t().contiguous().t(),
        "with gaps": torch.zeros(7, 10, dtype=dtype)[:, ::2].copy_(start),
    }
    assert [tensor.is_contiguous() for tensor in laid.values()] == [True, False, False]
    found = []
    for tensor in laid.values():
        ours = AdamW({"w": nn.Parameter(tensor)}, config, seed=0)
        ours.step({"w": gradients(0)["matrix"]})
        ours.step({"w": torch.ones(()).expand(7, 5)})
        found.append({"w": tensor, **dict(ours.tensors())})
    assert not torch.equal(found[0]["w"], start)
    for name, expected in found[0].items():
        assert all(torch.equal(one[name], expected) for one in found[1:]), name


def test_threads_of_the_fused_loop_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(learning_rate=0.1)
    alone, shared = parameters(torch.bfloat16), parameters(torch.bfloat16)
    AdamW(alone, config, seed=0).step(gradients(0))
    monkeypatch.setattr("zppo_kernels.adamw.ELEMENTS_PER_THREAD", 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    AdamW(shared, config, seed=0).step(gradients(0))
    assert all(torch.equal(alone[name], shared[name]) for name in SHAPES)


def test_the_fused_loop_keeps_what_is_not_finite() -> None:
    own = {"w": nn.Parameter(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).bfloat16())}
    AdamW(own, OptimizerConfig(learning_rate=0.1), seed=0).step({"w": torch.zeros(4)})
    assert own["w"].isinf().tolist() == [True, True, False, False]
    assert own["w"].isnan().tolist() == [False, False, True, False]
    assert own["w"][0] > 0 > own["w"][1]


def test_a_parameter_without_gradient_stays() -> None:
    own = parameters()
    before = own["vector"].clone()
    AdamW(own, OptimizerConfig(learning_rate=0.1), seed=0).step({"matrix": gradients(0)["matrix"]})
    assert torch.equal(own["vector"], before)


def _distance_after(
    dtype: torch.dtype, state_dtype: str, learning_rate: float, steps: int
) -> float:
    """Fit a vector of 256 numbers with noisy gradients; returns the root mean square error at the
    end."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(256, generator=generator)
    own = {"w": nn.Parameter(torch.zeros(256, dtype=dtype))}
    config = OptimizerConfig(learning_rate=learning_rate, weight_decay=0.0, state_dtype=state_dtype)  # type: ignore[arg-type]
    ours = AdamW(own, config, seed=0)
    for _ in range(steps):
        noise = 0.1 * torch.randn(256, generator=generator)
        ours.step({"w": own["w"].detach().float() - target + noise})
    return float((own["w"].detach().float() - target).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_states_converge_as_fp32_ones_do(dtype: torch.dtype) -> None:
    """bf16 weights are a grid of 0.4 %, so near the optimum they are that far away; fp32 weights
    must come as near."""
    reference = _distance_after(torch.float32, "float32", 1e-2, 600)
    found = _distance_after(dtype, "bfloat16", 1e-2, 600)
    assert found < reference + (0.01 if dtype == torch.bfloat16 else 0.003)


def test_steps_far_below_half_a_bf16_step_are_not_lost() -> None:
    """Weights of 1.0 in bf16 have neighbours 0.4-0.8 % away; 400 updates of 1e-4 must still move
    them by 0.04."""
    own = {"w": nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))}
    ours = AdamW(own, OptimizerConfig(learning_rate=1e-4, weight_decay=0.0), seed=0)
    for _ in range(400):
        ours.step({"w": torch.ones(4096)})
    assert float(own["w"].detach().float().mean()) == pytest.approx(0.96, abs=0.002)


def test_the_second_moment_does_not_stand_still_in_bf16() -> None:
    """beta2 = 0.999 moves it by 0.1 % an update, below what rounding to nearest in bf16 can
    follow."""
    own = {"w": nn.Parameter(torch.zeros(4096))}
    ours = AdamW(own, OptimizerConfig(learning_rate=1e-9), seed=0)
    for _ in range(500):
        ours.step({"w": torch.ones(4096)})
    second = dict(ours.tensors())["second.w"]
    assert second.dtype == torch.bfloat16
    assert float(second.float().mean()) == pytest.approx(1 - 0.999**500, rel=0.01)


@settings(max_examples=50, deadline=None)
@given(
    value=st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_rounding_goes_to_a_neighbour_and_keeps_the_expectation(value: float, sign: float) -> None:
    values = torch.full((20_000,), sign * value)
    rounded = round_stochastically(values, rounding_bits(7, 0, len(values), CPU))
    bits = values[:1].view(torch.int32)
    below, above = (
        (bits & -65536).view(torch.float32),
        ((bits & -65536) + 65536).view(torch.float32),
    )
    assert set(rounded.float().tolist()) <= {float(below), float(above)}
    share = float((values[0] - below) / (above - below))
    assert float((rounded.float() == above).float().mean()) == pytest.approx(share, abs=0.02)


def test_rounding_leaves_exact_and_non_finite_values_alone() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan")])
    rounded = round_stochastically(values, rounding_bits(7, 0, len(values), CPU)).float()
    torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)


def splitmix64(state: int) -> int:
    """The generator of Steele et al. 2014 as it is published, in whole numbers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@given(stream=st.integers(-(2**63), 2**63 - 1), place=st.integers(0, 2**40))
def test_the_bits_of_an_element_are_those_of_splitmix64(stream: int, place: int) -> None:
    found = rounding_bits(stream, place, 3, CPU).tolist()
    wanted = [splitmix64(stream + 0x9E3779B97F4A7C15 * (place + i + 1)) for i in range(3)]
    assert [bits % 2**64 for bits in found] == wanted


def test_streams_of_seeds_updates_and_tensors_are_apart() -> None:
    keys = {
        rounding_stream(seed, update, name)
        for seed in range(10)
        for update in range(10)
        for name in ("a", "b", "first.a")
    }
    assert len(keys) == 300


def test_weight_and_moments_of_an_element_are_rounded_apart() -> None:
    """The three 16-bit numbers of an element are uncorrelated, and so are those of neighbours."""
    bits = rounding_bits(rounding_stream(0, 1, "w"), 0, 200_000, CPU)
    parts = torch.stack([((bits >> shift) & 0xFFFF).double() for shift in (0, 16, 32)])
    rows = torch.cat([parts[:, 1:], parts[:, :-1]])
    assert float((torch.corrcoef(rows) - torch.eye(6)).abs().max()) < 0.012  # 5 of 1 / sqrt(N)
    assert float((parts.mean(1) / 65535 - 0.5).abs().max()) < 0.0033  # 5 standard errors


def test_saved_moments_continue_bit_for_bit() -> None:
    config = OptimizerConfig(learning_rate=1e-2)
    straight, resumed = parameters(torch.bfloat16), parameters(torch.bfloat16)
    first = AdamW(straight, config, seed=3)
    for step in range(3):
        first.step(gradients(step))
    saved = Saved((name, tensor.clone()) for name, tensor in first.tensors())
    for name in SHAPES:
        resumed[name].data.copy_(straight[name].data)
    second = AdamW(resumed, config, seed=3)
    second.load(saved, updates=first.updates)
    for ours in (first, second):
        for step in range(3, 6):
            ours.step(gradients(step))
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(first.tensors(), second.tensors(), strict=True)
    )


def test_foreign_moments_are_refused_before_anything_changes() -> None:
    ours = AdamW(parameters(), OptimizerConfig(), seed=0)
    saved = Saved((name, torch.ones_like(tensor)) for name, tensor in ours.tensors())
    short = Saved((name, tensor) for name, tensor in saved.items() if name != "second.vector")
    with pytest.raises(ValueError, match=r"differ in 1 tensors, e.g. 'second.vector'"):
        ours.load(short, updates=1)
    wide = Saved(saved | {"second.vector": torch.ones(5)})
    message = r"optimizer state 'second.vector' was saved as torch.float32 \[5\], the run needs torch.bfloat16 \[5\]"
    with pytest.raises(ValueError, match=message):
        ours.load(wide, updates=1)
    assert ours.updates == 0 and all(not tensor.any() for _, tensor in ours.tensors())


def test_moments_are_written_one_by_one_as_safetensors_reads_them(tmp_path: Path) -> None:
    ours = AdamW(parameters(torch.bfloat16), OptimizerConfig(), seed=0)
    ours.step(gradients(0))
    moments = dict(ours.tensors())
    kinds = {name: kind_of(tensor) for name, tensor in moments.items()}
    tensor_file.write(tmp_path / "moments", kinds, iter(moments.values()))
    theirs = load_file(tmp_path / "moments")
    assert theirs.keys() == moments.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in moments.items())
    with tensor_file.opened(tmp_path / "moments") as saved:
        assert saved.kinds() == kinds
        assert torch.equal(saved.rows("first.matrix", 2, 3), moments["first.matrix"][2:5])
        assert saved.rows("first.matrix", 7, 0).shape == (0, 5)
        again = AdamW(parameters(torch.bfloat16), OptimizerConfig(), seed=0)
        again.load(saved, updates=1)
    assert all(torch.equal(tensor, moments[name]) for name, tensor in again.tensors())


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"parameter 'w' is torch.float16; expected float32 or bfloat16"
    ):
        AdamW({"w": nn.Parameter(torch.ones(2, dtype=torch.float16))}, OptimizerConfig(), seed=0)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """512 micro-batches of 1 after one of 512: in bf16 the sum would stand still at 512."""
    own = {"w": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    sums = Gradients(own)
    for factor in [512.0] + [1.0] * 512:
        (own["w"] * factor).sum().backward()
    assert sums.tensors()["w"].dtype == torch.float32
    assert float(sums.tensors()["w"]) == 1024.0
    sums.clear()
    assert sums.tensors() == {}
    (own["w"] * 2.0).sum().backward()
    assert float(sums.tensors()["w"]) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_bounds_the_global_norm(dtype: torch.dtype) -> None:
    own = {
        "a": nn.Parameter(torch.zeros(1, dtype=dtype)),
        "b": nn.Parameter(torch.zeros(1, dtype=dtype)),
    }
    sums = Gradients(own)
    (3.0 * own["a"] + 4.0 * own["b"]).sum().backward()
    norm = sums.norm()
    assert float(norm) == 5.0
    sums.clip(norm, 10.0)
    assert float(sums.norm()) == 5.0
    sums.clip(norm, 1.0)
    assert float(sums.norm()) == pytest.approx(1.0, rel=1e-5)


def test_no_gradient_has_norm_zero() -> None:
    assert float(Gradients(parameters()).norm()) == 0.0
