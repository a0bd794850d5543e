"""Gradients in a Format: each is cast as soon as autograd has made it, so that few wide ones live at once.

    after backward, of a covered parameter p:   p.grad is None,   p.low_grad is a QTensor
    of every other parameter:                   p.grad as always

That attribute is the whole contract. `gradient` reads it (whichever of the two there is), `set_gradient` and
`clear` write it; optimizers, all-reduces and clipping go through these three. Its dequantized value is the
gradient itself: a mean over ranks, a clip or the inverse of a loss scale is a change of ``scale`` alone
(`rescale`), free and exact. Of a sharded parameter (DTensor) the QTensor is that of the local shard.

A gradient with NaN or Inf gets the step NaN and so is NaN as a whole: FP8 saturates, and a saturated Inf
would look like an honest 448. Norms then are NaN, and ``fewbit.train.guard`` skips the step.

A second backward before the update (micro-batches) adds to what is there: dequantize, add in float32,
quantize with a step fitted to the sum.

    FP8-LM: g8 = E4M3(g / s),  s = 2^ceil(log2(max|g| / 448))     section 2.1; s is kept, not 1 / s

FP8-LM: Training FP8 Large Language Models, Peng et al. 2023, https://arxiv.org/abs/2310.18313.

Road not taken: a gradient buffer of the whole model in FP8 (Megatron). It needs every size beforehand and
ties the optimizer to one flat layout; here a tensor keeps its own step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbit.errors import InputError
from fewbit.format import Format, QTensor, value_of
from fewbit.train.shards import local
from fewbit.train.states import check, one_step, quantize

E4M3 = one_step("e4m3fn")
LEAST = 4096  # elements; below, a step and a hook cost more than the bytes


def gradient(p: Tensor) -> QTensor | Tensor | None:
    """The gradient of a parameter as it is kept: quantized, or ``p.grad``, or None before any backward."""
    q = getattr(p, "low_grad", None)
    return p.grad if q is None else q


def set_gradient(p: Tensor, g: QTensor | Tensor | None) -> None:
    """Put ``g`` [*p.shape] in the place of the gradient that there is."""
    quantized = isinstance(g, QTensor)
    p.low_grad = g if quantized else None
    p.grad = None if quantized else g


def clear(params: Iterable[Tensor]) -> None:
    """Forget the gradients of ``params``, quantized or not."""
    for p in params:
        set_gradient(p, None)


def gradients(model: nn.Module) -> dict[str, QTensor]:
    """The quantized gradients of a model by the names of its parameters."""
    found = {name: gradient(p) for name, p in model.named_parameters()}
    return {name: g for name, g in found.items() if isinstance(g, QTensor)}


def wide(g: QTensor | Tensor) -> Tensor:
    """A gradient in float32, [*shape]: dequantized, of a DTensor the local shard."""
    return g.dequantize() if isinstance(g, QTensor) else local(g).float()


def rescale(g: QTensor | Tensor, factor: Tensor | float) -> QTensor | Tensor:
    """``factor * g``. Of a QTensor the steps alone change; a wide gradient is multiplied in place."""
    if not isinstance(g, QTensor):
        return g.mul_(factor)
    return replace(g, scale=value_of(g.scale) * factor)


def covered(model: nn.Module, *, min_size: int = LEAST) -> dict[str, Tensor]:
    """The parameters that are worth few bits, by name: weights of ``nn.Linear`` layers of at least
    ``min_size`` elements that train and are not tied to an embedding.

    Norms, biases and embeddings stay wide: few, or of mixed magnitudes. Raises ``InputError`` where nothing
    is left.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tables
    found = {
        name: p
        for name, p in model.named_parameters()
        if id(p) in linears and p.requires_grad and local(p).numel() >= min_size
    }
    if not found:
        raise InputError(
            f"no weight of a linear layer of {type(model).__name__} trains and has {min_size} elements or "
            "more; lower min_size"
        )
    return found


def fp8_gradients(
    model: nn.Module, fmt: Format = E4M3, *, min_size: int = LEAST
) -> dict[str, RemovableHandle]:
    """From now on, keep the gradients of the `covered` parameters in ``fmt``; handles to undo it, by name.

    Raises ``InputError`` for a format that has no plain float step, and where nothing is covered.
    """
    check(fmt, "a gradient")
    if fmt.scale is None:
        raise InputError(f"gradients need a step of their own, and {fmt} has none; take {E4M3}")
    chosen = covered(model, min_size=min_size)
    for name, p in chosen.items():
        fmt.check(local(p).shape, f"the gradient of {name}")
    return {name: p.register_post_accumulate_grad_hook(_Cast(fmt)) for name, p in chosen.items()}


class _Cast:
    """The hook: the fresh wide gradient becomes codes, added to those of earlier micro-batches."""

    def __init__(self, fmt: Format):
        self.format = fmt

    @torch.no_grad()
    def __call__(self, p: Tensor) -> None:
        g, old = local(p.grad), getattr(p, "low_grad", None)
        set_gradient(p, quantize(g if old is None else old.dequantize().add_(g), self.format))
