"""Seams where a permutation folds: linears whose outputs meet elementwise, and what reads the result.

    down(act(gate x) * up x):   rows of gate and up, biases too, and columns of down in one new order

Any activation function will do, where a scale needs one that commutes with it. All linears with one input and
as many rows as the reader has columns are permuted together, or else one alone; the seam holds when a random
order leaves the block's output alone. Road not taken: v -> o, where an order must stay within heads: it
moves no column to another group where heads fill whole groups or groups whole heads.

QServe, Lin et al. 2024, https://arxiv.org/abs/2405.04532, section 4.3.3. Shapes: weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.nn.blocks import linears, set_weight, weight_of
from fewbit.seams.diagonal import trace
from fewbit.seams.trial import SAME, changed_by, checked, kept, stirred
from fewbit.transform.chooser import Kind


@dataclass(frozen=True, kw_only=True)
class OrderSeam:
    """Linears whose rows, and the linear whose columns, take one order. Names are relative to the block."""

    producers: tuple[str, ...]
    reader: str
    kind: Kind = Kind.ORDER


def find_orders(block: nn.Module, call: Callable[[], object]) -> list[OrderSeam]:
    """Every such seam in the order of the forward; ``call`` runs the block once on a few tokens."""
    modules, found = linears(block), []
    call = stirred(block, call)
    _, read = trace(block, call)
    for _, readers in read:
        n = weight_of(modules[readers[0]]).shape[1]
        if len(readers) > 1:
            continue
        for _, group in read:
            fitting = tuple(m for m in group if len(weight_of(modules[m])) == n and m != readers[0])
            ways = dict.fromkeys([fitting, *((m,) for m in fitting)]) if fitting else ()
            seams = (OrderSeam(producers=way, reader=readers[0]) for way in ways)
            found += [s for s in seams if _holds(block, call, s, n)][:1]
    return found


@torch.no_grad()
def fold_order(block: nn.Module, seam: OrderSeam, order: Tensor) -> Callable[[], None]:
    """Put rows of the producers and columns of the reader in ``order`` [in] int64; returns what undoes it."""
    producers, reader = [block.get_submodule(p) for p in seam.producers], block.get_submodule(seam.reader)
    undo = kept(p for m in (*producers, reader) for p in m.parameters(recurse=False))
    for module in producers:
        set_weight(module, weight_of(module)[order])
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(module.bias[order])
    set_weight(reader, weight_of(reader)[:, order])
    return undo


def fold_order_checked(block: nn.Module, call, seam: OrderSeam, order: Tensor, stored: torch.dtype) -> str:
    """`fold_order`, unless it changes the block's output by more than 1e-4; else nothing, and why.

    ``stored`` does not matter: nothing is rounded.
    """
    fold = lambda: fold_order(block, seam, order)  # noqa: E731
    return checked(stirred(block, call), fold, fold, f"the order of the inputs of {seam.reader}")


def _holds(block: nn.Module, call, seam: OrderSeam, n: int) -> bool:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    weight = weight_of(block.get_submodule(seam.reader))
    order = order.to(weight.device)
    rounded = max(SAME, torch.finfo(weight.dtype).eps / 2)  # sums in another order, and no more
    return changed_by(call, lambda: fold_order(block, seam, order)) < rounded
