"""Maps: invertible linear changes of basis of one axis that leave a linear layer's output as it was.

Activations are rows, x' = x T. A weight [out, in] that reads them takes the inverse transpose, W' = W T^-T:

    x' W'^T = (x T)(W T^-T)^T = x T T^-1 W^T = x W^T

so what is hard to round in x moves to W (SmoothQuant, eq. 3: T = diag(s)^-1) or spreads over all channels
(QuaRot, section 3: T orthogonal, T^-T = T).

SmoothQuant: Xiao et al. 2022, https://arxiv.org/abs/2211.10438. QuaRot: Ashkboos et al. 2024,
https://arxiv.org/abs/2404.00456. Reordering: QServe, Lin et al. 2024, https://arxiv.org/abs/2405.04532.

Shapes: n = ``size`` of the axis; x [..., n, ...] float of any dtype and layout; gradients flow through.

Road not taken: one class that holds T and T^-1. For n = 14336 they take 1.6 GB in float32, where a diagonal
takes 57 kB and a Hadamard map nothing.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.errors import InputError


class Map(ABC):
    """An invertible linear map T of an axis of ``size`` elements.

    Computes in float32, or float64 for float64 input, and returns its input's dtype, contiguous. Maps of
    plain numbers compare by value; those that hold a tensor compare, and hash, by identity.
    """

    size: int

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """x T along ``axis``. Raises ``InputError`` for another size of that axis, and for integers."""
        return self._along(self._apply, x, axis)

    def invert(self, x: Tensor, axis: int = -1) -> Tensor:
        """x T^-1 along ``axis``."""
        return self._along(self._invert, x, axis)

    def dual(self, x: Tensor, axis: int = -1) -> Tensor:
        """x T^-T along ``axis``, what a weight takes: ``apply(x) @ dual(w).T == x @ w.T``."""
        return self._along(self._dual, x, axis)

    def _along(self, act, x: Tensor, axis: int) -> Tensor:
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != self.size or not x.is_floating_point():
            raise InputError(
                f"{self} acts on floats with {self.size} elements along axis {axis}, got {x.dtype} of shape "
                f"{list(x.shape)}; name the axis of that size, or build the map for this one"
            )
        wide = x if x.dtype == torch.float64 else x.float()
        return act(wide.movedim(axis, -1)).movedim(-1, axis).to(x.dtype).contiguous()

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """x T for x [..., n] float32 or float64."""

    @abstractmethod
    def _invert(self, x: Tensor) -> Tensor:
        """x T^-1."""

    def _dual(self, x: Tensor) -> Tensor:
        """x T^-T: equal to x T for orthogonal maps."""
        return self._apply(x)


@dataclass(frozen=True, eq=False)
class Diagonal(Map):
    """T = diag(scale)^-1: activations are divided by ``scale`` [n], weights multiplied (SmoothQuant, AWQ)."""

    scale: Tensor = field(repr=False)

    def __post_init__(self):
        bad = int((~self.scale.isfinite() | (self.scale == 0)).sum())
        if self.scale.ndim != 1 or bad:
            raise InputError(
                f"a diagonal map takes finite scales [n] without zeros, got shape {list(self.scale.shape)} "
                f"with {bad} NaN, Inf or 0; clamp them"
            )

    @property
    def size(self) -> int:
        return len(self.scale)

    def _apply(self, x):
        return x / self.scale.to(x)

    def _invert(self, x):
        return x * self.scale.to(x)

    _dual = _invert


@dataclass(frozen=True, eq=False)
class Permutation(Map):
    """x T = x[..., order]; ``order`` [n] int64 lists every index once."""

    order: Tensor = field(repr=False)

    def __post_init__(self):
        if not torch.equal(self.order.cpu().sort().values, torch.arange(self.order.numel())):
            raise InputError(
                f"a permutation lists 0 .. n - 1 once each as int64 [n], got {self.order.dtype} of shape "
                f"{list(self.order.shape)} that does not; use argsort()"
            )

    @property
    def size(self) -> int:
        return len(self.order)

    def _apply(self, x):
        return x[..., self.order.to(x.device)]

    def _invert(self, x):
        return x[..., self.order.argsort().to(x.device)]


@dataclass(frozen=True, eq=False)
class Orthogonal(Map):
    """T = ``matrix`` [n, n], or blocks [b, m, m] on the diagonal; |T^T T - I| must be within 1e-5."""

    matrix: Tensor = field(repr=False)

    def __post_init__(self):
        t = self.matrix.detach().to(torch.promote_types(self.matrix.dtype, torch.float32))
        square = t.ndim in (2, 3) and t.shape[-1] == t.shape[-2]
        if not square or not (t.mT @ t - torch.eye(t.shape[-1]).to(t)).abs().max() <= 1e-5:
            raise InputError(
                f"an orthogonal map takes [n, n] or [b, m, m] with |T^T T - I| <= 1e-5, got "
                f"{self.matrix.dtype} of shape {list(t.shape)} that is not; orthonormalise it in float32"
            )

    @property
    def size(self) -> int:
        return self.matrix.shape[:-1].numel()

    def _apply(self, x):
        return self._times(x, self.matrix.to(x))

    def _invert(self, x):
        return self._times(x, self.matrix.to(x).mT)

    def _times(self, x: Tensor, t: Tensor) -> Tensor:
        if t.ndim == 2:
            return x @ t
        return torch.einsum("...bm,bmk->...bk", x.unflatten(-1, (-1, t.shape[-1])), t).flatten(-2)


@dataclass(frozen=True)
class Product(Map):
    """T = T_1 T_2 ...: the first map acts first; rounding to the input's dtype happens once, at the end."""

    maps: tuple[Map, ...]

    def __post_init__(self):
        if len({m.size for m in self.maps}) != 1:
            raise InputError(f"a product takes maps of one size, got sizes {[m.size for m in self.maps]}")

    @property
    def size(self) -> int:
        return self.maps[0].size

    def _apply(self, x):
        return functools.reduce(lambda y, m: m._apply(y), self.maps, x)

    def _invert(self, x):
        return functools.reduce(lambda y, m: m._invert(y), reversed(self.maps), x)

    def _dual(self, x):
        return functools.reduce(lambda y, m: m._dual(y), self.maps, x)


def gram(h: Tensor, t: Map) -> Tensor:
    """The Gram matrix [n, n] of mapped activations, (X T)^T (X T) = T^T H T from H = X^T X."""
    return t.apply(t.apply(h, -2), -1)
