"""The recipes of low-precision training: each a `Products`, a few lines of data.

    name           forward                   input gradient            weight gradient          steps
    tensorwise     E4M3 x E4M3               E5M2 x E4M3               E5M2 x E4M3              a tensor
    rowwise        E4M3 x E4M3               E4M3 x E4M3               E4M3 x E4M3              a row, 2^e
    rowwise-wide-weight-gradient  rows x rows  rows x tensor           wide                     2^e
    folded, folded-tensorwise  as rowwise and tensorwise, x and W rounded once: module ``folded``    2^e
    delayed        as tensorwise, from the amaxes of earlier steps
    blockwise      1x128 x 128x128           1x128 x 128x128           1x128 x 1x128            2^e
    mxfp8, mxfp6   groups of 32 along the sum in all three             E8M0, rounded up
    mxfp4          groups of 32              G stochastic              both, Hadamard 32        E8M0
    nvfp4          1x16 x 16x16              G stochastic x 16x16      G stochastic, Hadamard   E4M3 over FP32
    switchback     int8 rows x tensor        rows x tensor             wide                     FP32
    switchback-memory             the same, and x is kept in int8 for backward
    switchback-rows               W by rows forward, by columns backward

torchao's three: https://github.com/pytorch/ao; delayed: https://github.com/NVIDIA/TransformerEngine; blocks:
DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", https://arxiv.org/abs/2412.19437, section 3.3; MX: Rouhani
et al. 2023, https://arxiv.org/abs/2310.10537; NVFP4: NVIDIA 2025, https://arxiv.org/abs/2509.25149; MXFP4
with stochastic rounding and Hadamard maps: Castro et al. 2025, "Quartet", https://arxiv.org/abs/2505.14669;
SwitchBack: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
https://arxiv.org/abs/2304.13013.

A variant calls one and replaces fields: ``dataclasses.replace(rowwise(), keep=Keep.CODES)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fewbit.format import (
    E4M3_OVER_FP32,
    FP32,
    AbsMax,
    Block,
    Block2d,
    Channel,
    Format,
    Group,
    PerTensor,
    PowerOfTwo,
    Range,
    Scaling,
)
from fewbit.format.named import mx
from fewbit.grid import by_name
from fewbit.train.folded import Folded
from fewbit.train.products import Keep, Product, Products

UP = PowerOfTwo(rule=Scaling.RCEIL)  # the least power of two that clips nothing


def stepped(grid: str, block: Block, rule: Range = AbsMax()) -> Format:
    """A grid with float32 steps by ``rule``."""
    return Format(grid=by_name(grid), block=block, range=rule, scale=FP32)


def tensorwise(*, grid: str = "e4m3fn", gradient: str = "e5m2") -> Products:
    """One step a tensor: x and W on ``grid``, G on ``gradient``; fast sums forward alone."""
    return _whole(grid, gradient, AbsMax(), 0)


def delayed(*, history: int = 16, margin: int = 0, gradient: str = "e5m2") -> Products:
    """`tensorwise` with steps from the amaxes of the last ``history`` steps, ``margin`` powers of 2 above."""
    return _whole("e4m3fn", gradient, AbsMax(headroom=2.0**margin), history)


def rowwise() -> Products:
    """E4M3 with a power-of-two step for each row of both operands: nothing of one token reaches another."""
    rows = stepped("e4m3fn", Channel(), UP)
    back = Product(left=rows, right=rows)
    forward = Product(left=rows, right=rows, fast=True)
    return Products(forward=forward, input_gradient=back, weight_gradient=back)


def rowwise_wide_weight_gradient() -> Products:
    """`rowwise`, with W by one step backward and the weight gradient, whose sum is the longest, wide."""
    rows, w = stepped("e4m3fn", Channel(), UP), stepped("e4m3fn", PerTensor(), UP)
    forward = Product(left=rows, right=rows, fast=True)
    return Products(forward=forward, input_gradient=Product(left=rows, right=w))


def folded(*, gradient: str = "e4m3fn") -> Folded:
    """`rowwise` from one cast of each tensor, the steps of x and W folded into G: the fast road on a GPU."""
    return Folded(gradient=by_name(gradient).torch_dtype)


def folded_tensorwise(*, gradient: str = "e5m2") -> Folded:
    """`tensorwise` likewise, with a power of two as the step."""
    return Folded(by_rows=False, gradient=by_name(gradient).torch_dtype)


def blockwise(*, keep: Keep = Keep.WIDE, size: int = 128) -> Products:
    """DeepSeek-V3's: E4M3 in 1 x 128 of x and G, 128 x 128 of W; its own runs keep x in codes."""
    line, tile = stepped("e4m3fn", Group(size), UP), stepped("e4m3fn", Block2d(size, size), UP)
    return Products(
        forward=Product(left=line, right=tile),
        input_gradient=Product(left=line, right=tile),
        weight_gradient=Product(left=line, right=line),
        keep=keep,
    )


