"""Block shapes: which elements of a tensor share one scale (and one zero).

A block is a way to look at a tensor ``x`` as ``[*scale_shape, elements]``: every leading index is one sharing
set. Fitting, encoding and decoding are then the same three lines for every granularity:

    split(x) / scale[..., None]        join(...)

| block        | field's name              | scale shape of x [out, in]   |
| Tensor       | per-tensor                | []                           |
| Channel      | per-output-channel        | [out, 1]                     |
| Token        | per-token (rows of X)     | [tokens, 1]                  |
| Group(g)     | group along the input     | [out, in / g]                |
| Columns(n)   | groups of input columns   | [in / n]                     |
| Block2d(r,c) | 2-D block (FP8 128 x 128) | [out / r, in / c]            |
| Tiles(n)     | at least n, <= 256 columns | [out / r, in / c], by shape  |
| Flat(n)      | n consecutive elements    | [ceil(out * in / n)]         |

Road not taken: padding a side that a block does not divide. Libraries pad, skip or let groups straddle rows
in silence; here a block that does not tile is refused. ``Flat`` alone has a short last block, because it
ignores rows by definition (bitsandbytes' blocks, and the second level of double quantization).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError


@dataclass(frozen=True)
class Block(ABC):
    """How a tensor is cut into sharing sets. Immutable and comparable by value."""

    def check(self, shape: torch.Size | tuple[int, ...], what: str = "tensor") -> None:
        """Raise ``InputError`` when this block does not tile ``shape``; ``what`` names the tensor in the
        text.
        """

    @abstractmethod
    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape``."""

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """``x`` as ``[*scale_shape, elements]``: a view where the memory layout allows it."""

    @abstractmethod
    def join(self, blocks: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Inverse of ``split``."""

    @abstractmethod
    def take(self, p: Tensor, shape: torch.Size | tuple[int, ...], columns: Tensor) -> Tensor:
        """Parameters of some columns of a matrix [out, in]: ``p`` [*scale_shape] -> [out or 1, len(columns)].

        The solvers walk a matrix by columns (in any order) and ask for the scale that each column sees.
        """


@dataclass(frozen=True)
class PerTensor(Block):
    """One sharing set: the whole tensor."""

    def scale_shape(self, shape):
        return ()

    def split(self, x):
        return x.reshape(-1)

    def join(self, blocks, shape):
        return blocks.reshape(shape)

    def take(self, p, shape, columns):
        return p.reshape(1, 1).expand(1, len(columns))


@dataclass(frozen=True)
class Channel(Block):
    """One set per row of a weight [out, in], that is per output channel; scale [out, 1]."""

    def scale_shape(self, shape):
        return (*shape[:-1], 1)

    def split(self, x):
        return x.unsqueeze(-2)

    def join(self, blocks, shape):
        return blocks.squeeze(-2)

    def take(self, p, shape, columns):
        return p.expand(-1, len(columns))


@dataclass(frozen=True)
class Token(Channel):
    """One set per row of an activation [..., tokens, in]: the same cut as ``Channel``, computed at run
    time.
    """


@dataclass(frozen=True)
class Group(Block):
    """``size`` neighbours along the last axis share a scale; scale [..., in / size]."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"group size {self.size} is not positive; use 16 to 256, or a channel block")

    def check(self, shape, what="tensor"):
        n = shape[-1]
        if n % self.size:
            # powers of two first: kernels take nothing else
            fits = [g for g in (128, 64, 32, 16, 96, 48, 8) if g < self.size and n % g == 0]
            size = (
                f"--group-size {fits[0]} (-g{fits[0]} after the name of a format)"
                if fits
                else "another format"
            )
            raise InputError(
                f"group size {self.size} does not divide the {n} input columns of {what}; use {size} or "
                "exclude this layer with a rule"
            )

    def scale_shape(self, shape):
        return (*shape[:-1], shape[-1] // self.size)

    def split(self, x):
        return x.unflatten(-1, (-1, self.size))

    def join(self, blocks, shape):
        return blocks.flatten(-2)

    def take(self, p, shape, columns):
        return p[:, columns // self.size]


@dataclass(frozen=True)
class Columns(Block):
    """``size`` neighbouring columns of all rows share a scale; scale [in / size].

    Of activations [tokens, in] these are groups of embedding dimensions.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"{self.size} columns are no group; use 1 (each its own) or more")

    def check(self, shape, what="tensor"):
        if len(shape) != 2 or shape[-1] % self.size:
            raise InputError(
                f"groups of {self.size} columns do not tile {what} of shape {list(shape)}; choose a size "
                "that divides its columns"
            )

    def scale_shape(self, shape):
        return (shape[-1] // self.size,)

    def split(self, x):
        return x.unflatten(-1, (-1, self.size)).transpose(0, 1).flatten(1)

    def join(self, blocks, shape):
        return blocks.unflatten(1, (-1, self.size)).transpose(0, 1).reshape(shape)

    def take(self, p, shape, columns):
        return p[columns // self.size][None]


@dataclass(frozen=True)
class Block2d(Block):
    """Tiles of ``rows`` x ``cols`` share a scale; scale [out / rows, in / cols]."""

    rows: int
    cols: int

    def __post_init__(self):
        if self.rows < 1 or self.cols < 1:
            raise InputError(f"block {self.rows} x {self.cols} has no elements; both sides must be positive")

    def check(self, shape, what="tensor"):
        if len(shape) != 2 or shape[0] % self.rows or shape[1] % self.cols:
            raise InputError(
                f"blocks of {self.rows} x {self.cols} do not tile {what} of shape {list(shape)}; choose "
                "sides that "
                f"divide it, such as {math.gcd(self.rows, shape[0])} x {math.gcd(self.cols, shape[-1])}"
            )

    def scale_shape(self, shape):
        return (shape[0] // self.rows, shape[1] // self.cols)

    def split(self, x):
        tiles = x.unflatten(0, (-1, self.rows)).unflatten(-1, (-1, self.cols))  # [R, rows, C, cols]
        return tiles.transpose(1, 2).flatten(-2)

    def join(self, blocks, shape):
        return blocks.unflatten(-1, (self.rows, self.cols)).transpose(1, 2).reshape(shape)

    def take(self, p, shape, columns):
        return p.repeat_interleave(self.rows, 0)[:, columns // self.cols]


@dataclass(frozen=True)
class Tiles(Block):
    """Rectangles of at least ``size`` elements, of the same shape as far as the sides allow.

    The columns are the largest divisor of the matrix's that is at most ``most`` (of those that 8 divides,
    where there are any; 0: all columns), the rows the least divisor that makes up ``size``, or all rows.
    """

    size: int
    most: int = 256

    def __post_init__(self):
        if self.size < 1 or self.most < 0:
            raise InputError(f"tiles of {self.size} elements, {self.most} columns wide, are impossible")

    def of(self, shape: torch.Size | tuple[int, ...]) -> Block2d:
        """The rectangle for a matrix of ``shape``."""
        rows, n = shape[-2:]
        cols = [c for c in range(1, min(n, self.most or n) + 1) if n % c == 0]
        cols = max(cols, key=lambda c: (c % 8 == 0, c))
        fits = (r for r in range(1, rows + 1) if rows % r == 0 and r * cols >= self.size)
        return Block2d(next(fits, rows), cols)

    def check(self, shape, what="tensor"):
        if len(shape) != 2:
            raise InputError(f"tiles cut matrices, and {what} has shape {list(shape)}")

    def scale_shape(self, shape):
        return self.of(shape).scale_shape(shape)

    def split(self, x):
        return self.of(x.shape).split(x)

    def join(self, blocks, shape):
        return self.of(shape).join(blocks, shape)

    def take(self, p, shape, columns):
        return self.of(shape).take(p, shape, columns)


@dataclass(frozen=True)
class Flat(Block):
    """``size`` consecutive elements in memory order, rows ignored; the last block may be short.

    ``split`` fills a short last block by repeating the last element, which leaves minima and maxima as they
    are.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"block size {self.size} is not a positive number")

    def scale_shape(self, shape):
        return (-(-math.prod(shape) // self.size),)

    def split(self, x):
        flat = x.reshape(-1)
        missing = -flat.numel() % self.size
        if missing:
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        return flat.unflatten(0, (-1, self.size))

    def join(self, blocks, shape):
        return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)

    def take(self, p, shape, columns):
        rows = torch.arange(shape[0], device=p.device)[:, None]
        return p[(rows * shape[1] + columns) // self.size]


BLOCKS = (PerTensor, Channel, Token, Group, Columns, Block2d, Tiles, Flat)
