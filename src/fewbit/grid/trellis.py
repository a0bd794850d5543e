"""The bitshift trellis of QTIP: a tile of 256 weights is one walk through a graph of 2^L states.

A state s is a window of L bits of the tile's bit stream. Each step shifts in kV new bits and emits V values,

    s_t = (s_{t-1} << kV | u_t) mod 2^L,   u_t in [0, 2^kV),      x_t = value(s_t) in R^V,   256 / V steps

where value() is a fixed function that looks like Gaussian noise (QTIP, section 3.1). So each weight costs k
bits and is decoded by itself, while the search (``fewbit.viterbi``) chooses among 2^(256 k) vectors of
R^256: mean squared error 0.069 on N(0, 1) at 2 bits, where scalars reach 0.1175 and the bound is 0.0625.
The stream is circular (tail-biting): nothing but its 256 k bits is stored. Tseng, Sun, Hou, De Sa 2024,
https://arxiv.org/abs/2406.11235; the codes are its algorithms 1 and 2 and the hybrid one:

    1MAD    sum of the four bytes of 34038481 s + 76625530
    3INST   sum of the two halves of ((89226354 s + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60, a sum of float16
    HYB     two values: row (h >> 6) mod 512 of a table, h = s (s + 1), the first negated by bit 15 of h

Every output is a float16 number over a constant of the code, which gives it unit rms.

Shapes: x [..., out, n / 16, 16]; codes [..., out, n / 16]. Tiles are 16 x 16, read by rows: t = 16 row +
column. The code of a row are its 16 k new bits, the earliest on top, so a packed layer has n k bits a row.

The road not taken: one code for a whole tile. No integer of torch holds 512 bits, and rows would no longer
be rows: a code per tile row keeps codes, packing and slicing by columns as for any vector grid.
"""

import functools
import math
import re
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid
from fewbit.viterbi import search

SIDE = 16  # of a tile
_CACHED = 2**18  # elements decoded at a time on a CPU: their states, 8 bytes each, stay in its cache


class Code(StrEnum):
    """Which function of the state gives the values."""

    MAD = "mad"  # 1MAD: a multiply, an add and the sum of four bytes
    INST = "inst"  # 3INST: a multiply, an add, a mask and a sum of two float16
    HYB = "hyb"  # a hash and a table of 2 KiB, two values a step


# Divisors that give unit rms over the 2^16 states; the stored table of HYB has it already.
_RMS = {Code.MAD: 147.800537109375, Code.INST: 1.2437109, Code.HYB: 1.0}


