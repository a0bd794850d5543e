"""Which linears of a block receive the same tensor, found rather than tabled.

Groups (q, k, v; o; gate, up; down) are found by calling the block once on a few tokens and watching which
input object each linear gets, in the order of the calls. Experts read tokens of their own, and few tokens do
not reach them all: they are one entry, and each is watched by itself. What a block is, and which linears it
has, is in ``fewbit.nn.blocks``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbit.nn.blocks import Blocks, find_blocks, is_transposed, linears, set_weight, weight_of
from fewbit.nn.experts import in_experts

__all__ = ["Blocks", "find_blocks", "is_transposed", "linears", "set_weight", "watch", "weight_of"]


def watch(block: nn.Module, call: Callable[[], object]) -> list[list[str]]:
    """Groups of linears of ``block`` that get the same input tensor, in call order; names relative to the
    block.

    ``call`` runs the block once. Linears that the call never reaches are not in any group. The linears of
    `Experts` are not looked at: the experts' own name is a group, where they are called.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    found: set[str] = set()

    def hook(name):
        def record(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            if name in found:
                return
            found.add(name)
            for tensor, names in seen:
                if tensor is x and name not in mixtures and names[0] not in mixtures:
                    names.append(name)
                    return
            seen.append((x, [name]))

        return record

    mixtures = in_experts(block)
    inside = tuple(f"{n}." for n in mixtures)
    watched = {n: m for n, m in linears(block).items() if not n.startswith(inside)} | mixtures
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in watched.items()]
    try:
        with torch.no_grad():
            call()
    finally:
        for h in handles:
            h.remove()
    return [names for _, names in seen]
