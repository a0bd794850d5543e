"""Weights that are stored as codes while they train: a Parameter of one byte (E4M3) or two (scaled FP16).

    w = s * payload        the Parameter is the payload, float8_e4m3fn or float16; s [] is a buffer beside it

The Parameter stays the object that it was; its dtype changes, and autograd is told to leave the gradient wide
(``grad_dtype``), so that hooks of FP8 gradients and optimizers see what they always see. `value` and `put`
read and write any parameter, narrow or not: the optimizer's only way to a weight.

Forward and backward each widen the weight for the length of one product, so wide weights of a model never
live together; the products may themselves be in few bits. In files a layer is ``weight`` (payload) and
``weight_scale`` float32 []; a wide ``weight`` loads as well and is rounded.

FP8-LM's O3 computes from E4M3 and keeps an FP16 master in the optimizer, its O1 and O2 compute from the
scaled FP16 master itself: Peng et al. 2023, https://arxiv.org/abs/2310.18313, section 2.

Road not taken: ``torch.nn.utils.parametrize``. It renames the weight in every file, and F.linear would hold
the widened weight of every layer until backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbit.errors import InputError
from fewbit.format import Format, PerTensor, QTensor
from fewbit.train.products import Keep, Products, product
from fewbit.train.shards import local
from fewbit.train.states import check, quantize


def is_narrow(p: Tensor) -> bool:
    """Whether a parameter is a payload."""
    return getattr(p, "payload_of", None) is not None


@torch.no_grad()
def value(p: Tensor) -> Tensor:
    """What a parameter means, [*local shape] float32: itself where it is float32, else a copy."""
    return p.payload_of.coded().dequantize() if is_narrow(p) else local(p).float()


@torch.no_grad()
def put(p: Tensor, w: Tensor, generator: torch.Generator | None = None) -> None:
    """Make a parameter mean ``w`` [*local shape]; a narrow one gets a step fitted to w."""
    own = local(p)
    if is_narrow(p):
        q = quantize(w, p.payload_of.format, generator=generator)
        own.view(q.codes.dtype).copy_(q.codes)
        p.payload_of.weight_scale.copy_(q.scale)
    elif w is not own:
        own.copy_(w)


class _Linear(torch.autograd.Function):
    """x [m, k], payload [n, k], step [] -> x w^T [m, n] in the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, p: Tensor, layer: NarrowLinear):
        ctx.save_for_backward(x, p, layer.weight_scale)
        ctx.layer = layer
        return product(x, layer.wide(x.dtype), layer.products.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, _, _ = ctx.saved_tensors
        how, dx, dw = ctx.layer.products, None, None
        if ctx.needs_input_grad[0]:
            dx = product(g, ctx.layer.wide(g.dtype).t(), how.input_gradient)
        if ctx.needs_input_grad[1]:
            dw = product(g.t(), x.t(), how.weight_gradient)
        return dx, dw, None


class NarrowLinear(nn.Linear):
    """The layer of ``linear`` on the same Parameters, of which the weight becomes a payload in ``fmt``."""

    def __init__(self, linear: nn.Linear, fmt: Format, products: Products = Products()):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.format, self.products, self.wide_dtype = fmt, products, linear.weight.dtype
        q = quantize(linear.weight, fmt)
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.data = q.codes.view(fmt.grid.torch_dtype)
        self.register_buffer("weight_scale", q.scale)
        self._tie()
        self.train(linear.training)

    def _tie(self) -> None:
        self.weight.payload_of = self
        if self.weight.requires_grad:
            self.weight.grad_dtype = None  # as it comes

    def coded(self) -> QTensor:
        """The weight [out, in] as codes and step, sharing the storage of the Parameter."""
        codes = self.weight.detach().view(self.format.grid.code_dtype)
        shape = self.weight.shape
        return QTensor(codes=codes, scale=self.weight_scale, zero=None, format=self.format, shape=shape)

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in ``dtype``."""
        return self.coded().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, or autocast's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y = _Linear.apply(x.reshape(-1, self.in_features).to(dtype), self.weight, self)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` on the same Parameters, the weight wide again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        p = self.weight
        p.data = self.wide(self.wide_dtype)
        p.payload_of = None
        p.grad_dtype = p.dtype
        linear.weight, linear.bias = p, self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Devices follow ``module.to``; payload and step keep their dtypes."""
        p, step = self.weight, self.weight_scale
        data = p.data
        super()._apply(fn, recurse)
        if self.weight.dtype != data.dtype:
            self.weight.data = data.to(self.weight.device)
            self.weight_scale = step.to(self.weight.device)
        self._tie()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tie()  # a copied Parameter has lost its attributes

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        found = state_dict.get(f"{prefix}weight")
        if found is not None and found.dtype != self.weight.dtype:
            q = quantize(found, self.format)
            payload = q.codes.view(self.format.grid.torch_dtype)
            state_dict |= {f"{prefix}weight": payload, f"{prefix}weight_scale": q.scale}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def narrow(
    model: nn.Module, fmt: Format, *, products: Products = Products(), params: Iterable[Tensor] | None = None
) -> nn.Module:
    """Store weights of linear layers as payloads in ``fmt``; in place, the layers become `NarrowLinear`.

    params: the weights meant, None for all of ``nn.Linear`` layers that are not tied to others. Raises
    ``InputError``, with the model as it was, for a format without a torch dtype or with more than one step,
    for sharded or tied weights, and for products that keep codes or a history.
    """
    check(fmt, "a weight that trains")
    if getattr(fmt.grid, "torch_dtype", None) is None or fmt.scale is None or fmt.block != PerTensor():
        raise InputError(
            f"a weight that trains is E4M3, E5M2 or FP16 under one step for the tensor, not {fmt}"
        )
    if products.keep is not Keep.WIDE or products.history:
        raise InputError("products of narrow weights keep wide inputs and no history; take others")
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            users.setdefault(id(p), []).append(name)
    meant = None if params is None else {id(p) for p in params}
    chosen = {}
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or (meant is not None and id(layer.weight) not in meant):
            continue
        tied = len(users[id(layer.weight)]) > 1
        if tied and meant is None:
            continue
        if tied or local(layer.weight) is not layer.weight:
            raise InputError(
                f"the weight of {name} is tied or sharded and cannot be stored narrow; leave it out"
            )
        chosen[name] = layer
    if not chosen or (meant is not None and len(chosen) < len(meant)):
        raise InputError(
            f"{type(model).__name__} holds {len(chosen)} of the weights in plain nn.Linear layers; narrow "
            "them before other wrappers, or leave them as they are"
        )
    for name, layer in chosen.items():
        made = NarrowLinear(layer, fmt, products)
        if not name:
            return made
        model.set_submodule(name, made)
    return model


def widen(model: nn.Module) -> nn.Module:
    """``model`` with ``nn.Linear`` layers in place of narrow ones, on the same Parameters; in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, NarrowLinear)]:
        if not name:
            return layer.to_linear()
        model.set_submodule(name, layer.to_linear())
    return model
