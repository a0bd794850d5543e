"""A block run with other weights: the calls that calibration caught, against the float block's outputs.

The block is not touched: torch.func.functional_call puts the weights in for one call, and forward pre-hooks
quantize the inputs of layers whose activations will be quantized, with straight-through gradients.

Gradients are taken with the products in bfloat16 where the processor multiplies it at a multiple of float32's
speed, as both papers do; weights, their gradients, the residual stream and the loss stay float32. Errors that
decide what is kept are computed without.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Format, Params
from fewbit.format.activation import Activation
from fewbit.format.fake import Through

Call = tuple[tuple, dict]  # args and kwargs of one call of the block
Weights = Mapping[str, Tensor]


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
            raise InputError(
                f"static input steps ({self.activation}) must be fitted before tuning; give params"
            )


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

    def call(self, weights: Weights, i: int) -> Tensor:
        """Output of call ``i``, float32."""
        own = dict(self.frozen)
        for n, w in weights.items():
            key = f"{n}.weight"
            own[key] = (w.t() if self.layers[n].transposed else w).to(own[key].dtype)
        args, kwargs = self.inputs[i]
        out = torch.func.functional_call(self.block, own, args, kwargs)
        return (out[0] if isinstance(out, tuple) else out).float()

    def loss(self, weights: Weights, i: int) -> Tensor:
        """Mean squared error of one call over the mean square of all targets, products in bfloat16."""
        y = self.targets[i].float()
        with torch.autocast(y.device.type, torch.bfloat16, enabled=fast_bfloat16(y.device)):
            return (self.call(weights, i) - y).square().mean() * (self.count / max(self.square, 1e-30))

    @torch.no_grad()
    def error(self, weights: Weights) -> float:
        """Relative squared error over all calls."""
        total = sum((self.call(weights, i) - y.float()).square().sum() for i, y in enumerate(self.targets))
        return float(total) / max(self.square, 1e-30)

    @torch.no_grad()
    def products(self) -> dict[str, Tensor]:
        """H = X^T X / tokens [in, in], or its diagonal [in], for layers whose range rule asks for it."""
        sums: dict[str, Tensor] = {}

        def hook(name, full):
            def add(module, args):
                x = args[0].float().flatten(0, -2)
                own = x.t() @ x if full else x.square().sum(0)
                sums[name] = sums.get(name, 0) + own / (len(x) * len(self.inputs))

            return add

        rules = {n: t.format.range for n, t in self.layers.items() if t.format.range.wants_importance}
        hooks = {n: hook(n, rule.of_products) for n, rule in rules.items()}
        handles = [self.block.get_submodule(n).register_forward_pre_hook(h) for n, h in hooks.items()]
        try:
            for i in range(len(self.inputs)) if rules else ():
                self.call({}, i)
        finally:
            for handle in handles:
                handle.remove()
        return sums


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are native there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@contextmanager
def quantized_inputs(modules: Mapping[str, nn.Module], layers: Mapping[str, Target]):
    """Within: the layers see their inputs as they will be quantized, with straight-through gradients."""

    def hook(target):
        return lambda module, args: (
            Through.apply(args[0], target.activation(args[0].detach(), target.params)),
            *args[1:],
        )

    chosen = {n: t for n, t in layers.items() if t.activation is not None}
    handles = [modules[n].register_forward_pre_hook(hook(t)) for n, t in chosen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
