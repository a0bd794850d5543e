"""Keys and values of attention in few bits: what is stored, and how a stream of tokens becomes it.

    K, V [b, h, t, d] after RoPE  ->  first ``sink`` tokens | packed codes, steps, offsets | newest tokens
                                      in float                                               in float

Keys have a few channels that are large at every token, values do not. So KIVI gives each channel of the keys
a step for ``G`` neighbouring *tokens*, and each token of the values a step for ``G`` neighbouring *channels*
(section 3.2), with x ~ q s + m, m = min, s = (max - min) / (2^B - 1) (eq. 1). Groups of tokens must be whole
before they can be coded: the newest tokens wait in float until there are ``residual`` of them, then all are
coded at once. Where a token is coded alone, exactly the newest ``residual`` stay in float. Both rules depend
on the number of tokens alone, so the state does not depend on how a text was cut into calls.

The grouping is no code of its own: a `Format` groups along the last axis, and `Along` says which view of the
tensor it sees. So int4 per token (QServe, QuaRot), FP8 casts (vLLM), FP8 with calibrated steps and MX blocks
are the same few lines.

Sources: KIVI, Liu et al. 2024, https://arxiv.org/abs/2402.02750; QServe, Lin et al. 2024,
https://arxiv.org/abs/2405.04532; QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456.

Road not taken: coding the whole cache anew whenever the float part is full (transformers' QuantizedCache).
Old tokens are rounded again and again, and each time costs a pass over all of them.

Shapes: b sequences, h key-value heads, t tokens, d channels of a head, n codes.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

import torch

from fewbit.errors import InputError
from fewbit.format import (
    FP16,
    FP32,
    Block,
    Channel,
    Format,
    Group,
    MinMax,
    PerTensor,
    Token,
    Zero,
    format_by_name,
)
from fewbit.format.bits import row_bytes
from fewbit.grid import Int, by_name


class Along(StrEnum):
    """What runs along the last axis of the view that a Format sees, hence what shares a step."""

    TOKENS = "tokens"  # [b, h, d, t]: neighbours in time, one channel: KIVI's keys
    CHANNELS = "channels"  # [b, h, t, d]: the channels of one token and head
    HEADS = "heads"  # [h, b t d]: everything of one head: steps fixed beforehand


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How keys and values are stored; ``None`` for ``key`` or ``value`` keeps that one in float.

    residual: newest tokens in float, at most (`Along.TOKENS`) or exactly. sink: first tokens that stay in
    float. skip: indices of layers left alone. Raises ``InputError`` for what cannot be appended to.
    """

    key: Format | None
    value: Format | None
    key_along: Along = Along.CHANNELS
    value_along: Along = Along.CHANNELS
    residual: int = 0
    sink: int = 0
    skip: tuple[int, ...] = ()

    def __post_init__(self):
        for name, count in (("residual", self.residual), ("sink", self.sink)):
            if type(count) is not int or count < 0:
                raise InputError(f"{name} is {count!r}: expected a number of tokens, 0 or more")
        if any(type(layer) is not int or layer < 0 for layer in self.skip):
            raise InputError(f"layers to skip are {list(self.skip)}: expected their indices, from 0 on")
        _check("keys", self.key, self.key_along, self.residual)
        _check("values", self.value, self.value_along, self.residual)

    @property
    def static(self) -> bool:
        """True when steps must be found beforehand, by `fewbit.nn.kvsteps.calibrate`."""
        return any(f is not None and is_static(f) for f in (self.key, self.value))

    def parts(self) -> tuple[Part, Part]:
        """How keys and how values are stored."""
        tokens = {"residual": self.residual, "sink": self.sink}
        key = Part(format=self.key, along=self.key_along, **tokens)
        return key, Part(format=self.value, along=self.value_along, **tokens)

    def nbytes(self, batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one layer's keys and values after so many tokens that came in ``dtype``, by arithmetic.

        Steps that are fixed beforehand belong to the model and are not counted.
        """
        return sum(part.nbytes(batch, heads, tokens, head_dim, dtype.itemsize) for part in self.parts())


def is_static(fmt: Format) -> bool:
    """True for steps that no token can have for itself: one a tensor or one a head."""
    return fmt.scale is not None and not isinstance(fmt.block, Group | Token)


def _check(what: str, fmt: Format | None, along: Along, residual: int) -> None:
    """Raise ``InputError`` for a format that a growing cache cannot be stored in."""
    if fmt is None:
        return
    if fmt.scale is not None and fmt.scale.scale is not None:
        raise InputError(
            f"{what} in {fmt} cannot be stored: the steps of its steps span tokens that are still to come; "
            "use steps in float or e8m0"
        )
    if fmt.grid.width > 1 or fmt.grid.bits > 8:
        raise InputError(f"{what} in {fmt.grid.name} cannot be stored: use a scalar grid of up to 8 bits")
    blocks = {Along.TOKENS: Group, Along.CHANNELS: Group | Token | PerTensor, Along.HEADS: Channel}[along]
    fits = isinstance(fmt.block, blocks) and (along is not Along.HEADS or not isinstance(fmt.block, Token))
    if fmt.scale is not None and not fits:
        raise InputError(
            f"{what} along {along.value} cannot have blocks {fmt.block}; use Group(g) along tokens, "
            "Group(g), Token() or PerTensor() along channels, Channel() along heads"
        )
    if is_static(fmt) and not fmt.symmetric:
        raise InputError(f"{what} with fixed steps have no offset; leave zero out, or use Token() blocks")
    if along is Along.TOKENS:
        size = fmt.block.size if isinstance(fmt.block, Group) else 0
        if not size or size * fmt.grid.bits % 8:
            raise InputError(
                f"{what} along tokens need groups that fill whole bytes, got {fmt.block} of {fmt.grid.name}"
            )
        if residual < size or residual % size:
            raise InputError(
                f"a residual of {residual} tokens does not hold whole groups of {size} tokens; give a "
                f"multiple of {size}, such as {max(1, round(residual / size)) * size}"
            )


@dataclass(frozen=True, kw_only=True)
class Part:
    """How the keys, or the values, of a layer are stored. See `KVFormat`."""

    format: Format | None
    along: Along
    residual: int
    sink: int

    def check(self, head_dim: int) -> None:
        """Raise ``InputError`` where groups along channels do not tile a head."""
        block = None if self.format is None else self.format.block
        if self.along is Along.CHANNELS and isinstance(block, Group) and head_dim % block.size:
            raise InputError(
                f"groups of {block.size} channels do not tile a head of {head_dim}; use groups of "
                f"{math.gcd(block.size, head_dim)} (-g{math.gcd(block.size, head_dim)} after the name)"
            )

    def coded(self, tokens: int) -> int:
        """How many of ``tokens`` tokens behind the sink are stored as codes."""
        if self.format is None:
            return 0
        if self.along is Along.TOKENS:
            return tokens // self.residual * self.residual
        return max(0, tokens - self.residual)

    def nbytes(self, batch: int, heads: int, tokens: int, head_dim: int, float_bytes: int) -> int:
        """Bytes of [batch, heads, tokens, head_dim]: codes, steps, offsets and the tokens in float."""
        n = self.coded(max(0, tokens - self.sink))
        total = (tokens - n) * heads * batch * head_dim * float_bytes
        if not n:
            return total
        shape = (n, head_dim) if self.along is not Along.TOKENS else (head_dim, n)
        total += batch * heads * shape[0] * row_bytes(shape[1], self.format.grid.bits)
        if self.format.scale is not None and not is_static(self.format):
            blocks = self.format.block.scale_shape((batch, heads, *shape))
            bits = self.format.scale.bits_per_weight(blocks) + self.format.zero_bits
            total += round(math.prod(blocks) * bits) // 8
        return total


# -- by name


def kivi(bits: int, *, group: int = 32, residual: int = 128, sink: int = 0) -> KVFormat:
    """KIVI: keys in groups along tokens, values in groups along channels; float16 steps and offsets."""
    fmt = _affine(bits, Group(group))
    return KVFormat(key=fmt, value=fmt, key_along=Along.TOKENS, residual=residual, sink=sink)


def per_token(bits: int, *, residual: int = 0, sink: int = 0) -> KVFormat:
    """QServe and QuaRot: one float16 step and offset for each token and head."""
    fmt = _affine(bits, Token())
    return KVFormat(key=fmt, value=fmt, residual=residual, sink=sink)


def _affine(bits: int, block: Block) -> Format:
    grid = Int(bits, signed=False)
    return Format(grid=grid, block=block, range=MinMax(), zero=Zero.OFFSET, scale=FP16)


def _alike(fmt: Format, along: Along = Along.CHANNELS) -> KVFormat:
    return KVFormat(key=fmt, value=fmt, key_along=along, value_along=along)


def _all() -> dict[str, KVFormat]:
    e4m3, e5m2, int8 = by_name("e4m3"), by_name("e5m2"), Int(8)
    return {
        **{f"kivi{bits}": kivi(bits) for bits in (2, 3, 4, 8)},
        **{f"int{bits}-token": per_token(bits) for bits in (2, 3, 4, 8)},
        "fp8": _alike(Format(grid=e4m3)),
        "fp8-e5m2": _alike(Format(grid=e5m2)),
        "fp8-tensor": _alike(Format(grid=e4m3, scale=FP32)),
        "fp8-head": _alike(Format(grid=e4m3, block=Channel(), scale=FP32), Along.HEADS),
        "int8-tensor": _alike(Format(grid=int8, scale=FP32)),
        "int8-head": _alike(Format(grid=int8, block=Channel(), scale=FP32), Along.HEADS),
        "mxfp8": _alike(format_by_name("mxfp8-e4m3")),
        "mxfp4": _alike(format_by_name("mxfp4")),
    }


KV_FORMATS = MappingProxyType(_all())
_SUFFIX = re.compile(r"-([grs])(\d+)$")


def kv_format(name: str) -> KVFormat:
    """The KV format of that name; "-g64", "-r32" and "-s4" after it set group, residual and sink tokens.

    Raises ``InputError`` that lists near names, or says what the setting cannot be.
    """
    base, given = name.lower(), {}
    while (found := _SUFFIX.search(base)) is not None:
        given.setdefault(found[1], int(found[2]))
        base = base[: found.start()]
    kv = KV_FORMATS.get(base)
    if kv is None:
        near = difflib.get_close_matches(base, KV_FORMATS, n=4, cutoff=0.5)
        raise InputError(
            f"there is no KV format named {name!r}; known are {', '.join(near or KV_FORMATS)}, with -g64, "
            "-r32 and -s4 after them for group, residual and sink tokens"
        )
    fields = {"residual": given.get("r", kv.residual), "sink": given.get("s", kv.sink)}
    if "g" in given:
        if not isinstance(kv.key.block, Group):
            raise InputError(f"{base} has no groups, so -g{given['g']} after it means nothing; leave it out")
        block = Group(given["g"])
        fields |= {"key": replace(kv.key, block=block), "value": replace(kv.value, block=block)}
    return replace(kv, **fields)
