"""Fake quantization with a gradient: forward what the Format stores, backward a rule of choice.

    forward    x^ = decode(encode(x))            the arithmetic of ``Format`` itself, bit for bit
    backward   dx^/dx = M in {0, 1}, by a surrogate that looks at u = x / s + z and at v, the point taken

    Identity   M = 1                             Bengio, Leonard, Courville 2013, https://arxiv.org/abs/1308.3432
    Clipped    M = 1 where u rounds to a point that is not a clip: within half a gap of the ends
    Interior   M = 1 where Q_n < u < Q_p         LSQ, eq. 5
    Trust      M = 1 where |v - u| <= T          QuEST, section 3.3; Panferov et al. 2025,
                                                 https://arxiv.org/abs/2502.05003

Who owns the steps is another choice (`Straight`: nobody, they are fitted at every call or given):

    LSQ           dx^/ds = v - u M,  the gradient of s times g = 1 / sqrt(N Q_p),  s_0 = 2 mean|x| / sqrt(Q_p)
                  Esser et al. 2019, https://arxiv.org/abs/1902.08153, eq. 3 and sections 2.1, 2.2
    LearnedRange  the same derivative with g = 1, and a trained zero: z = clamp(round(z~)); Bondarenko, Nagel,
                  Blankevoort 2021, https://arxiv.org/abs/2109.12948
    PACT          y = clamp(x, 0, alpha), dx^/dalpha = 1 where x >= alpha, else 0; s = alpha / Q_p
                  Choi et al. 2018, https://arxiv.org/abs/1805.06085, eq. 1 to 3

Trained steps pass straight through the rounding to their storage, too, and keep a floor: a step that an
optimizer has pushed below it still receives its gradient and can come back.

Shapes: x any that the block tiles; s, z, alpha [*block.scale_shape(x.shape)]; u, v as blocks [*those, n].

Road not taken: rounding of our own (round, clamp, rescale). Training and conversion then agree until a scale
is stored in float16 or a zero is added on the other side of the rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Format, Params, Zero
from fewbit.format.affine import nonzero
from fewbit.format.fake import Steps, Through, check, limits
from fewbit.format.qtensor import value_of
from fewbit.grid import Int, Table

FLOOR = 1e-8  # least trained step


class Surrogate(ABC):
    """Which elements pass their gradient."""

    @abstractmethod
    def mask(self, u: Tensor, v: Tensor, fmt: Format) -> Tensor | None:
        """M for ``u`` in steps and the points ``v`` that they became, same shape, bool; None: all pass."""


@dataclass(frozen=True)
class Identity(Surrogate):
    """All pass, those that saturate as well."""

    def mask(self, u, v, fmt):
        return None


@dataclass(frozen=True)
class Clipped(Surrogate):
    """Those pass that rounded without being clipped."""

    def mask(self, u, v, fmt):
        low, high = _ends(fmt)
        return (u >= low) & (u <= high)


@dataclass(frozen=True)
class Interior(Surrogate):
    """Those pass that lie between the outermost points: clamp first, round then (LSQ)."""

    def mask(self, u, v, fmt):
        return (u > fmt.grid.min) & (u < fmt.grid.max)


@dataclass(frozen=True, kw_only=True)
class Trust(Surrogate):
    """Those pass whose error is at most T, half of the grid's widest gap; beyond the ends at most T / outer.

    ``outer`` 1.3 is the paper's for one bit, where half a gap is as wide as the interval itself.
    """

    outer: float = 1.0

    def __post_init__(self):
        if not 0 < self.outer < math.inf:
            raise InputError(f"an outer trust factor of {self.outer} is none; use 1.0, or 1.3 for one bit")

    def mask(self, u, v, fmt):
        points = fmt.unit_points()
        steps = (fmt.grid.max - fmt.grid.min) / (points[-1] - points[0]).item()
        trusted = points.diff().max().item() / 2 * steps
        beyond = (u < fmt.grid.min) | (u > fmt.grid.max)
        return (v - u).abs() <= torch.where(beyond, trusted / self.outer, trusted)


def fake(
    x: Tensor,
    fmt: Format,
    params: Params | None = None,
    surrogate: Surrogate | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``fmt.encode(x, params).dequantize()`` in x's shape and dtype, with the gradient of ``surrogate``.

    params: given steps, or None to fit them to x at every call; they receive no gradient. surrogate:
    `Clipped` where None. generator: of stochastic rounding. Raises ``InputError`` for a surrogate that asks
    for the points of a grid of vectors, of learned tables or of over 16 bits; those take `Identity`.
    """
    surrogate = Clipped() if surrogate is None else surrogate
    listed = fmt.grid.width == 1 and fmt.codebook is None and fmt.grid.bits <= 16
    if not listed and not isinstance(surrogate, Identity):
        raise InputError(
            f"{fmt} has no points on a line for {type(surrogate).__name__}() to look at; use Identity()"
        )
    with torch.no_grad():
        wide = x if x.dtype == torch.float64 else x.float()
        params = fmt.fit(wide) if params is None and fmt.scale is not None else params
        q = fmt.encode(wide, Params(scale=None, zero=None) if params is None else params, generator)
        if isinstance(surrogate, Identity):
            mask = None
        elif fmt.scale is None:
            mask = surrogate.mask(wide, fmt.unit_values(q.codes, wide.dtype), fmt)
        else:
            scale = nonzero(value_of(params.scale)).to(wide.dtype).unsqueeze(-1)
            zero = None if params.zero is None else value_of(params.zero).to(wide.dtype).unsqueeze(-1)
            u = fmt.to_unit(fmt.block.split(wide), scale, zero)
            v = fmt.block.split(fmt.unit_values(q.codes, wide.dtype))
            mask = fmt.block.join(surrogate.mask(u, v, fmt), x.shape)
        value = q.dequantize(x.dtype)
    return Through.apply(x, value, mask)


