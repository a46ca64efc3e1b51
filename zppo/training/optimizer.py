"""AdamW as in Table 8, with states and weights in fp32 or bf16, and fp32 gradient sums.

All arithmetic is fp32; what is stored in bf16 is rounded *stochastically*. Rounding to nearest
would stand still: with beta2 = 0.999 the second moment moves by 0.1 % an update and a weight by
about the learning rate, both far below half a bf16 step (0.2-0.4 %), so nearly every update would
be lost. Stochastic rounding keeps the expectation. For fp32 weights and states the update is that
of `torch.optim.AdamW`, weight decay (Table 8: 0.1) on every parameter.

Invariant: an update depends only on weights, gradients, moments, the count of updates and the seed.
The bits that rounding needs are a hash of seed, update, tensor and place of the element, so a
checkpoint needs no generator state, and any number of ranks round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from math import prod, sqrt

import torch
from torch import Tensor, nn

from zppo.config.topology import OptimizerConfig
from zppo.training.ranks import ALONE, Ranks, cut_like, first_row, local
from zppo.training.tensor_file import SavedTensors, kind_of
from zppo_kernels.adamw import fused_adamw, fuses_adamw

CHUNK = 1 << 22
"""Elements handled at once; bounds the fp32 copies of low-precision tensors to 16 MiB each."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and states may be stored in."""

NOISE_BITS = 16
NOISE = (1 << NOISE_BITS) - 1
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIXING = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
"""The constants of splitmix64, as signed numbers."""


