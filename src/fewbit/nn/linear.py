"""QLinear: a linear layer whose weight is a QTensor. A thin shell: buffers, and one call to the kernel.

    y = x W^T + b        W [out, in] decoded from codes, scale and zero; computed in x's dtype

With a quantized input, x is what its codes mean (``fewbit.format.Activation``); with an online map, x T comes
first (a Hadamard transform that could not be folded into the layer before, say); with a map of the output, y
T^-1 comes before the bias. Where columns O are kept apart (``fewbit.format.split``), x is 0 there and
x_O W_O^T is added in float.

The buffers hold the canonical, unpacked QTensor: ``codes``, ``scale``, ``zero``; where the scale is itself a
QTensor, ``scale_codes``, ``scale_scale`` and so on to any depth; ``table`` likewise. Files hold the
same names packed (``fewbit.io.native``).

Road not taken: a subclass of ``torch.nn.Linear`` with a weight that is a tensor subclass. Code that asks for
``isinstance(m, nn.Linear)`` goes on to read or overwrite ``weight``, which is wrong here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.format.activation import Activation
from fewbit.format.format import Format, Params
from fewbit.format.qtensor import QTensor
from fewbit.format.split import SplitTensor
from fewbit.kernel.linear import linear
from fewbit.nn.stored import Stored


class Online(Protocol):
    """A map that runs at every call: ``fewbit.transform.Map``."""

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """x T."""

    def invert(self, x: Tensor, axis: int = -1) -> Tensor:
        """x T^-1."""


class QLinear(Stored):
    """``in_features`` -> ``out_features`` with a quantized weight [out, in] and an optional bias [out].

    Gradients pass to the input and to the bias; the weight stays.

    activation: how the input is quantized, or None; params: its steps when they are static; online: the map
    of the input that comes before, or None; output: the map of the output whose inverse comes after, or None.
    """

    def __init__(
        self,
        qweight: QTensor | SplitTensor,
        bias: Tensor | None = None,
        *,
        activation: Activation | None = None,
        params: Params | None = None,
        online: Online | None = None,
        output: Online | None = None,
    ):
        """The tensors are taken as they are, not copied; a bias that is a Parameter stays that Parameter."""
        super().__init__()
        self.activation, self.online, self.output = activation, online, output
        self.register_buffer("input_scale", None if params is None else params.scale)
        self.register_buffer("input_zero", None if params is None else params.zero)
        split = isinstance(qweight, SplitTensor)
        self.register_buffer("apart", qweight.apart if split else None)
        self.register_buffer("apart_columns", qweight.columns if split else None)
        rest = qweight.rest if split else qweight
        self.format, self.shape = rest.format, torch.Size(rest.shape)
        self.out_features, self.in_features = self.shape
        for name, tensor in _flatten(rest).items():
            self.register_buffer(name, tensor)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def qweight(self) -> QTensor | SplitTensor:
        """The weight over this module's buffers (no copy)."""
        rest = self._rest
        if self.apart is None:
            return rest
        return SplitTensor(rest=rest, apart=self.apart, columns=self.apart_columns)

    @property
    def _rest(self) -> QTensor:
        return _gather(self.format, self.shape, self._buffers)

    @property
    def params(self) -> Params | None:
        """Stored steps of a static input, or means of a centred one, or None."""
        scale, zero = self.input_scale, self.input_zero
        return None if scale is None and zero is None else Params(scale=scale, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        if self.online is not None:
            x = self.online.apply(x)
        wide = None
        if self.apart is not None:
            wide, x = x[..., self.apart_columns], x.index_fill(-1, self.apart_columns, 0)
        bias = self.bias if self.output is None else None
        if x.requires_grad and torch.is_grad_enabled():
            y = _Product.apply(x, self)
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = linear(x, self._rest, bias, self.activation, self.params)
        if wide is not None:
            y = y + F.linear(wide, self.apart.to(x.dtype))
        if self.output is None:
            return y
        y = self.output.invert(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        parts = [size, f"bias={bias}", self.format]
        parts += [] if self.activation is None else [f"input {self.activation}"]
        parts += [] if self.apart is None else [f"{len(self.apart_columns)} columns apart in float"]
        parts += [] if self.online is None else [f"after {self.online}"]
        parts += [] if self.output is None else [f"before the inverse of {self.output}"]
        return ", ".join(str(part) for part in parts)


class _Product(torch.autograd.Function):
    """x W^T of a `QLinear`, by any kernel, with the gradient of x: dx = dy W, straight through its rounding.

    W is decoded again for it. Autograd would keep every layer's decoded weight until then, which is the wide
    model whole.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: QLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer._rest, None, layer.activation, layer.params)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer._rest.dequantize(grad.dtype), None


def see_quantized(
    module: nn.Module,
    activation: Activation | None,
    params: Params | None,
    online: Online | None,
    output: Online | None = None,
    apart: Tensor | None = None,
) -> None:
    """Make a plain linear with rounded weights compute what ``QLinear`` will, before there is one."""
    if online is not None:
        transform_input(module, online.apply)
    if activation is not None:
        transform_input(module, lambda x: activation(x, params, apart))
    if output is not None:
        bias = getattr(module, "bias", None)
        less = (lambda y: y) if bias is None else (lambda y: y - bias)
        more = (lambda y: y) if bias is None else (lambda y: y + bias)
        module.register_forward_hook(lambda m, args, y: more(output.invert(less(y))))


def transform_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Make a plain linear see ``change(x)``; returns what undoes it. Several act in the order of calls."""

    hook = lambda module, args, kwargs: change_input(change, args, kwargs)  # noqa: E731
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def change_input(change: Callable[[Tensor], Tensor], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call's arguments with ``change`` made to the first of them, positional or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _flatten(q: QTensor, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a QTensor under its name: codes, scale or scale_..., zero or zero_...."""
    out = {f"{prefix}codes": q.codes}
    for name, part in (("scale", q.scale), ("table", q.table), ("zero", q.zero)):
        if isinstance(part, QTensor):
            out |= _flatten(part, f"{prefix}{name}_")
        elif part is not None:
            out[f"{prefix}{name}"] = part
    return out


def _gather(format: Format, shape: torch.Size, tensors: dict[str, Tensor], prefix: str = "") -> QTensor:
    """Inverse of ``_flatten``."""
    scale = tensors.get(f"{prefix}scale")
    if scale is None and format.scale is not None:
        blocks = torch.Size(format.block.scale_shape(shape))
        scale = _gather(format.scale, blocks, tensors, f"{prefix}scale_")
    table = tensors.get(f"{prefix}table")
    if table is None and format.codebook is not None:
        kept = torch.Size(format.codebook.shape(format.grid, shape))
        table = _gather(format.codebook.store, kept, tensors, f"{prefix}table_")
    codes, zero = tensors[f"{prefix}codes"], tensors.get(f"{prefix}zero")
    if format.offsets is not None:
        blocks = torch.Size(format.block.scale_shape(shape))
        zero = _gather(format.offsets, blocks, tensors, f"{prefix}zero_")
    return QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=shape, table=table)
