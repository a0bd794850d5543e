"""What there is to quantize in a model, found rather than tabled: its blocks and their linear layers.

Blocks are the elements of the outermost ``ModuleList`` that holds most of the linear weights, so a new
architecture needs no table. Works on a skeleton without weights as on a real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fewbit.errors import InputError


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), a linear whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def linears(root: nn.Module) -> dict[str, nn.Module]:
    """Names (relative to ``root``) and modules of all linear layers: ``nn.Linear`` and ``Conv1D``."""
    return {n: m for n, m in root.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)}


def weight_of(module: nn.Module) -> Tensor:
    """The weight as [out, in], whatever the module's own layout."""
    return module.weight.t() if is_transposed(module) else module.weight


def set_weight(module: nn.Module, w: Tensor) -> None:
    """Put values [out, in] into the module, in its own layout and dtype."""
    w = w.t() if is_transposed(module) else w
    module.weight.data.copy_(w)


@dataclass(frozen=True)
class Blocks:
    """The repeated part of a model: full names and modules, in order."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.names)


def find_blocks(model: nn.Module) -> Blocks:
    """The transformer blocks of ``model``. Raises ``InputError`` when there is no list of blocks with
    linears.
    """
    best, best_size = None, 0
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(i + ".") for i in inside):
            continue
        size = sum(m.weight.numel() for m in linears(module).values())
        if size:
            inside.append(name)
        if size > best_size:
            best, best_size = (name, module), size
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no repeated blocks with linear layers, so there is nothing to "
            "quantize; "
            "give a transformer language model"
        )
    name, module = best
    return Blocks(tuple(f"{name}.{i}" for i in range(len(module))), tuple(module))