class FakeQuant(ABC):
    """A surrogate and an owner of the steps. Frozen; what is trained comes as a mapping of tensors."""

    learns: bool = True

    @abstractmethod
    def initial(self, x: Tensor, fmt: Format) -> dict[str, Tensor]:
        """What is trained, float32 by name, as it starts for ``x``; empty where nothing is."""

    @abstractmethod
    def params(self, x: Tensor, fmt: Format, learned: Mapping[str, Tensor]) -> Params:
        """Steps and zeros as they are stored: those with which ``fmt.encode`` gives the forward's codes."""

    @abstractmethod
    def __call__(
        self, x: Tensor, fmt: Format, learned: Mapping[str, Tensor], count: int | None = None
    ) -> Tensor:
        """x [...] float32 or float64 -> x^, differentiable in x and in ``learned``.

        count: elements that count as sharing a step (LSQ's N); None: those of ``x``.
        """


@dataclass(frozen=True, kw_only=True)
class Straight(FakeQuant):
    """Steps fitted by the format's range rule at every call; the straight-through estimator and QuEST."""

    surrogate: Surrogate = Clipped()
    learns = False

    def initial(self, x, fmt):
        return {}

    def params(self, x, fmt, learned):
        return fmt.fit(x.detach())

    def __call__(self, x, fmt, learned, count=None):
        return fake(x, fmt, surrogate=self.surrogate)


@dataclass(frozen=True, kw_only=True)
class LSQ(FakeQuant):
    """Trained steps of symmetric formats, gradient scaled by 1 / sqrt(N Q_p)."""

    surrogate: Surrogate = Interior()

    def initial(self, x, fmt):
        _check_symmetric(self, fmt)
        size = fmt.block.split(x.detach().float()).abs().mean(-1)
        return {"step": (2 * size / math.sqrt(fmt.grid.max)).clamp(min=FLOOR)}

    def params(self, x, fmt, learned):
        return Params(scale=fmt.store(learned["step"].detach().clamp(min=FLOOR), x.detach()), zero=None)

    def __call__(self, x, fmt, learned, count=None):
        step = learned["step"]
        count = x.numel() // step.numel() if count is None else count
        g = 1 / math.sqrt(count * fmt.grid.max)
        scaled = Through.apply(step * g, step)  # forward s, backward g
        return _through(x, _steps(scaled, None, self.params(x, fmt, learned), fmt), self.surrogate)


