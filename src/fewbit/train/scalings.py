"""The recipes of low-precision training by name: each a `Products`, and nothing but data.

    name         forward           input gradient     weight gradient    source
    tensorwise   E4M3 x E4M3       E5M2 x E4M3        E5M2 x E4M3        one step a tensor; torchao
    switchback   row x tensor      row x tensor       wide               Wortsman et al. 2023

SwitchBack: "Stable and low-precision training for large-scale vision-language models",
https://arxiv.org/abs/2304.13013. torchao: https://github.com/pytorch/ao.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fewbit.format import FP32, Block, Channel, Format, PerTensor
from fewbit.grid import by_name
from fewbit.train.products import Product, Products


def plain(grid: str, block: Block) -> Format:
    """A grid with float32 steps that reach the largest magnitude of each block."""
    return Format(grid=by_name(grid), block=block, scale=FP32)


def tensorwise(*, gradient: str = "e5m2") -> Products:
    """FP8 with one step a tensor: x and W in E4M3, G in ``gradient``; fast sums forward alone."""
    e4m3, g = plain("e4m3fn", PerTensor()), plain(gradient, PerTensor())
    back = Product(left=g, right=e4m3)
    forward = Product(left=e4m3, right=e4m3, fast=True)
    return Products(forward=forward, input_gradient=back, weight_gradient=back)


def switchback(*, grid: str = "int8-narrow", gradient: str | None = None) -> Products:
    """x and G by rows, W by one step a tensor; the weight gradient, whose sum is the longest, stays wide."""
    rows, g, w = plain(grid, Channel()), plain(gradient or grid, Channel()), plain(grid, PerTensor())
    return Products(forward=Product(left=rows, right=w), input_gradient=Product(left=g, right=w))


PRODUCTS: Mapping[str, Callable[..., Products]] = MappingProxyType(
    {"tensorwise": tensorwise, "switchback": switchback}
)
