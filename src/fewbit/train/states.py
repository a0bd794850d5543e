"""What an optimizer keeps of a parameter, each part in a Format, and the named ways to keep it.

    part        fp32   fp8-lm                adamw-fp8      adamw-8bit              adamw-4bit
    first  m    4      E4M3, one step        E4M3 per 256   signed map per 256      signed map per 128
    second v    4      FP16, one step        E4M3 per 256   unsigned map per 256    sixteenths per 128
    master w    -      FP16, one step        -              -                       -
    bytes       8      5                     2.03           2.03                    1.06

Why the parts differ: m is a direction and forgives eight bits. v is a square, so its elements span twice as
many binades as the gradient's, and its root divides: an element of v that became zero makes a step of
m / eps. So v has more range (FP16 under a step of its own has 40 binades) or more steps (one for 256
elements), and what is positive stays positive (`quantize`). The master weight takes additions of 1e-3 of
itself and needs the fraction of FP16.

Steps of fp8-lm are powers of two: what an update does not touch is stored again without any change.

FP8-LM: Training FP8 Large Language Models (section 2.2), https://arxiv.org/abs/2310.18313; 8-bit Optimizers
via Block-wise Quantization, https://arxiv.org/abs/2110.02861 (the dynamic maps); Memory Efficient Optimizers
with 4-bit States, https://arxiv.org/abs/2309.01507 (v without a zero); E4M3 per 256: torchao.optim.AdamWFp8.

Shapes: a part has the shape of its parameter, or of the local shard of a sharded one.

Road not taken: steps of the step before (delayed scaling). They save a pass over the tensor and saturate v at
the first burst of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import (
    FP32,
    Divisor,
    Flat,
    Format,
    MinMax,
    Params,
    PerTensor,
    PowerOfTwo,
    QTensor,
    Scaling,
    Zero,
)
from fewbit.format.affine import NATIVE
from fewbit.format.bits import pack, unpack
from fewbit.format.codec import from_plain, to_plain
from fewbit.format.fake import interval, steps
from fewbit.grid import Table, by_name

# -- formats


def one_step(grid: str) -> Format:
    """A grid under one step for the tensor: the least power of two with which nothing saturates."""
    return Format(grid=by_name(grid), block=PerTensor(), range=PowerOfTwo(rule=Scaling.RCEIL), scale=FP32)


def per(size: int, grid: str | Table) -> Format:
    """A grid under a float32 step for each ``size`` elements in memory order.

    Where the two ends of the grid differ (the signed maps: -0.993 and 1, in four bits -0.8875 and 1), the
    step takes the sign that puts the largest element on the larger end, so that it is stored exactly. With
    unsigned steps, as the published optimizers have them, such a block shrinks each time it is stored.
    """
    grid = by_name(grid) if isinstance(grid, str) else grid
    uneven = grid.min < 0 and grid.max != -grid.min
    ends = {"range": MinMax(), "divisor": Divisor.SIGNED} if uneven else {}
    return Format(grid=grid, block=Flat(size), scale=FP32, **ends)


def unsigned_map() -> tuple[float, ...]:
    """The 256 values of the unsigned dynamic map: 0, seven decades with 2, 4, ..., 128 means each, and 1."""
    return (0.0, *_means(decades=7, first=2), 1.0)


def signed_map4() -> tuple[float, ...]:
    """The 16 values of the signed dynamic map in 4 bits: three decades with 1, 2 and 4 means each; 0; 1."""
    means = _means(decades=3, first=1)
    return (*(-v for v in reversed(means)), 0.0, *means, 1.0)


def _means(*, decades: int, first: int) -> list[float]:
    """In each decade below 1 the means of equal intervals of [0.1, 1], ascending: ``first`` of them in the
    lowest, twice as many in each that follows.
    """
    n = [(10.0 ** (i + 1 - decades), first << i) for i in range(decades)]
    return [ten * (0.1 + 0.9 * (2 * j + 1) / (2 * count)) for ten, count in n for j in range(count)]


DYNAMIC_UNSIGNED8 = Table("dynamic-unsigned8", unsigned_map())
DYNAMIC4 = Table("dynamic4", signed_map4())
SIXTEENTHS = Table("sixteenths", (i / 16 for i in range(1, 17)))  # no zero: v stays positive
_TABLES = {t.name: t for t in (DYNAMIC_UNSIGNED8, DYNAMIC4, SIXTEENTHS)}


@dataclass(frozen=True, kw_only=True)
class States:
    """The Formats of the parts; None keeps a part in float32 (master: the parameter itself is the master)."""

    first: Format | None = None
    second: Format | None = None
    master: Format | None = None

    def __post_init__(self):
        for name, fmt in vars(self).items():
            check(fmt, f"the {name} part of an optimizer's state")


def check(fmt: Format | None, what: str) -> None:
    """Raise ``InputError`` for a Format that cannot be fitted anew at every step; ``what`` names its use."""
    if fmt is None:
        return
    plain = fmt.scale is None or (fmt.scale.scale is None and fmt.scale.grid.name in NATIVE)
    if not plain or fmt.zero is not Zero.NONE or fmt.codebook is not None or fmt.grid.width > 1:
        raise InputError(
            f"{what} cannot be {fmt}; take a scalar grid without zero point under plain float steps, such as "
            f"{one_step('e4m3fn')}"
        )


STATES: Mapping[str, States] = MappingProxyType({
    "fp32": States(),
    "fp8-lm": States(first=one_step("e4m3fn"), second=one_step("fp16"), master=one_step("fp16")),
    "adamw-fp8": States(first=per(256, "e4m3fn"), second=per(256, "e4m3fn")),
    "adamw-8bit": States(first=per(256, "dynamic8"), second=per(256, DYNAMIC_UNSIGNED8)),
    "adamw-4bit": States(first=per(128, DYNAMIC4), second=per(128, SIXTEENTHS)),
})  # fmt: skip


# -- values to codes and back


def quantize(
    x: Tensor, fmt: Format, *, generator: torch.Generator | None = None, positive: bool = False
) -> QTensor:
    """``x`` in ``fmt``, with steps fitted to x itself; nothing waits for the device.

    x: any shape that the format's blocks tile. generator: stochastic rounding. positive: x >= 0, and what is
    above 0 stays above 0: it is rounded up to the least point of the grid. A block that holds NaN or Inf gets
    the step NaN, so that all of it is NaN when read; a format without steps keeps them where they are.
    """
    x = x.detach().float()
    if fmt.scale is None:
        params = Params(scale=None, zero=None)
    else:
        fmt.check(x.shape)
        params = steps(fmt, *interval(fmt, x), x).params
        blocks = fmt.block.split(x)
        finite = torch.isfinite(blocks.abs().amax(-1))
        params = replace(params, scale=torch.where(finite, params.scale, math.nan))
    if positive:
        least = x.new_full((), fmt.grid.least)
        if params.scale is not None:
            step = params.scale.float().unsqueeze(-1)
            least = fmt.block.join((step * least).expand_as(fmt.block.split(x)), x.shape)
        x = torch.where(x > 0, torch.maximum(x, least), x)
    return fmt.encode(x, params, generator)


class Held:
    """One part of the state of one parameter: a tensor held in a Format, or float32 for None.

    ``codes`` and ``scale`` are all that is kept; codes of fewer than 8 bits are packed. ``read`` and
    ``write`` go from and to float32 [*shape]; the storage stays where it is.
    """

    def __init__(self, x: Tensor, fmt: Format | None, *, positive: bool = False):
        check(fmt, "a part of an optimizer's state")
        self.format, self.shape, self.positive = fmt, x.shape, positive
        self.codes, self.scale = self._code(x, None)

    def _code(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        if self.format is None:
            return x.detach().to(torch.float32, copy=True), None
        q = quantize(x, self.format, generator=generator, positive=self.positive)
        bits = self.format.grid.bits
        codes = q.codes if bits >= 8 else pack(self.format.grid.to_unsigned(q.codes).reshape(-1), bits)
        return codes, q.scale

    def read(self) -> Tensor:
        """The values, float32 [*shape]; of float32 the kept tensor itself, which may be written to."""
        if self.format is None:
            return self.codes
        grid, codes = self.format.grid, self.codes
        if grid.bits < 8:
            codes = grid.from_unsigned(unpack(codes, grid.bits, math.prod(self.shape))).view(self.shape)
        q = QTensor(codes=codes, scale=self.scale, zero=None, format=self.format, shape=self.shape)
        return q.dequantize()

    def write(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Keep ``x`` [*shape], with steps of its own."""
        if x is self.codes:
            return
        codes, scale = self._code(x, generator)
        self.codes.copy_(codes)
        if scale is not None:
            self.scale.copy_(scale)

    # -- files

    def to_dict(self) -> dict[str, object]:
        """Tensors, numbers and text alone, so that ``torch.load(weights_only=True)`` takes it."""
        kept = {"codes": self.codes, "shape": list(self.shape), "format": plain(self.format)}
        return kept if self.scale is None else kept | {"scale": self.scale}

    def load(self, saved: Mapping[str, object] | Tensor) -> None:
        """Take what ``to_dict`` gave, bit for bit where the Format is the same; otherwise, and from a plain
        tensor, by value. Raises ``InputError`` for another shape.
        """
        if isinstance(saved, Tensor):
            self._same(saved.shape)
            return self.write(saved.to(self.codes.device, torch.float32))
        shape, fmt = torch.Size(saved["shape"]), rebuild(saved["format"])
        self._same(shape)
        if fmt == self.format:
            self.codes.copy_(saved["codes"])
            if self.scale is not None:
                self.scale.copy_(saved["scale"])
            return None
        other = object.__new__(Held)
        other.format, other.shape, other.positive = fmt, shape, self.positive
        other.codes, other.scale = saved["codes"], saved.get("scale")
        return self.write(other.read().to(self.codes.device))

    def _same(self, shape: torch.Size) -> None:
        if shape != self.shape:
            raise InputError(
                f"a saved state of shape {list(shape)} does not belong to a tensor of shape "
                f"{list(self.shape)}; load the states of the same model, cut into shards the same way"
            )


def plain(fmt: Format | None) -> object:
    """A Format as data; `rebuild` is the inverse. Tables of this module go by their names as well."""
    if fmt is None or fmt.grid.name not in _TABLES:
        return to_plain(fmt)
    return to_plain(replace(fmt, grid=by_name("int8"))) | {"grid": fmt.grid.name}


def rebuild(data: object) -> Format | None:
    """The Format that ``plain`` wrote."""
    if not isinstance(data, Mapping) or data.get("grid") not in _TABLES:
        return from_plain(data)
    return replace(from_plain({**data, "grid": "int8"}), grid=_TABLES[data["grid"]])