@dataclass(frozen=True, kw_only=True)
class LearnedRange(FakeQuant):
    """Trained steps and zeros, started from what the format's range rule finds."""

    surrogate: Surrogate = Clipped()

    def initial(self, x, fmt):
        check(fmt)
        if fmt.offsets is not None:
            raise InputError(f"{fmt} codes its offsets, which cannot be trained; use plain zeros")
        start = fmt.fit(x.detach().float())
        learned = {"step": value_of(start.scale).float().clamp(min=FLOOR)}
        return learned if start.zero is None else learned | {"zero": start.zero.float()}

    def params(self, x, fmt, learned):
        scale = fmt.store(learned["step"].detach().clamp(min=FLOOR), x.detach())
        if fmt.zero is Zero.NONE:
            return Params(scale=scale, zero=None)
        zero, grid = learned["zero"].detach(), fmt.grid
        if fmt.zero is not Zero.INTEGER:
            return Params(scale=scale, zero=zero.to(fmt.zero_dtype))
        return Params(scale=scale, zero=zero.round().clamp(grid.min, grid.max).to(grid.code_dtype))

    def __call__(self, x, fmt, learned, count=None):
        zero = learned.get("zero")
        if fmt.zero is Zero.INTEGER:  # the paper's clamp: beyond the grid a zero has no gradient
            zero = zero.clamp(fmt.grid.min, fmt.grid.max)
        at = _steps(learned["step"], zero, self.params(x, fmt, learned), fmt)
        return _through(x, at, self.surrogate)


@dataclass(frozen=True, kw_only=True)
class PACT(FakeQuant):
    """A trained clip alpha of what is never negative; an L2 penalty on it is the optimizer's weight decay."""

    def initial(self, x, fmt):
        _check_symmetric(self, fmt)
        if fmt.grid.min != 0:
            raise InputError(f"PACT clips to [0, alpha], got {fmt}; use an unsigned grid such as uint4")
        return {"alpha": fmt.block.split(x.detach().float()).amax(-1).clamp(min=FLOOR)}

    def params(self, x, fmt, learned):
        raw = learned["alpha"].detach().clamp(min=FLOOR) / fmt.grid.max
        return Params(scale=fmt.store(raw, x.detach()), zero=None)

    def __call__(self, x, fmt, learned, count=None):
        alpha, blocks = learned["alpha"].unsqueeze(-1), fmt.block.split(x)
        soft = torch.where(blocks >= alpha, alpha, blocks.relu())
        with torch.no_grad():
            value = fmt.encode(x, self.params(x, fmt, learned)).dequantize(x.dtype)
        return Through.apply(fmt.block.join(soft, x.shape), value)


def _ends(fmt: Format) -> tuple[float, float]:
    """`limits`, without a tensor of points where they are known as numbers: a compiled graph holds none."""
    if isinstance(fmt.grid, Int):
        return fmt.grid.min - 0.5, fmt.grid.max + 0.5
    if isinstance(fmt.grid, Table):
        points = sorted(set(fmt.grid.values))
        return points[0] - (points[1] - points[0]) / 2, points[-1] + (points[-1] - points[-2]) / 2
    return limits(fmt)


def _check_symmetric(rule: FakeQuant, fmt: Format) -> None:
    check(fmt)
    if fmt.zero is not Zero.NONE:
        raise InputError(
            f"{type(rule).__name__} trains steps without zeros, got {fmt}; use a symmetric format, or "
            "LearnedRange()"
        )


def _steps(step: Tensor, zero: Tensor | None, params: Params, fmt: Format) -> Steps:
    """Stored steps with gradients to the trained ones."""
    scale = Through.apply(step, value_of(params.scale).to(step.dtype)).unsqueeze(-1)
    if zero is not None:
        zero = Through.apply(zero, value_of(params.zero).to(zero.dtype)).unsqueeze(-1)
    return Steps(format=fmt, params=params, scale=scale, zero=zero)


def _through(x: Tensor, at: Steps, surrogate: Surrogate) -> Tensor:
    """x on the grid, differentiable in x and in the steps."""
    fmt = at.format
    u = fmt.to_unit(fmt.block.split(x), at.scale, at.zero)
    with torch.no_grad():
        v = fmt.grid.snap(u)
        mask = surrogate.mask(u, v, fmt)
    return fmt.block.join(fmt.from_unit(Through.apply(u, v, mask), at.scale, at.zero), x.shape)
