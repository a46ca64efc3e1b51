"""What an LM head may do to its product before the softmax: a scale, and a soft cap
`cap * tanh(scale * logit / cap)` (Gemma 2).

Both are applied to a chunk of logits in place, and their derivative to its gradient in place, so
that every loss from hidden states has them and none needs all logits at once. A head that only
scales costs a loss nothing where the scale can be a part of the temperature.

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

RowGradient = Callable[[slice, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class LogitMap:
    """scale and soft cap; without a cap logits are only scaled."""

    scale: float = 1.0
    soft_cap: float | None = None

    @staticmethod
    def of(scale: float, soft_cap: float | None, prefix: str = "") -> LogitMap:
        """Raise ValueError for numbers that are not positive."""
        for name, value in (("logit_scale", scale), ("soft_cap", soft_cap)):
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                expected = "None or a" if name == "soft_cap" else "a"
                raise ValueError(
                    f"{prefix}{name} is {value!r}; expected {expected} finite number above 0"
                )
        return LogitMap(float(scale), None if soft_cap is None else float(soft_cap))

    def with_temperature(self, temperature: float) -> tuple[LogitMap, float]:
        """The same softmax with the scale inside the temperature, where there is no cap."""
        if self.soft_cap is not None:
            return self, temperature
        return NO_MAP, temperature / self.scale

    def apply_(self, logits_CV: Tensor) -> Tensor:
        """The head's logits over its product's memory."""
        if self.soft_cap is None:
            return logits_CV if self.scale == 1.0 else logits_CV.mul_(self.scale)
        return logits_CV.mul_(self.scale / self.soft_cap).tanh_().mul_(self.soft_cap)

    def around(self, row_gradient: RowGradient) -> RowGradient:
        """The row operation on mapped logits, with the gradient by the product itself."""
        if self == NO_MAP:
            return row_gradient

        def mapped(part: slice, logits_CV: Tensor, gradient_CV: Tensor | None) -> None:
            self.apply_(logits_CV)
            slopes_CV = None if gradient_CV is None else self._slopes(logits_CV)
            row_gradient(part, logits_CV, gradient_CV)
            if gradient_CV is not None and slopes_CV is not None:
                gradient_CV.mul_(slopes_CV)

        return mapped

    def _slopes(self, logits_CV: Tensor) -> Tensor | float:
        """Derivative of the mapped logits by the product: a copy, since the gradient overwrites
        them."""
        if self.soft_cap is None:
            return self.scale
        return (logits_CV / self.soft_cap).square_().neg_().add_(1.0).mul_(self.scale)


NO_MAP = LogitMap()
"""Of a head whose product is its logits."""
