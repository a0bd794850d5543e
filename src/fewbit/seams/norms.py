"""What a norm does, found by calling it, and its gain and bias moved into the linears that read it.

    RMSNorm    y = gain x / rms(x) + bias          LayerNorm    y = gain (x - mean(x)) / std(x) + bias
    y W^T + b = (x / rms) (W diag(gain))^T + (b + W bias)                                 (QuaRot, section 4)

gain is ``weight`` or, in Gemma, 1 + ``weight``: a module is a norm when its output on random numbers is one
of these four. Readers without a bias are left without one, so that the checkpoint keeps its tensors: their
constant stays in the norm as bias / gain.

Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456. Shapes: gain, bias [n]; weights of readers [out, n].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import set_weight, weight_of
from fewbit.transform import Map


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """gain, bias [n] float64; shift: 1 where gain is 1 + weight; centred: subtracts the mean (LayerNorm)."""

    gain: Tensor
    bias: Tensor | None
    shift: int
    centred: bool


@torch.no_grad()
def form_of(module: nn.Module, size: int) -> Form | None:
    """What ``module`` does to vectors of ``size`` when it is a norm of them, else None."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(p is not None and p.shape != (size,) for p in (weight, bias)):
        return None
    like = torch.empty(0) if weight is None else weight
    x = 1 + torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    x = (100 * x).to(like)  # large: the norm's epsilon does not show
    got, x = module(x).double(), x.double()
    gain = torch.ones(size, dtype=x.dtype, device=x.device) if weight is None else weight.double()
    add = None if bias is None else bias.double()
    for shift, centred in itertools.product((0,) if weight is None else (0, 1), (False, True)):
        y = x - x.mean(-1, keepdim=True) if centred else x
        y = (gain + shift) * y / y.square().mean(-1, keepdim=True).sqrt() + (0 if add is None else add)
        if (got - y).norm() <= max(1e-4, 4 * torch.finfo(like.dtype).eps) * y.norm():
            return Form(gain=gain + shift, bias=add, shift=shift, centred=centred)
    return None


@torch.no_grad()
def absorb(norm: nn.Module, name: str, readers: list[nn.Module], q: Map | None = None) -> None:
    """Make the gain of ``norm`` 1 and let ``readers`` compute the same from its output times ``q``, an
    orthogonal map (None: as it is). In float64, rounded once to the dtype of each parameter.

    Raises ``InputError`` where a channel has gain 0 but a bias, and a reader has no bias to take it.
    """
    form = form_of(norm, weight_of(readers[0]).shape[1])
    assert form is not None, f"{name} was found to be a norm before"
    taken = all(reader.bias is not None for reader in readers)
    if form.bias is not None:
        left = torch.zeros_like(form.bias)
        if not taken:
            left = torch.where(form.bias == 0, left, form.bias / form.gain)
        if not left.isfinite().all():
            raise InputError(
                f"norm {name} has channels with gain 0 and a bias, and readers without a bias, so its gain "
                "cannot be folded; leave rotations out of the recipe for this model"
            )
        norm.bias.copy_(left if q is None else q.apply(left))
    for reader in readers:
        w = weight_of(reader).double()
        if form.bias is not None and taken:
            reader.bias.copy_(reader.bias.double() + w @ form.bias)
        w = w * form.gain
        set_weight(reader, w if q is None else q.dual(w))
    if getattr(norm, "weight", None) is not None:
        norm.weight.fill_(1 - form.shift)
