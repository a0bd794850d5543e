"""LowLinear: a linear layer whose three products run in few bits.

    y = x W^T + b        dx = G W        dW = G^T x        db = sum over tokens of G        see ``products``

``weight`` stays the Parameter that it was: optimizers, ``state_dict`` and whatever wraps a
``torch.nn.Linear`` see nothing new, and `restore` gives the layer back. Sums and bias are wide; gradients
have the dtype of what they belong to. Under autocast wide operands have its dtype, while weights are
quantized from the Parameter itself.

Shapes: x [..., in], weight [out, in], y [..., out]; tokens are flattened: x [m, k], W [n, k], G [m, n].

Road not taken: a tensor subclass for the weight that intercepts ``F.linear`` (torchao). It survives modules
that do their own arithmetic, and hides from the reader of a model which layers are low.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbit.errors import InputError
from fewbit.format import QTensor
from fewbit.train.amaxes import GRADIENT, INPUT, WEIGHT, Amaxes, observe
from fewbit.train.folded import Folded
from fewbit.train.products import Cast, Keep, Products, cast, copies, multiply, turned

LOG = logging.getLogger("fewbit.train")
ALONE = ("*lm_head", "*embed*")  # layers that recipes leave wide


class LowProducts(torch.autograd.Function):
    """``LowProducts.apply(x, w, how, seen, pending)``: x [m, k], w [n, k] -> x w^T [m, n] in the dtype of x.

    seen: amaxes [3] that steps come from, or None; pending: buffer [3] that takes in those of this call, or
    None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, how: Products, seen: Tensor | None, pending: Tensor | None):
        m, k, n = *x.shape, len(w)
        if m == 0:
            how = Products()
        left, right = how.forward.casts
        a = cast(x, left, _amax(x, INPUT, left, seen, pending))
        b = cast(w.to(x.dtype) if how.forward.wide else w, right, _amax(w, WEIGHT, right, seen, pending))
        kept = (x, w)
        if how.keep is Keep.CODES:  # of w only what backward can use: the Parameter itself costs nothing
            kept = (a, b if right.turns(how.input_gradient.casts[1]) else w)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        kept = (kept[0] if needs_w else None, kept[1] if needs_x else None)
        parts = [_take_apart(p) for p in kept]
        ctx.how, ctx.sides, ctx.dtypes = how, (m, k, n), (x.dtype, w.dtype)
        ctx.build, ctx.pending = [p[1] for p in parts], pending
        ctx.save_for_backward(seen, *parts[0][0], *parts[1][0])
        return multiply(a, b, (m, n), x.dtype, how.forward.fast)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        how, (m, k, n), (dtype, of_weight) = ctx.how, ctx.sides, ctx.dtypes
        seen, *saved = ctx.saved_tensors
        x, w = (build(saved) for build in ctx.build)
        by_x, by_w = how.input_gradient, how.weight_gradient
        needs_x, needs_w = ctx.needs_input_grad[:2]
        along, across = by_x.casts[0] if needs_x else None, by_w.casts[0] if needs_w else None
        low = across if along is None or along.format is None else along
        rows, columns = copies(g, along, across, _amax(g, GRADIENT, low, seen, ctx.pending))
        dx = dw = None
        if needs_x:
            right, was = by_x.casts[1], how.forward.casts[1]
            right = _turn(w, right, was, (n, k), dtype, WEIGHT, seen)
            dx = multiply(rows, right, (m, k), dtype, by_x.fast)
        if needs_w:
            right, was = by_w.casts[1], how.forward.casts[0]
            right = _turn(x, right, was, (m, k), dtype, INPUT, seen)
            dw = multiply(columns, right, (n, k), of_weight, by_w.fast)
        return dx, dw, None, None, None


def _amax(
    x: Tensor, role: int, how: Cast | None, seen: Tensor | None, pending: Tensor | None
) -> Tensor | None:
    """What steps of x are made of under delayed scaling; None where they are fitted to x."""
    if seen is None or how is None or how.format is None:
        return None
    return observe(x, seen[role], None if pending is None else pending[role])


