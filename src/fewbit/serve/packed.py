"""Layers for an engine: a native checkpoint's tensors as the file holds them, unpacked at every call.

``fewbit.load`` unpacks codes once, a byte or more to each, which is quick and eight times the file at one
bit. An engine that serves keeps them packed: its memory is that of the file, and what it unpacks lives for
one layer. Where unpacking makes nothing larger (8 bits) it happens once.

An engine fuses layers that read one tensor (q, k, v; gate, up) and loads them piece by piece. Their formats,
bases and orders may differ, so each piece stays a layer of its own and their outputs are joined:

    y = [x W_q^T, x W_k^T, x W_v^T]

Road not taken: one QTensor of all pieces, which a random basis per layer or different bits rule out.

Shapes: x [..., in], y [..., out of all pieces].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.io import inputs, native
from fewbit.io.native import Entry
from fewbit.io.shell import linear_of


def stored_layout(entry: Entry | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple]:
    """Name (without the module) -> (shape, dtype) of what the file holds; None: a plain weight."""
    if entry is None:
        return {"weight": (shape, dtype)}
    weight = native.layout(entry.format, entry.shape, apart=entry.apart, ordered=entry.ordered)
    return weight | inputs.layout(entry.activation, entry.shape[1])


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] by a layer of a native checkpoint, without its bias.

    entry: what the configuration says of it; stored: its tensors under their names without the module.
    Raises InputError for a tensor that is missing or does not fit.
    """

    def __init__(self, entry: Entry, stored: Mapping[str, Tensor]):
        super().__init__()
        self.entry, self.out_features = entry, entry.shape[0]
        for name in stored_layout(entry, entry.shape, torch.float32):
            if name not in stored:
                raise InputError(
                    f"the checkpoint has no tensor {name} of a layer in {entry.format}; it is incomplete"
                )
            self.register_buffer(name, stored[name])
        layer = self._open()
        larger = sum(b.nbytes for b in layer.buffers()) > sum(b.nbytes for b in self.buffers())
        self.opened = None if larger else layer
        if self.opened is not None:
            for name in list(self._buffers):
                del self._buffers[name]

    def _open(self) -> nn.Module:
        stored = {f".{name}": tensor for name, tensor in self._buffers.items()}
        params = inputs.from_dict("", stored, self.entry.activation, self.entry.shape[1])
        return linear_of(native.from_dict("", stored, *self.entry.stored), None, self.entry, params)

    def forward(self, x: Tensor) -> Tensor:
        """y in x's dtype."""
        return (self._open() if self.opened is None else self.opened)(x)


class PlainLinear(nn.Module):
    """x W^T with a weight [out, in] that was not quantized."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.out_features = weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y in x's dtype."""
        return F.linear(x, self.weight)


class Joined(nn.Module):
    """Layers that read one tensor, their outputs beside each other."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out_features = sum(layer.out_features for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., sum of out]."""
        return torch.cat([layer(x) for layer in self.layers], -1)
