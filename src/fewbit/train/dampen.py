"""Dampening: weights that train are drawn to the values that they round to.

    w <- w + eta lambda (Q(w) - w)

A gradient that passes straight through the rounding drives a weight whose best value lies between two points
to the threshold between them, and there it jumps from one to the other every few updates, however small those
are. The noise ends only with the training, and what it ends at is chance. Nagel, Fournarakis, Bondarenko,
Blankevoort 2022, "Overcoming Oscillations in Quantization-Aware Training", https://arxiv.org/abs/2203.08452,
section 4.1, add lambda ||Q(w) - w||^2 to the loss. Here the pull stands beside the gradient, as AdamW's decay
does (Loshchilov, Hutter 2017, https://arxiv.org/abs/1711.05101), for Adam takes the size out of a gradient:
eta is the rate of the weight as a share of its size, and a lambda of 1 or less leaves a weight that is always
pushed the same way free to cross.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.train.linear import FakeLinear


@torch.no_grad()
def dampen(
    model: nn.Module, share: float, *, rounded: Callable[[FakeLinear], Tensor] = FakeLinear.rounded
) -> None:
    """Every weight of a `FakeLinear` goes this share of the way to what it rounds to. Its codes stay where
    steps are trained; fitted ones follow the weight.

    Call it after ``optimizer.step()``, or every n-th time with n times the share. rounded: gives a layer's
    rounded weight; ``torch.compile(FakeLinear.rounded)`` saves most of the time on a GPU. Raises
    ``InputError`` for a share outside of [0, 1], and for a model without such layers.
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share} of the way is none; give one from 0 to 1")
    layers = [m for m in model.modules() if isinstance(m, FakeLinear)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no fake-quantized layers; call prepare first")
    for layer in layers:
        layer.weight.lerp_(rounded(layer).to(layer.weight.dtype), share)
