"""What there is to quantize in a model, found rather than tabled: its blocks and their linear layers.

Blocks are the elements of the outermost ``ModuleList`` that holds most of the linear weights, so a new
architecture needs no table. Works on a skeleton without weights as on a real model. Where a model has several
towers, the blocks are those of the text. What routes tokens to experts is no linear layer here: it stays as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.experts import routers


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), a linear whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def linears(root: nn.Module) -> dict[str, nn.Module]:
    """Names (relative to ``root``) and modules of all linear layers: ``nn.Linear`` and ``Conv1D``, experts'
    among them; not those that route tokens to experts (``fewbit.nn.experts.routers``).
    """
    found = {n: m for n, m in root.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)}
    aside = routers(root)
    return {n: m for n, m in found.items() if n not in aside}


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
    """The transformer blocks of ``model``, of its text tower where it has several towers.

    Raises ``InputError`` when there is no list of blocks with linears.
    """
    best, best_size = None, 0
    inside: list[str] = []
    tower, prefix = _text_tower(model)
    for name, module in tower.named_modules(prefix=prefix):
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


def _text_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of ``model`` that reads text, and its name: what transformers calls the decoder, where the
    configuration has a text part of its own; else the model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model, ""
    tower = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next(((m, n) for n, m in model.named_modules() if m is tower), (model, ""))