class Gradients:
    """Sums of gradients over micro-batches, in fp32 whatever the dtype of the weights.

    fp32 parameters keep theirs in `.grad`. For others a hook moves each micro-batch's `.grad` into
    an fp32 buffer, the first of an update over what is there. Of sharded parameters a rank has the
    gradients of its share.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks = ALONE) -> None:
        self._parameters = dict(parameters)
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._summed: set[str] = set()
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                self._sums[name] = torch.zeros_like(local(parameter), dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(self._collector(name))

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name in self._summed:
                self._sums[name].add_(local(parameter.grad))
            else:
                self._sums[name].copy_(local(parameter.grad))
            self._summed.add(name)
            parameter.grad = None

        return collect

    def clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
        self._summed.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; parameters that took no part are left out."""
        found = {
            name: self._sums[name] if name in self._summed else p.grad
            for name, p in self._parameters.items()
        }
        return {name: local(gradient) for name, gradient in found.items() if gradient is not None}

    def norm(self) -> Tensor:
        """L2 norm over all ranks, a scalar tensor (0 when no gradient exists)."""
        own = torch.nn.utils.get_total_norm(list(self.tensors().values()))
        # In float64 square and root of a float32 number give it back.
        return self._ranks.sum(own.double().square()).sqrt().float()

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients so that their norm is at most `limit`; `norm` is what `norm()`
        returned."""
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if float(scale) < 1.0:
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
        shares = {name: local(p) for name, p in self._parameters.items()}
        self._first = {name: torch.zeros_like(p, dtype=dtype) for name, p in shares.items()}
        self._second = {name: torch.zeros_like(p, dtype=dtype) for name, p in shares.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Apply one update; of sharded parameters `gradients` are those of this rank's shares.
        Parameters without a gradient are left alone, as in torch."""
        self.updates += 1
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            tensors = (local(parameter.data), self._first[name], self._second[name], gradient)
            stream = rounding_stream(self._seed, self.updates, name)
            place = first_row(parameter) * prod(parameter.shape[1:])
            # Where the elements of a tensor do not lie in their order, this is a copy of it.
            flat = [tensor.reshape(-1) for tensor in tensors]
            for chunk in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
                self._update(*chunk, stream=stream, place=place)
                place += chunk[0].numel()
            for tensor, updated in zip(tensors[:3], flat, strict=False):
                if not tensor.is_contiguous():
                    tensor.copy_(updated.view(tensor.shape))

    def _update(
        self,
        weight: Tensor,
        first: Tensor,
        second: Tensor,
        gradient: Tensor,
        *,
        stream: int,
        place: int,
    ) -> None:
        """One chunk, which begins at `place`, in the order of operations of `torch.optim.AdamW`."""
        c = self.config
        gradient = gradient.float()
        if fuses_adamw(weight.device):
            fused_adamw(
                *(weight, first, second, gradient),
                learning_rate=c.learning_rate,
                weight_decay=c.weight_decay,
                beta1=c.beta1,
                beta2=c.beta2,
                epsilon=c.epsilon,
                updates=self.updates,
                stream=stream,
                place=place,
            )
            return
        w, m, v = weight.float(), first.float(), second.float()
        w.mul_(1 - c.learning_rate * c.weight_decay)
        m.lerp_(gradient, 1 - c.beta1)
        v.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        denominator = (v.sqrt() / sqrt(1 - c.beta2**self.updates)).add_(c.epsilon)
        w.addcdiv_(m, denominator, value=-c.learning_rate / (1 - c.beta1**self.updates))
        stores = ((weight, w), (first, m), (second, v))
        rounds = any(stored.dtype == torch.bfloat16 for stored, _ in stores)
        bits = rounding_bits(stream, place, len(w), w.device) if rounds else None
        for number, (stored, value) in enumerate(stores):
            if stored.dtype == torch.bfloat16 and bits is not None:
                stored.copy_(round_stochastically(value, bits >> number * NOISE_BITS))

    def overflow(self, found: object) -> str:
        """That updates have left the weights as `found` says, and the settings that bring it about:
        too long a step, a decay that grows, a division by an epsilon that is 0 in float32."""
        c = self.config
        return (
            f"after its updates {found}; lower optimizer.learning_rate ({c.learning_rate:g}) or "
            f"optimizer.weight_decay ({c.weight_decay:g}), or raise optimizer.epsilon "
            f"({c.epsilon:g})"
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The moments, named `first.NAME` and `second.NAME`; sharded as their parameters are."""
        for prefix, moments in (("first", self._first), ("second", self._second)):
            for name, tensor in moments.items():
                yield f"{prefix}.{name}", cut_like(tensor, self._parameters[name])

    @torch.no_grad()
    def load(self, saved: SavedTensors, *, updates: int) -> None:
        """Take over saved moments, of sharded ones this rank's shares. Raises ValueError, before
        anything is changed, if names, shapes or dtypes differ."""
        own, there = dict(self.tensors()), saved.kinds()
        if own.keys() != there.keys():
            odd = sorted(own.keys() ^ there.keys())
            raise ValueError(
                f"optimizer state and model differ in {len(odd)} tensors, e.g. {odd[0]!r}"
            )
        for name, tensor in own.items():
            if there[name] != (kind := kind_of(tensor)):
                raise ValueError(
                    f"optimizer state {name!r} was saved as {there[name]}, the run needs {kind}"
                )
        for name, tensor in own.items():
            share = local(tensor)
            share.copy_(saved.rows(name, first_row(tensor), share.shape[0] if share.dim() else 1))
        self.updates = updates


def rounding_stream(seed: int, update: int, name: str) -> int:
    """The number of the bits that the tensor `name` is rounded with in one update."""
    digest = blake2b(f"{seed} {update} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def rounding_bits(stream: int, place: int, count: int, device: torch.device) -> Tensor:
    """64 random bits for each of `count` elements from number `place` on, int64: splitmix64
    (Steele et al. 2014), whose state is a multiple of the element's number."""
    bits = torch.arange(place + 1, place + 1 + count, dtype=torch.int64, device=device)
    bits.mul_(GOLDEN).add_(stream)
    for shift, factor in MIXING:
        # The shift of a signed number draws its sign in, which the mask takes out again.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_((1 << 33) - 1))


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that make the expectation the value itself.

    bf16 is the upper half of fp32, so a uniform 16-bit number, the lowest of `bits`, is added to
    the bits before the lower half is cut off. Non-finite values are rounded to nearest, because
    carrying into them would change what they are.
    """
    noise = bits.bitwise_and(NOISE).to(torch.int32)
    raised = (value.view(torch.int32) + noise) & -65536
    rounded = torch.where(value.isfinite(), raised.view(torch.float32), value)
    return rounded.to(torch.bfloat16)
