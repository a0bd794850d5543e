"""LowLinear: a linear layer whose three products run in few bits.

    y = x W^T + b        dx = G W        dW = G^T x        db = sum_tokens G          (see ``products``)

``weight`` stays the Parameter that it was: optimizers, ``state_dict`` and whatever wraps a ``torch.nn.Linear`` see
nothing new, and `restore` gives the layer back. Sums and bias are wide; gradients come out in the dtype of what they
belong to. Under autocast the wide operands have its dtype, while weights are quantized from the Parameter itself.

Shapes: x [..., in], weight [out, in], y [..., out]; inside, tokens are flattened: x [m, k], W [n, k], G [m, n].

Road not taken: a tensor subclass for the weight that intercepts ``F.linear`` (torchao). It survives modules that do
their own arithmetic, and hides from the reader of a model which layers are low.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import QTensor
from fewbit.train.products import Cast, Keep, Products, cast, copies, multiply, turned

LOG = logging.getLogger("fewbit.train")
ALONE = ("*lm_head", "*embed*")  # layers that recipes leave wide


class LowProducts(torch.autograd.Function):
    """``LowProducts.apply(x, w, products)``: x [m, k], w [n, k] -> x w^T [m, n] in the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, how: Products):
        left, right = how.forward.casts
        shape = (len(x), len(w))
        if 0 in (*x.shape, *w.shape):
            how, left, right = Products(), Cast(), Cast()
        a, b = cast(x, left), cast(w.to(x.dtype) if how.forward.wide else w, right)
        ctx.how, ctx.sides, ctx.dtypes = how, (*shape, x.shape[1]), (x.dtype, w.dtype)
        kept = (x, w)
        if how.keep is Keep.CODES:  # of w only what backward can use: the Parameter itself costs nothing
            reused = right.turns(how.input_gradient.casts[1])
            kept = (a, b if reused else w)
        parts = [_take_apart(p) for p in kept]
        ctx.rebuild = [p[1] for p in parts]
        ctx.save_for_backward(*parts[0][0], *parts[1][0])
        return multiply(a, b, shape, x.dtype, how.forward.fast)

    @staticmethod
    def backward(ctx, g: Tensor):
        how, (m, n, k), (dtype, of_weight) = ctx.how, ctx.sides, ctx.dtypes
        saved = list(ctx.saved_tensors)
        x, w = (build(saved) for build in ctx.rebuild)
        wants_x, wants_w = ctx.needs_input_grad[:2]
        by_input, by_weight = how.input_gradient, how.weight_gradient
        along, across = by_input.casts[0] if wants_x else None, by_weight.casts[0] if wants_w else None
        rows, columns = copies(g, along, across)
        dx = dw = None
        if wants_x:
            right = _turn(w, by_input.casts[1], how.forward.casts[1], (n, k), dtype)
            dx = multiply(rows, right, (m, k), dtype, by_input.fast)
        if wants_w:
            right = _turn(x, by_weight.casts[1], how.forward.casts[0], (m, k), dtype)
            dw = multiply(columns, right, (n, k), of_weight, by_weight.fast)
        return dx, dw, None


def _turn(kept: QTensor | Tensor, how: Cast, was: Cast, shape: tuple[int, int], dtype: torch.dtype):
    """The transpose of a kept operand [*shape] as ``how`` wants it; codes are reused where they serve."""
    if isinstance(kept, QTensor):
        if was.turns(how):
            return turned(kept)
        kept = kept.dequantize(dtype)[: shape[0], : shape[1]]
    if how.format is None:
        kept = kept.to(dtype)
    return cast(kept.t(), how)


def _take_apart(q: QTensor | Tensor) -> tuple[list[Tensor], Callable[[list[Tensor]], QTensor | Tensor]]:
    """Tensors that autograd can hold, and what makes ``q`` of them again, taking its own off the front."""
    if isinstance(q, Tensor):
        return [q], lambda kept: kept.pop(0)
    fmt, shape = q.format, q.shape
    if q.scale is None:
        return [q.codes], lambda kept: QTensor(
            codes=kept.pop(0), scale=None, zero=None, format=fmt, shape=shape
        )
    parts, build = _take_apart(q.scale)
    return [q.codes, *parts], lambda kept: QTensor(
        codes=kept.pop(0), scale=build(kept), zero=None, format=fmt, shape=shape
    )


class LowLinear(nn.Linear):
    """The layer of ``linear``, whose weight and bias it takes over as they are (no copy), with low products."""

    def __init__(self, linear: nn.Linear, products: Products):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.products = products
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] floating -> [..., out] in x's dtype, or autocast's. Raises ``InputError`` for another shape."""
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise InputError(
                f"a layer of {self.in_features} inputs got {x.dtype} of shape {list(x.shape)}; the last side must "
                f"be {self.in_features}, of floats"
            )
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = LowProducts.apply(x.reshape(-1, self.in_features).to(dtype), self.weight, self.products)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` on the same Parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


Rules = Products | Mapping[str, Products | None] | Callable[[str, nn.Linear], Products | None]


def lower(model: nn.Module, products: Rules, *, keep: tuple[str, ...] = ALONE) -> nn.Module:
    """``model`` with a `LowLinear` in place of every ``nn.Linear`` that ``products`` names; in place.

    products: for all; or by pattern of the layer's name, the first that matches; or a function of name and layer.
    None leaves a layer as it is. keep: patterns of names that stay wide. Parameters stay the objects that they were,
    so an optimizer may be made before or after. What stays wide, and why, goes to the log "fewbit.train". Raises
    ``InputError``, with the model as it was, where no layer is left to lower.
    """
    rule = products if callable(products) else _by_pattern(products)
    made, alone = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        kept = next((p for p in keep if fnmatchcase(name, p)), None)
        chosen = rule(name, layer) if type(layer) is nn.Linear and kept is None else None
        if chosen is None:
            kind = type(layer).__name__
            alone.append(
                f"{name} ({f'matches {kept!r}' if kept else kind if type(layer) is not nn.Linear else 'no rule'})"
            )
        else:
            made[name] = LowLinear(layer, chosen)
    if not made:
        raise InputError(
            f"{type(model).__name__} has no torch.nn.Linear to lower; left alone: {', '.join(alone) or 'none'}"
        )
    for name, layer in made.items():
        model.set_submodule(name, layer)
    LOG.info("%d linear layers lowered; left wide: %s", len(made), ", ".join(alone) or "none")
    return model


def restore(model: nn.Module) -> nn.Module:
    """``model`` with a plain ``nn.Linear`` in place of every `LowLinear`, on the same Parameters; in place.

    Raises ``InputError`` where there is none.
    """
    made = {n: m.to_linear() for n, m in model.named_modules() if isinstance(m, LowLinear)}
    if not made:
        raise InputError(f"{type(model).__name__} has no lowered layers; there is nothing to restore")
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return model


def _by_pattern(products: Products | Mapping[str, Products | None]):
    if isinstance(products, Products):
        return lambda name, layer: products
    return lambda name, layer: next((p for k, p in products.items() if fnmatchcase(name, k)), None)
