"""The tensors of one call by name. `torch.library` operators take and return them flat.

The same tuples hold what there is one of for each tensor, such as its gradient or its shape. f is
the direction from the first token to the last, b the other one, which a one-way call leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor


class ScanTensors(NamedTuple):
    """One direction of a scan: x, dt (b, l, d), A (d, n), B, C (b, l, n), D, dt_bias (d,)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None


class ScanInputs(NamedTuple):
    """A scan in one or two directions, whose sum z (b, l, d) gates."""

    f: ScanTensors
    b: ScanTensors | None
    z: Tensor | None

    @classmethod
    def from_flat(
        cls, x_f, dt_f, A_f, B_f, C_f, D_f, bias_f, x_b, dt_b, A_b, B_b, C_b, D_b, bias_b, z
    ) -> ScanInputs:
        """From an operator's tensors, in its order."""
        f = ScanTensors(x_f, dt_f, A_f, B_f, C_f, D_f, bias_f)
        b = None if x_b is None else ScanTensors(x_b, dt_b, A_b, B_b, C_b, D_b, bias_b)
        return cls(f, b, z)

    def flat(self) -> tuple[Tensor | None, ...]:
        """The fifteen tensors in the operator's order."""
        return (*self.f, *(_NO_SCAN if self.b is None else self.b), self.z)

    def directions(self) -> tuple[ScanTensors, ...]:
        """Those that are given."""
        return (self.f,) if self.b is None else (self.f, self.b)

    def each(self, function: Callable[[Tensor], Tensor]) -> ScanInputs:
        """`function` of each tensor that is given."""
        return self.from_flat(*(None if t is None else function(t) for t in self.flat()))


_NO_SCAN = ScanTensors(*[None] * 7)


class Filter(NamedTuple):
    """One direction of a convolution: weight (d, k), bias (d,)."""

    weight: Tensor | None
    bias: Tensor | None


class ConvInputs(NamedTuple):
    """A convolution of x (b, l, d) in one or two directions."""

    x: Tensor
    f: Filter
    b: Filter | None = None

    @classmethod
    def from_flat(cls, x, weight_f, bias_f, weight_b, bias_b) -> ConvInputs:
        """From an operator's tensors, in its order."""
        b = None if weight_b is None else Filter(weight_b, bias_b)
        return cls(x, Filter(weight_f, bias_f), b)

    def flat(self) -> tuple[Tensor | None, ...]:
        """The five tensors in the operator's order."""
        return (self.x, *self.f, *(_NO_FILTER if self.b is None else self.b))

    def directions(self) -> tuple[Filter, ...]:
        """Those that are given."""
        return (self.f,) if self.b is None else (self.f, self.b)

    def each(self, function: Callable[[Tensor], Tensor]) -> ConvInputs:
        """`function` of each tensor that is given."""
        return self.from_flat(*(None if t is None else function(t) for t in self.flat()))


_NO_FILTER = Filter(None, None)


def as_returned(
    grads: Iterable[Tensor | None], inputs: Iterable[Tensor | None], x: Tensor
) -> list[Tensor]:
    """Gradients as an operator returns them: in their tensors' dtypes, empty where one was None."""
    return [
        x.new_empty(0) if grad is None else grad.to(t.dtype)
        for grad, t in zip(grads, inputs, strict=True)
    ]
