"""The stream of keys, or of values, of one layer as it is stored: packed codes, steps, and tokens in float.

    [b, h, t, d]  =  head (first tokens, float) | codes x steps + offsets | tail (newest tokens, float)

Appending is a pure function of the state, and groups are coded once and never again: the state after t tokens
is the same, bit for bit, however they were cut into calls. How many are coded is `Part.coded`; all arithmetic
is the Format's. See kvcache.py.

Shapes: b sequences, h key-value heads, t tokens, d channels of a head, n coded tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Params, QTensor, value_of
from fewbit.format.bits import pack, unpack
from fewbit.nn.kvcache import Along, Part, is_static


def view(x: Tensor, along: Along) -> Tensor:
    """x [b, h, t, d] as its Format sees it."""
    if along is Along.CHANNELS:
        return x
    return x.transpose(-1, -2) if along is Along.TOKENS else x.transpose(0, 1).flatten(1)


def unview(y: Tensor, along: Along, batch: int, head_dim: int) -> Tensor:
    """Inverse of `view`."""
    if along is Along.HEADS:
        return y.unflatten(1, (batch, -1, head_dim)).transpose(0, 1)
    return view(y, along)


@dataclass(frozen=True, eq=False, kw_only=True)
class Store:
    """The keys, or the values, of one layer. Immutable: `append` returns the next state.

    head, tail: [b, h, *, d] float, the first and the newest tokens; codes: packed uint8, [b, h, n, bytes] or
    along tokens [b, h, d, bytes]; scale: steps, or their codes where the steps have a grid; zero: offsets.
    These three are None while nothing is coded. steps: fixed steps, not counted in `nbytes`.
    """

    part: Part
    head: Tensor
    tail: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    steps: Tensor | None = None
    coded: int = 0

    @property
    def tokens(self) -> int:
        """How many are stored."""
        return self.head.shape[-2] + self.coded + self.tail.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        names = ("head", "tail", "codes", "scale", "zero")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    def append(self, x: Tensor) -> Store:
        """The state after tokens ``x`` [b, h, t, d] more."""
        own = self.part
        room = max(0, own.sink - self.head.shape[-2])
        head = torch.cat([self.head, x[..., :room, :]], -2)
        tail = torch.cat([self.tail, x[..., room:, :]], -2)
        n = own.coded(self.coded + tail.shape[-2]) - self.coded
        if n <= 0:  # below 0: the newest were cropped, and what is coded stays coded
            return replace(self, head=head, tail=tail)
        # A slice would keep all of it in memory.
        return replace(self, head=head, tail=tail[..., n:, :].clone())._code(tail[..., :n, :])

    def _code(self, x: Tensor) -> Store:
        """Tokens ``x`` [b, h, n, d] behind those that are coded already."""
        fmt, along = self.part.format, self.part.along
        seen = view(x, along)
        q = fmt.encode(seen, fmt.fit(seen) if self.steps is None else Params(scale=self.steps, zero=None))
        fields = fmt.grid.to_unsigned(q.codes)
        if along is Along.HEADS:
            fields = unview(fields, along, x.shape[0], x.shape[-1])
        scale = q.scale.codes if isinstance(q.scale, QTensor) else q.scale
        axis = -1 if along is Along.TOKENS else -2
        return replace(
            self,
            codes=_join(self.codes, pack(fields, fmt.grid.bits), axis),
            scale=None if is_static(fmt) else _join(self.scale, scale, axis),
            zero=_join(self.zero, q.zero, axis),
            coded=self.coded + x.shape[-2],
        )

    def read(self) -> Tensor:
        """All tokens [b, h, t, d] in the dtype they came in."""
        if not self.coded:
            return torch.cat([self.head, self.tail], -2)
        fmt, along = self.part.format, self.part.along
        batch, _, _, head_dim = self.tail.shape
        length = self.coded if along is Along.TOKENS else head_dim
        codes = fmt.grid.from_unsigned(unpack(self.codes, fmt.grid.bits, length))
        if along is Along.HEADS:
            codes = view(codes, along)
        scale = self.scale if self.steps is None else self.steps
        if scale is not None and not scale.is_floating_point():
            scale = QTensor(codes=scale, scale=None, zero=None, format=fmt.scale, shape=scale.shape)
        q = QTensor(codes=codes, scale=scale, zero=self.zero, format=fmt, shape=codes.shape)
        middle = unview(q.dequantize(self.tail.dtype), along, batch, head_dim)
        return torch.cat([self.head, middle, self.tail], -2)

    def crop(self, count: int) -> Store:
        """Without the ``count`` newest tokens. Raises ``InputError`` where they are not in float any more."""
        left = self.tail.shape[-2] - count
        if left < 0:
            raise InputError(
                f"{count} tokens cannot be taken back from a quantized cache that holds the newest "
                f"{self.tail.shape[-2]} in float; use a KV format with a longer residual"
            )
        return replace(self, tail=self.tail[..., :left, :].clone())

    def map(self, change: Callable[[Tensor], Tensor]) -> Store:
        """``change`` of every tensor: a selection of sequences (axis 0), or a move to a device."""
        return replace(self, **{name: change(t) for name, t in self._tensors().items()})


def empty(part: Part, like: Tensor, steps: Tensor | None = None) -> Store:
    """A store without tokens, for tensors such as ``like`` [b, h, t, d].

    Raises ``InputError`` where the format does not suit a head of d channels, or steps are missing.
    """
    part.check(like.shape[-1])
    if part.format is not None and is_static(part.format) and steps is None:
        raise InputError(f"{part.format} needs steps that are found beforehand; call kvsteps.calibrate")
    nothing = like[..., :0, :].clone()
    return Store(
        part=part, head=nothing, tail=nothing, steps=None if steps is None else steps.to(like.device)
    )


def fixed_steps(part: Part, x: Tensor) -> Tensor | None:
    """Steps that suit ``x`` [b, h, t, d] by the format's own range rule, where they are fixed; else None."""
    if part.format is None or not is_static(part.format):
        return None
    return value_of(part.format.fit(view(x, part.along)).scale)


def _join(before: Tensor | None, new: Tensor | None, axis: int) -> Tensor | None:
    return new if before is None or new is None else torch.cat([before, new], axis)
