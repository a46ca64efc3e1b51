"""AdamW as in Table 8, with states and weights in fp32 or bf16, and fp32 gradient sums.

All arithmetic is fp32; what is stored in bf16 is rounded *stochastically*. Rounding to nearest
would stand still: with beta2 = 0.999 the second moment moves by 0.1 % an update and a weight by
about the learning rate, both far below half a bf16 step (0.2-0.4 %), so nearly every update would
be lost. Stochastic rounding keeps the expectation. For fp32 weights and states the update is that
of `torch.optim.AdamW`, weight decay (Table 8: 0.1) on every parameter.

Invariant: an update depends only on weights, gradients, moments, the count of updates and the seed.
The generator is seeded anew for each update, so a checkpoint needs no generator state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from zppo.config.topology import OptimizerConfig

CHUNK = 1 << 24
"""Elements handled at once; bounds the fp32 copies of low-precision tensors to 64 MiB each."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and states may be stored in."""


class Gradients:
    """Sums of gradients over micro-batches, in fp32 whatever the dtype of the weights.

    fp32 parameters keep theirs in `.grad`. For others a hook moves each micro-batch's `.grad` into
    an fp32 buffer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._sums: dict[str, Tensor] = {}
        self._summed: set[str] = set()
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                self._sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(self._collector(name))

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._sums[name].add_(parameter.grad)
            self._summed.add(name)
            parameter.grad = None

        return collect

    def clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
        for name in self._summed:
            self._sums[name].zero_()
        self._summed.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; parameters that took no part are left out."""
        found = {
            name: self._sums[name] if name in self._summed else p.grad
            for name, p in self._parameters.items()
        }
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def norm(self) -> Tensor:
        """Global L2 norm, a scalar tensor (0 when no gradient exists)."""
        return torch.nn.utils.get_total_norm(list(self.tensors().values())).float()

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients so that their norm is at most `limit`; `norm` is what `norm()`
        returned."""
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self.tensors().values():
            gradient.mul_(scale)


class AdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) over named parameters."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, seed: int
    ) -> None:
        self.config = config
        self.updates = 0
        self._seed = seed
        self._parameters = dict(parameters)
        for name, parameter in self._parameters.items():
            if parameter.dtype not in DTYPES.values():
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype}; expected float32 or bfloat16"
                )
        dtype = DTYPES[config.state_dtype]
        self._first = {
            name: torch.zeros_like(p, dtype=dtype) for name, p in self._parameters.items()
        }
        self._second = {
            name: torch.zeros_like(p, dtype=dtype) for name, p in self._parameters.items()
        }
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Apply one update. Parameters without a gradient are left alone, as in torch."""
        self.updates += 1
        self._seed_generators()
        for name, gradient in gradients.items():
            tensors = (self._parameters[name].data, self._first[name], self._second[name], gradient)
            for chunk in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
                self._update(*chunk)

    def _update(self, weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor) -> None:
        """One chunk, in the order of operations of `torch.optim.AdamW`."""
        c = self.config
        gradient = gradient.float()
        w, m, v = weight.float(), first.float(), second.float()
        w.mul_(1 - c.learning_rate * c.weight_decay)
        m.lerp_(gradient, 1 - c.beta1)
        v.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        denominator = (v.sqrt() / sqrt(1 - c.beta2**self.updates)).add_(c.epsilon)
        w.addcdiv_(m, denominator, value=-c.learning_rate / (1 - c.beta1**self.updates))
        for stored, value in ((weight, w), (first, m), (second, v)):
            self._store(stored, value)

    def _store(self, stored: Tensor, value: Tensor) -> None:
        if stored.dtype == torch.bfloat16:
            stored.copy_(round_stochastically(value, self._generators[value.device]))

    def _seed_generators(self) -> None:
        for parameter in self._parameters.values():
            if parameter.device not in self._generators:
                self._generators[parameter.device] = torch.Generator(parameter.device)
        for generator in self._generators.values():
            generator.manual_seed((self._seed * 1_000_003 + self.updates) % 2**63)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The moments, named `first.NAME` and `second.NAME`."""
        for prefix, moments in (("first", self._first), ("second", self._second)):
            for name, tensor in moments.items():
                yield f"{prefix}.{name}", tensor

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Take over saved moments. Raises ValueError, before anything is changed, if names, shapes
        or dtypes differ."""
        own = dict(self.tensors())
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ValueError(
                f"optimizer state and model differ in {len(odd)} tensors, e.g. {odd[0]!r}"
            )
        for name, tensor in own.items():
            saved = tensors[name]
            if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                was, now = (
                    f"{saved.dtype} {list(saved.shape)}",
                    f"{tensor.dtype} {list(tensor.shape)}",
                )
                raise ValueError(
                    f"optimizer state {name!r} was saved as {was}, the run needs {now}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.updates = updates


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that make the expectation the value itself.

    bf16 is the upper half of fp32, so a uniform 16-bit number is added to the bits before the lower
    half is cut off. Non-finite values are rounded to nearest, because carrying into them would
    change what they are.
    """
    noise = torch.randint(
        0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = (value.view(torch.int32) + noise) & -65536
    rounded = torch.where(value.isfinite(), bits.view(torch.float32), value)
    return rounded.to(torch.bfloat16)
