"""Only the steps learn: integers stay as they are, and each group's step follows the loss of the whole model.

    y = x ((q - z) s)^T        dL/ds = sum over the group of dL/dW (q - z)

E2E-QP, the second phase of EfficientQAT: Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware
Training for Large Language Models", https://arxiv.org/abs/2407.11062, section 3.3. With the codes fixed the
loss is smooth in s: no rounding, no surrogate. What an optimizer holds is a number per group, and of a weight
nothing but its codes is kept from forward to backward: both decode it.

Shapes: x [..., in], codes [out, in], s [out, in / g], y [..., out].

Road not taken: z in training as well. A stored integer zero moves by whole steps of its group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format import QTensor, Zero
from fewbit.nn import QLinear
from fewbit.nn.stored import Stored


class StepLinear(Stored):
    """The layer of ``quantized`` with its steps as a Parameter ``step``, float32; codes and zeros stay.

    Raises ``InputError`` for layers whose steps are codes themselves, and for those with quantized inputs,
    columns apart or a basis.
    """

    def __init__(self, quantized: QLinear):
        super().__init__()
        own = quantized
        if any(part is not None for part in (own.online, own.output, own.apart, own.activation)):
            raise InputError(
                f"steps of {own} cannot be trained alone: it has quantized inputs, columns apart or a basis; "
                "train it with prepare"
            )
        if not isinstance(own.qweight.scale, Tensor) or own.format.codebook is not None:
            raise InputError(
                f"steps of {own.format} are not plain numbers to train; use a format with float steps"
            )
        self.quantized = own.requires_grad_(False)
        self.step = nn.Parameter(own.qweight.scale.float())
        self.in_features, self.out_features = own.in_features, own.out_features

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.step.data = self.step.data.float()  # updates of it are lost in bfloat16
        return self

    def qweight(self) -> QTensor:
        """Codes with the steps as they are stored."""
        q = self.quantized.qweight
        return replace(q, scale=self.step.detach().to(q.scale.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        y = _Product.apply(x, self.step, self)
        bias = self.quantized.bias
        return y if bias is None else y + bias.to(y.dtype)

    def to_quantized(self) -> QLinear:
        """The layer on codes that computes what this one does."""
        return QLinear(self.qweight(), self.quantized.bias)


def train_steps(model: nn.Module) -> nn.Module:
    """``model`` with a `StepLinear` for every `QLinear`, and nothing but their steps to train; in place.

    ``convert`` gives the quantized model back. Raises ``InputError`` where no layer is quantized.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no quantized layers; quantize or convert it first")
    made = {name: StepLinear(layer) for name, layer in layers.items()}
    model.requires_grad_(False)
    for name, layer in made.items():
        layer.step.requires_grad_()
        model.set_submodule(name, layer)
    return model


class _Product(torch.autograd.Function):
    """x W^T from codes and steps; W is decoded in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, step, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, layer.qweight().dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        (x,), q = ctx.saved_tensors, ctx.layer.qweight()
        fmt, dx, ds = q.format, None, None
        if ctx.needs_input_grad[0]:
            dx = dy @ q.dequantize(dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = dy.flatten(0, -2).t().float() @ x.flatten(0, -2).float()
            unit = fmt.block.split(fmt.unit_values(q.codes))
            if fmt.zero in (Zero.INTEGER, Zero.FLOAT):
                unit = unit - q.zero.float().unsqueeze(-1)
            ds = (fmt.block.split(dw) * unit).sum(-1)
        return dx, ds, None
