"""Folds on trial: a fold happens, the block runs, and the fold stays only if the block's output did.

A fold here is a function that changes parameters in place and returns what undoes it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fewbit.nn.linear import transform_input

Fold = Callable[[], Callable[[], None]]
SAME = 1e-4  # relative change of a block's output that rounding explains


def first(output: object) -> Tensor:
    """The hidden states in what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def tolerance(dtype: torch.dtype) -> float:
    """Relative change of an output that rounding explains, where a block computes in ``dtype``."""
    return max(SAME, 4 * torch.finfo(dtype).eps)


def change(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before||; infinite where the norm is not finite."""
    value = float((after - before).double().norm() / before.double().norm().clamp(min=1e-30))
    return value if value == value else float("inf")


@torch.no_grad()
def changed_by(call: Callable[[], object], fold: Fold) -> float:
    """Relative change of the output of ``call`` by a fold, which is undone."""
    before = first(call())
    undo = fold()
    after = first(call())
    undo()
    return change(before, after)


def checked(call: Callable[[], object], trial: Fold, fold: Fold, what: str) -> str:
    """``fold``, unless ``trial``, the same without rounding, changes the output of ``call``.

    By more than 1e-4, that is, or what half precision explains. Returns "" or the sentence that says why
    nothing was folded; ``what`` names the map and its place.
    """
    changed = changed_by(call, trial)
    if not changed < tolerance(first(call()).dtype):
        return f"{what} was not folded: it changed the output of the block by {changed:.1e}"
    fold()
    return ""


def stirred(block: nn.Module, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` with as much noise as signal in the block's input.

    Text may repeat one token, and attention over equal tokens shows nothing.
    """

    def stir(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + noise * x.square().mean().sqrt()

    def run() -> object:
        undo = transform_input(block, stir)
        try:
            return call()
        finally:
            undo()

    return run


def kept(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """What puts the parameters back as they are now."""
    old = [(p, p.detach().clone()) for p in parameters]

    @torch.no_grad()
    def undo() -> None:
        for p, value in old:
            p.copy_(value)

    return undo


def powers_of_two(n: int, seed: int, like: Tensor) -> Tensor:
    """[n] of 1/4 to 4, which round nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (n,), generator=generator).exp2().to(like)
