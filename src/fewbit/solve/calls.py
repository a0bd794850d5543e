"""A block run with other weights: the calls that calibration caught, against the float block's outputs.

The block is not touched: torch.func.functional_call puts the weights in for one call, and forward pre-hooks
quantize the inputs of layers whose activations will be quantized, with straight-through gradients.

Gradients are taken with the products in bfloat16 where the processor multiplies it at a multiple of float32's
speed, as both papers do; weights, their gradients, the residual stream and the loss stay float32. Errors that
decide what is kept are computed without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Format, Params
from fewbit.format.activation import Activation
from fewbit.format.fake import Through, fake, steps

Call = tuple[tuple, dict]  # args and kwargs of one call of the block
Weights = Mapping[str, Tensor]
EMPTY: Weights = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a layer shall become.

    params: steps of a static activation; transposed: the module keeps its weight as [in, out].
    """

    format: Format
    activation: Activation | None = None
    params: Params | None = None
    transposed: bool = False

    def __post_init__(self):
        if self.activation is not None and self.activation.static and self.params is None:
            raise InputError(f"static input steps ({self.activation}) must be fitted first; give params")


class Calls:
    """Calls of one block with other weights, against their targets."""

    def __init__(self, block, layers, inputs, targets):
        self.block, self.layers, self.inputs, self.targets = block, layers, inputs, targets
        self.frozen = {n: p.detach() for n, p in block.named_parameters()}
        self.square = sum(float(y.float().square().sum()) for y in targets)
        self.count = sum(y.numel() for y in targets)

    def weight(self, name: str) -> Tensor:
        w = self.frozen[f"{name}.weight"].float()
        return w.t().contiguous() if self.layers[name].transposed else w

    def call(self, weights: Weights, i: int, rest: Weights = EMPTY) -> Tensor:
        """Output of call ``i``, float32; ``rest``: other parameters of the block, by their names."""
        own = self.frozen | {n: p.to(self.frozen[n].dtype) for n, p in rest.items()}
        for n, w in weights.items():
            key = f"{n}.weight"
            own[key] = (w.t() if self.layers[n].transposed else w).to(own[key].dtype)
        args, kwargs = self.inputs[i]
        out = torch.func.functional_call(self.block, own, args, kwargs)
        return (out[0] if isinstance(out, tuple) else out).float()

    def loss(self, weights: Weights, i: int, rest: Weights = EMPTY) -> Tensor:
        """Mean squared error of one call over the mean square of all targets, products in bfloat16."""
        y = self.targets[i].float()
        with torch.autocast(y.device.type, torch.bfloat16, enabled=fast_bfloat16(y.device)):
            return (self.call(weights, i, rest) - y).square().mean() * (self.count / max(self.square, 1e-30))

    @torch.no_grad()
    def error(self, weights: Weights, rest: Weights = EMPTY) -> float:
        """Relative squared error over all calls."""
        total = sum(
            (self.call(weights, i, rest) - y.float()).square().sum() for i, y in enumerate(self.targets)
        )
        return float(total) / max(self.square, 1e-30)

    def products(self) -> dict[str, Tensor]:
        """H = X^T X / tokens [in, in], or its diagonal [in], for layers whose range rule asks for it."""
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            own = x.t() @ x if rules[name].of_products else x.square().sum(0)
            sums[name] = sums.get(name, 0) + own / (len(x) * len(self.inputs))

        rules = {n: t.format.range for n, t in self.layers.items() if t.format.range.wants_importance}
        self._watch(rules, add)
        return sums

    def centres(self, names: Collection[str]) -> dict[str, Tensor]:
        """(max + min) / 2 of each column of the inputs of the named layers, [in]."""
        ends: dict[str, tuple[Tensor, Tensor]] = {}

        def add(name: str, x: Tensor) -> None:
            low, high = ends.get(name, (x[0], x[0]))
            ends[name] = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))

        self._watch(names, add)
        return {name: (low + high) / 2 for name, (low, high) in ends.items()}

    @torch.no_grad()
    def _watch(self, names: Collection[str], add: Callable[[str, Tensor], None]) -> None:
        """Run the float block on all inputs; show what each named layer reads [tokens, in] to ``add``."""
        hook = lambda n: lambda module, args: add(n, args[0].float().flatten(0, -2))  # noqa: E731
        handles = [self.block.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
        try:
            for i in range(len(self.inputs)) if names else ():
                self.call({}, i)
        finally:
            for handle in handles:
                handle.remove()


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are native there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def rounded(x: Tensor, activation: Activation, params: Params | None) -> Tensor:
    """What ``activation`` makes of x [..., in], with gradients.

    Straight through the rounding, and through steps that follow x: a channel with the largest magnitude feels
    what its step does to all the others. That is what learned scales live on.
    """
    value = activation(x.detach(), params)
    fmt = activation.format
    if (
        params is not None
        or activation.outliers is not None
        or not (torch.is_grad_enabled() and x.requires_grad)
    ):
        return Through.apply(x, value)
    rows = x.reshape(-1, x.shape[-1]).float()
    blocks = fmt.block.split(rows)
    soft = fmt.block.join(fake(blocks, steps(fmt, *fmt.range(blocks, fmt, None), rows)), rows.shape)
    return Through.apply(soft.view(x.shape).to(x.dtype), value)


@contextmanager
def quantized_inputs(modules: Mapping[str, nn.Module], layers: Mapping[str, Target]):
    """Within: the layers see their inputs as they will be quantized, with straight-through gradients."""

    def hook(target):
        return lambda module, args: (rounded(args[0], target.activation, target.params), *args[1:])

    chosen = {n: t for n, t in layers.items() if t.activation is not None}
    handles = [modules[n].register_forward_pre_hook(hook(t)) for n, t in chosen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