@dataclass(frozen=True, kw_only=True)
class Trellis(Grid):
    """A trellis of ``rate`` bits a weight (k, 1 to 4) and 2^``state_bits`` states (L, 8 to 16).

    Refuses other numbers, and 2^L states of which a single step replaces more than half of the bits. More
    states give less error for more time to encode; decoding costs the same.
    """

    code: Code = Code.MAD
    rate: int = 2
    state_bits: int = 16
    width = height = SIDE

    def __post_init__(self):
        if self.code not in tuple(Code):
            raise InputError(f"a trellis has the code mad, inst or hyb, got {self.code!r}")
        object.__setattr__(self, "code", Code(self.code))
        for what, value, least, most in (("rate", self.rate, 1, 4), ("state_bits", self.state_bits, 8, 16)):
            if not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"{what} of a trellis is a number from {least} to {most}, got {value!r}")
        if 2 * self.shift > self.state_bits:
            raise InputError(
                f"{self.name} replaces {self.shift} of its {self.state_bits} state bits at each step; use "
                f"{2 * self.shift} or more"
            )

    @property
    def name(self) -> str:
        return f"qtip-{self.code}-{self.rate}b-l{self.state_bits}"

    @property
    def values_per_step(self) -> int:
        """V: 2 for HYB, else 1."""
        return 2 if self.code is Code.HYB else 1

    @property
    def shift(self) -> int:
        """kV: the bits that a step shifts in."""
        return self.rate * self.values_per_step

    @property
    def bits(self) -> int:
        return SIDE * self.rate

    @property
    def min(self) -> float:
        """The smallest value of a state."""
        return self.points().min().item()

    @property
    def max(self) -> float:
        """The largest value of a state."""
        return self.points().max().item()

    @property
    def rms(self) -> float:
        """What the raw values of the code are divided by."""
        return _RMS[self.code]

    def raw(self, device: torch.device | str = "cpu") -> Tensor:
        """Values of every state before the division by ``rms``: [2^L, V] float16."""
        return _raw(self.code, self.state_bits, torch.device(device))

    def points(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of every state: [2^L, V]. They take the place of `codes`, which no trellis lists."""
        return _points(self, torch.device(device), dtype)

    @functools.cached_property
    def least(self) -> float:
        points = self.points()
        return points[points > 0].min().item()

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes [..., out, n / 16] of x [..., out, n / 16, 16]: the best walks; see `Grid.round`.

        A tile is 16 consecutive rows (axis -3). Raises InputError for other shapes, and for a generator.
        """
        if generator is not None:
            raise InputError(
                f"{self.name} cannot round at random: a walk has no two neighbours; round to the nearest"
            )
        if x.ndim < 3 or x.shape[-1] != SIDE or x.shape[-3] % SIDE:
            raise InputError(
                f"{self.name} rounds tiles of 16 x 16, [..., out, n / 16, 16] with out a multiple of 16, got "
                f"shape {list(x.shape)}"
            )
        tiles = x.detach().unflatten(-3, (-1, SIDE)).transpose(-3, -2)  # [..., R, n / 16, 16, 16]
        rows = self.new_bits(self.walks(tiles.reshape(-1, SIDE * SIDE))).view(tiles.shape[:-1])
        return rows.transpose(-2, -1).flatten(-3, -2)

    def walks(self, x: Tensor, window: int | None = None) -> Tensor:
        """States [N, T / V] int32 of the closed walks near x [N, T] at unit scale; see `fewbit.viterbi`.

        Infinite and huge x count as the nearest of +-1e4. Raises InputError when V does not divide T.
        """
        return search(self.scaled(x), self.raw(x.device), self.shift, window=window)

    def scaled(self, x: Tensor) -> Tensor:
        """x [N, T] at unit scale -> [N, T / V, V] float32 in the units of `raw`, contiguous."""
        if x.ndim != 2 or x.shape[1] % self.values_per_step:
            v, got = self.values_per_step, list(x.shape)
            raise InputError(f"{self.name} searches sequences [N, T] with T a multiple of {v}, got {got}")
        raw = x.float().clamp(-1e4, 1e4) * self.rms
        return raw.unflatten(1, (-1, self.values_per_step)).contiguous()

    def new_bits(self, states: Tensor) -> Tensor:
        """States [N, 256 / V] -> codes of the tile rows [N, 16]."""
        new = (states.long() & (1 << self.shift) - 1).unflatten(-1, (SIDE, -1))
        above = torch.arange(new.shape[-1] - 1, -1, -1, device=new.device) * self.shift
        return (new << above).sum(-1).to(self.code_dtype)

    def states(self, codes: Tensor) -> Tensor:
        """Codes [..., out, n / 16] -> states [..., out, n / 16, 16 / V] int64: the windows of the stream.

        Half a row has 8 k new bits; with the 16 before them, that is all its windows, they fit a word of 64.
        """
        bits, wide = self.bits // 2, codes.long()
        before = wide.unflatten(-2, (-1, SIDE)).roll(1, -2).flatten(-3, -2)  # the row above, in a circle
        first = (before & 0xFFFF) << bits | (wide >> bits) & (1 << bits) - 1
        second = (first & 0xFFFF) << bits | wide & (1 << bits) - 1
        below = torch.arange(bits - self.shift, -1, -self.shift, device=codes.device)
        windows = torch.stack([first, second], -1).unsqueeze(-1) >> below
        return windows.bitwise_and_((1 << self.state_bits) - 1).flatten(-2)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [..., out, n / 16, 16] of codes [..., out, n / 16]; see `Grid.value`."""
        if codes.ndim < 2 or codes.shape[-2] % SIDE:
            raise InputError(
                f"{self.name} decodes tiles of 16 rows, [..., out, n / 16] with out a multiple of 16, got "
                f"shape {list(codes.shape)}"
            )
        # torch takes rows of one number four times as long as numbers
        points, take = self.points(codes.device, dtype).squeeze(1), torch.index_select
        rows_of_tiles = _CACHED // (SIDE * SIDE * max(1, codes.shape[-1]))
        at_once = SIDE * max(1, rows_of_tiles) if codes.device.type == "cpu" else max(SIDE, codes.shape[-2])
        parts = codes.split(at_once, -2)
        return torch.cat([take(points, 0, self.states(p).flatten()).view(*p.shape, SIDE) for p in parts], -3)

    def _list(self) -> range:
        raise InputError(f"{self.name} gives a code no value of its own; points() lists those of its states")

    def describe(self) -> Description:
        """Of the single values that states emit."""
        points = self.points()
        decibels = 20 * math.log10(points.abs().max().item() / self.least)
        return self._describe(distinct=len(points.unique()), decibels=decibels)


def parse_trellis(name: str) -> Trellis | None:
    """The grid of a name such as "qtip-mad-2b-l16"; None when the name has another form.

    Raises InputError when it has that form and no such trellis exists.
    """
    found = re.fullmatch(r"qtip-(mad|inst|hyb)-(\d{1,3})b-l(\d{1,3})", name)
    return found and Trellis(code=Code(found[1]), rate=int(found[2]), state_bits=int(found[3]))


@functools.lru_cache(maxsize=32)
def _raw(code: Code, state_bits: int, device: torch.device) -> Tensor:
    """[2^L, V] float16, by integer arithmetic mod 2^32 on the CPU."""
    with torch.inference_mode(False):
        s = torch.arange(1 << state_bits, device="cpu")
        if code is Code.MAD:
            x = 34038481 * s + 76625530
            raw = sum((x >> 8 * i) & 255 for i in range(4)) - 510
        elif code is Code.INST:
            y = (89226354 * s + 64248484) & 0x8FFF8FFF ^ 0x3B603B60
            high, low = ((half & 0xFFFF).to(torch.uint16).view(torch.float16) for half in (y >> 16, y))
            raw = high + low
        else:
            h = s * (s + 1)
            with files("fewbit.grid").joinpath("data/hyb.npy").open("rb") as file:
                raw = torch.from_numpy(np.load(file, allow_pickle=False))[(h >> 6) & 511]  # a copy
            raw[:, 0] *= 1 - 2 * (h >> 15 & 1)
        return raw.reshape(len(s), -1).to(torch.float16).to(device)


@functools.lru_cache(maxsize=32)
def _points(grid: Trellis, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return (grid.raw().double() / grid.rms).float().to(device=device, dtype=dtype)