def _turn(
    kept: QTensor | Tensor,
    how: Cast,
    was: Cast,
    shape: tuple[int, int],
    dtype: torch.dtype,
    role: int,
    seen: Tensor | None,
) -> QTensor | Tensor:
    """The transpose of an operand [*shape] of forward as ``how`` wants it; its codes where they serve."""
    if isinstance(kept, QTensor):
        if was.turns(how):
            return turned(kept)
        wide = dtype if how.format is None or dtype == torch.float64 else torch.float32
        kept = kept.dequantize(wide)[: shape[0], : shape[1]]
    if how.format is None:
        return kept.to(dtype).t()
    return cast(kept.t(), how, _amax(kept, role, how, seen, None))


def _take_apart(
    q: QTensor | Tensor | None,
) -> tuple[list[Tensor], Callable[[list[Tensor]], QTensor | Tensor | None]]:
    """Tensors that autograd can hold, and what makes ``q`` of them again, taking its own off the front."""
    if q is None:
        return [], lambda kept: None
    if isinstance(q, Tensor):
        return [q], lambda kept: kept.pop(0)
    fmt, shape = q.format, q.shape
    parts, build = _take_apart(q.scale)

    def again(kept: list[Tensor]) -> QTensor:
        return QTensor(codes=kept.pop(0), scale=build(kept), zero=None, format=fmt, shape=shape)

    return [q.codes, *parts], again


class LowLinear(nn.Linear):
    """The layer of ``linear``, whose weight and bias it takes over as they are, with products in few bits.

    Under delayed scaling a module ``amaxes`` beside them holds the histories.
    """

    def __init__(self, linear: nn.Linear, products: Products | Folded):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.products = products
        self.amaxes = Amaxes(products.history, linear.weight.device) if products.history else None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, or autocast's. Raises ``InputError`` for another shape."""
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise InputError(
                f"a layer of {self.in_features} inputs got {x.dtype} of shape {list(x.shape)}; give floats "
                f"whose last side is {self.in_features}"
            )
        kind, seen, pending = x.device.type, None, None
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.amaxes is not None:
            seen, pending = self.amaxes(), self.amaxes.pending if self.training else None
        rows = x.reshape(-1, self.in_features).to(dtype)
        if isinstance(self.products, Folded):
            y = self.products.linear(rows, self.weight)
        else:
            y = LowProducts.apply(rows, self.weight, self.products, seen, pending)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """The ``torch.nn.Linear`` on the same Parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


How = Products | Folded
Rules = How | Mapping[str, How | None] | Callable[[str, nn.Linear], How | None]


def lower(model: nn.Module, products: Rules, *, keep: tuple[str, ...] = ALONE) -> nn.Module:
    """``model`` with a `LowLinear` in place of every ``nn.Linear`` that ``products`` names; in place.

    products: those of all layers; or by pattern of their names, of which the first that matches counts; or a
    function of name and layer. None leaves a layer as it is. keep: patterns of names that stay wide.
    Parameters stay the objects that they were, so an optimizer may be made before or after. The log
    "fewbit.train" says what stayed wide and why. Raises ``InputError``, with the model as it was, where
    nothing is left to lower.
    """
    rule = products if callable(products) else _by_pattern(products)
    made, alone = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        pattern = next((p for p in keep if fnmatchcase(name, p)), None)
        if pattern is not None:
            alone.append(f"{name} (matches {pattern!r})")
        elif type(layer) is not nn.Linear:
            alone.append(f"{name} (a {type(layer).__name__})")
        elif (chosen := rule(name, layer)) is None:
            alone.append(f"{name} (no products for it)")
        else:
            made[name] = LowLinear(layer, chosen)
    left = ", ".join(alone) or "none"
    if not made:
        raise InputError(f"{type(model).__name__} has no linear layers to lower; those left wide: {left}")
    LOG.info("%d linear layers lowered; left wide: %s", len(made), left)
    return _swap(model, made)


def restore(model: nn.Module) -> nn.Module:
    """``model`` with a plain ``nn.Linear`` in place of every `LowLinear`, on the same Parameters; in place.

    Raises ``InputError`` where there is none.
    """
    made = {n: m.to_linear() for n, m in model.named_modules() if isinstance(m, LowLinear)}
    if not made:
        raise InputError(f"{type(model).__name__} has no lowered layers; there is nothing to restore")
    return _swap(model, made)


def _swap(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """``model`` with the layers of those names replaced; or the layer itself, where the model is one."""
    for name, layer in made.items():
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


def _by_pattern(products: Products | Mapping[str, Products | None]):
    if isinstance(products, Products | Folded):
        return lambda name, layer: products
    return lambda name, layer: next((p for k, p in products.items() if fnmatchcase(name, k)), None)