def mxfp8(*, element: str = "e4m3fn", gradient: str = "e4m3fn") -> Products:
    """OCP MX in all three products; no step clips, as NVIDIA trains."""
    return _mx(element, gradient)


def mxfp6(*, element: str = "e2m3", gradient: str = "e3m2") -> Products:
    """`mxfp8` with 6 bits: more fraction for x and W, more range for G."""
    return _mx(element, gradient)


def mxfp4(*, hadamard: int = 32) -> Products:
    """E2M1 in groups of 32; backward without clipping or bias: G, and x for the weight gradient, round
    stochastically, and a Hadamard map spreads outliers along the tokens.
    """
    own = mx("e2m1", rule=Scaling.RCEIL)
    return Products(
        forward=Product(left=own, right=own),
        input_gradient=Product(left=own, right=own, stochastic=(True, False)),
        weight_gradient=Product(left=own, right=own, stochastic=(True, True), hadamard=hadamard),
    )


def nvfp4(*, hadamard: int = 16) -> Products:
    """NVIDIA's: 1 x 16 of x and G, 16 x 16 of W (the same numbers forward and backward), G stochastic."""
    line, tile = (
        Format(grid=by_name("e2m1"), block=b, scale=E4M3_OVER_FP32) for b in (Group(16), Block2d(16, 16))
    )
    return Products(
        forward=Product(left=line, right=tile),
        input_gradient=Product(left=line, right=tile, stochastic=(True, False)),
        weight_gradient=Product(left=line, right=line, stochastic=(True, False), hadamard=hadamard),
    )


def switchback(*, grid: str = "int8-narrow", gradient: str | None = None, keep: Keep = Keep.WIDE) -> Products:
    """x and G by rows, W by one step a tensor; the weight gradient is wide. ``gradient``: grid of G, or the
    same; FP8 is ``switchback(grid="e4m3fn", gradient="e5m2")``.
    """
    rows, g = stepped(grid, Channel()), stepped(gradient or grid, Channel())
    w = stepped(grid, PerTensor())
    return Products(forward=Product(left=rows, right=w), input_gradient=Product(left=g, right=w), keep=keep)


def switchback_memory(*, grid: str = "int8-narrow", gradient: str | None = None) -> Products:
    """SwitchBackM: the weight gradient is made from the codes of x, which take half of bfloat16's bytes."""
    return switchback(grid=grid, gradient=gradient, keep=Keep.CODES)


def switchback_rows(*, grid: str = "int8-narrow", gradient: str | None = None) -> Products:
    """SwitchBackQ: W by rows forward, and quantized again by columns backward."""
    rows, g = stepped(grid, Channel()), stepped(gradient or grid, Channel())
    return Products(forward=Product(left=rows, right=rows), input_gradient=Product(left=g, right=rows))


def _whole(grid: str, gradient: str, rule: Range, history: int) -> Products:
    own, g = stepped(grid, PerTensor(), rule), stepped(gradient, PerTensor(), rule)
    back = Product(left=g, right=own)
    forward = Product(left=own, right=own, fast=True)
    return Products(forward=forward, input_gradient=back, weight_gradient=back, history=history)


def _mx(element: str, gradient: str) -> Products:
    own, g = mx(element, rule=Scaling.RCEIL), mx(gradient, rule=Scaling.RCEIL)
    back = Product(left=g, right=own)
    return Products(forward=Product(left=own, right=own), input_gradient=back, weight_gradient=back)


PRODUCTS: Mapping[str, Callable[..., Products | Folded]] = MappingProxyType(
    {
        "wide": Products,
        "tensorwise": tensorwise,
        "rowwise": rowwise,
        "rowwise-wide-weight-gradient": rowwise_wide_weight_gradient,
        "folded": folded,
        "folded-tensorwise": folded_tensorwise,
        "delayed": delayed,
        "blockwise": blockwise,
        "mxfp8": mxfp8,
        "mxfp6": mxfp6,
        "mxfp4": mxfp4,
        "nvfp4": nvfp4,
        "switchback": switchback,
        "switchback-memory": switchback_memory,
        "switchback-rows": switchback_rows,
    }
)
