"""Layers for an engine: a native checkpoint's tensors as the file holds them, unpacked at every call.

``fewbit.load`` unpacks codes once, a byte or more to each, which is quick and eight times the file at one
bit. An engine that serves keeps them packed: its memory is that of the file, and what it unpacks lives for
one layer. What unpacking makes no larger (codes of 8 bits) is unpacked once.

What runs is the ``QLinear`` that ``fewbit.load`` makes, with the same kernels; its codes are put into it for
the length of a call. Everything a file may have wrong is found when the layer is made, on the CPU, so that a
call asks the device nothing and waits for nothing: a CUDA graph can hold it.

An engine fuses layers that read one tensor (q, k, v; gate, up) and loads them piece by piece. Their formats,
bases and orders may differ, so each piece stays a layer of its own and their outputs are joined:

    y = [x W_q^T, x W_k^T, x W_v^T]

Road not taken: one QTensor of all pieces, which a random basis per layer or different bits rule out.

Shapes: x [..., in], y [..., out of all pieces].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format.affine import Zero
from fewbit.format.bits import unpack
from fewbit.format.qtensor import QTensor
from fewbit.grid.grid import Grid
from fewbit.io import inputs, native
from fewbit.io.native import Entry
from fewbit.io.shell import linear_of


def stored_layout(entry: Entry | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple]:
    """Name (without the module) -> (shape, dtype) of what the file holds; None: a plain weight."""
    if entry is None:
        return {"weight": (shape, dtype)}
    weight = native.layout(entry.format, entry.shape, apart=entry.apart, ordered=entry.ordered)
    return weight | inputs.layout(entry.activation, entry.shape[1])


def expect(layer: nn.Module, name: str, dtype: torch.dtype, loader: Callable[..., None]) -> None:
    """An empty parameter of the layer, once; ``loader`` is what an engine calls with the tensor of a file."""
    if not hasattr(layer, name):
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader
        layer.register_parameter(name, parameter)


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] by a layer of a native checkpoint, without its bias.

    entry: what the configuration says of it; stored: its tensors under their names without the module;
    device: where it runs, by default where they are. Raises InputError for tensors that do not fit.
    """

    def __init__(self, entry: Entry, stored: Mapping[str, Tensor], device: torch.device | None = None):
        super().__init__()
        self.out_features = entry.shape[0]
        device = next(iter(stored.values())).device if device is None else device
        held = {f".{name}": tensor.cpu() for name, tensor in stored.items()}
        weight = native.from_dict("", held, *entry.stored).to(device)
        params = inputs.from_dict("", held, entry.activation, entry.shape[1])
        self.layer = linear_of(weight, None, entry, None if params is None else params.to(device))
        fields = _fields(weight if isinstance(weight, QTensor) else weight.rest)
        larger = {n for n in fields if self.layer._buffers[n].nbytes > stored[n].nbytes}
        self.fields = {name: field for name, field in fields.items() if name in larger}
        for name in self.fields:
            self.layer._buffers[name] = None
            self.register_buffer(name, stored[name].to(device))

    def forward(self, x: Tensor) -> Tensor:
        """y in x's dtype."""
        codes = {name: _unpacked(self._buffers[name], *field) for name, field in self.fields.items()}
        return torch.func.functional_call(self.layer, codes, (x,))


def _fields(q: QTensor, prefix: str = "") -> dict[str, tuple[Grid, torch.Size]]:
    """Grid and shape of all that a file packs of ``q``, by the name that ``QLinear`` gives its buffer."""
    found = {f"{prefix}codes": (q.format.grid, q.codes.shape)}
    for name in ("scale", "table", "zero"):
        part = getattr(q, name)
        if isinstance(part, QTensor):
            found |= _fields(part, f"{prefix}{name}_")
    if q.format.zero is Zero.INTEGER:
        found[f"{prefix}zero"] = (q.format.grid, q.zero.shape)
    return found


def _unpacked(packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """Codes of ``shape`` from the bytes of a file, which were looked at when it was read."""
    columns = shape[-1] if shape else 1
    return grid.from_unsigned(unpack(packed, grid.bits, columns)).reshape(shape)


class PlainLinear(nn.Module):
    """x W^T with a weight [out, in] that was not quantized."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.out_features = weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y in x's dtype."""
        return F.linear(x, self.weight)


def layer_of(
    name: str,
    entry: Entry | None,
    layout: Mapping[str, tuple],
    arrived: Mapping[str, Tensor],
    device: torch.device,
) -> nn.Module:
    """The layer ``name`` on ``device`` from what a loader gave; entry and layout as for ``stored_layout``.

    Raises InputError for tensors that are missing.
    """
    if missing := sorted(set(layout) - set(arrived)):
        raise InputError(f"the checkpoint has no tensor {', '.join(missing)} of {name}; it is incomplete")
    if entry is None:
        return PlainLinear(arrived["weight"].to(device, layout["weight"][1]))
    return PackedLinear(entry, arrived, device)


class Joined(nn.Module):
    """Layers that read one tensor, their outputs beside each other."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out_features = sum(layer.out_features for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., sum of out]."""
        return self.layers[0](x) if len(self.layers) == 1 else torch.cat([f(x) for f in self.layers], -1)
