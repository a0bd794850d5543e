"""How a model trains in few bits: its products, its optimizer's states, or the rounding of its checkpoint.

    products    the three matrix products of each linear layer       fewbit.train.lower
    optimizer   what AdamW keeps of a parameter                      fewbit.train.OPTIMIZERS
    level       FP8-LM's O1, O2, O3: gradients, moments, weights     fewbit.train.LEVELS
    quant       rounding of weights (and inputs) in the forward      fewbit.train.prepare

All of them together are one frozen `Way`; none of them is BF16 training with AdamW in float32. Products and
quant exclude each other: both say what a layer computes.

Road not taken: a way by one name ("fp8"). The parts are independent, and which of them costs loss is what one
wants to find out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.recipe import Recipe, Rule
from fewbit.train import (
    LSQ,
    PRODUCTS,
    FakeQuant,
    LearnedRange,
    Straight,
    Trust,
    advance,
    convert,
    lower,
    prepare,
    quest_input,
    quest_weight,
    restore,
)
from fewbit.train.levels import LEVELS, OPTIMIZERS
from fewbit.trainer.settings import Settings
from fewbit.transform import Incoherence

QUANTS: Mapping[str, Callable[[int], FakeQuant]] = {  # from the bits of a weight
    "ste": lambda bits: Straight(),
    "lsq": lambda bits: LSQ(),
    "learned": lambda bits: LearnedRange(),
    "quest": lambda bits: Straight(surrogate=Trust(outer=1.3 if bits == 1 else 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """What of a run is in few bits. Raises ``InputError`` for unknown names and for parts that exclude each
    other.
    """

    products: str | None = None
    optimizer: str | None = None
    level: str | None = None
    quant: str | None = None
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        _known("--products", self.products, PRODUCTS)
        _known("--optimizer", self.optimizer, OPTIMIZERS)
        _known("--level", self.level, LEVELS)
        _known("--quant", self.quant, QUANTS)
        if (self.quant is None) != (self.recipe is None):
            raise InputError(
                "--quant says how the gradient passes the rounding and a recipe what is rounded; give both, "
                "such as -r rtn --bits 4 --quant lsq, or neither"
            )
        if self.quant is not None and (self.products is not None or self.level is not None):
            raise InputError(
                "--quant trains weights that are rounded in the forward, and --products and --level say how "
                "products are computed and what is kept; give one or the other"
            )
        if self.level is not None and self.optimizer not in (None, "fp8-lm"):
            raise InputError(
                f"--level {self.level} says what the optimizer keeps, as fp8-lm does; leave --optimizer "
                f"{self.optimizer} out, or the level"
            )

    def name(self, precision: str) -> str:
        """How people call it: what is in few bits, or else the precision."""
        parts = [f"{self.products} products" if self.products else "", self.optimizer or "", self.level or ""]
        if self.quant is not None:
            parts.append(f"{self.recipe.name} by {self.quant}")
        return ", ".join(p for p in parts if p) or {"bf16": "BF16"}.get(precision, precision)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        recipe = None if self.recipe is None else self.recipe.to_yaml()
        own = ("products", "optimizer", "level", "quant")
        return {name: getattr(self, name) for name in own} | {"recipe": recipe}

    def apply(self, model: nn.Module, windows: torch.Tensor) -> nn.Module:
        """``model`` with its layers exchanged, in place; static steps start from ``windows`` [w, l]."""
        if self.quant is not None:
            widths = [r.weight.grid.bits for r in self.recipe.rules if r.weight is not None]
            rule = QUANTS[self.quant](min(widths, default=8))
            static = any(r.input is not None and r.input.static for r in self.recipe.rules)
            how = rule if static or not rule.learns else None  # steps that follow the token are not trained
            calls = [{"input_ids": window[None]} for window in windows]
            prepare(model, self.recipe, weight=rule, input=how, batches=calls)
        if self.products is not None:
            lower(model, PRODUCTS[self.products]())
        return model

    def optimizer_for(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """AdamW over the parameters of ``model``; matrices alone decay, and none of the trained steps."""
        how = {"lr": settings.lr, "betas": settings.betas}
        decayed, rest = _decayed(model)
        if self.level is None:
            groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest}]
            make = torch.optim.AdamW if self.optimizer is None else OPTIMIZERS[self.optimizer]
            return make(groups, **how, weight_decay=0.0)
        optimizer = LEVELS[self.level].optimizer(model, **how, weight_decay=settings.weight_decay)
        known = {id(p) for p in rest}
        others = optimizer.param_groups[-1]
        others["params"] = [p for p in others["params"] if id(p) not in known]
        optimizer.add_param_group({"params": rest, "weight_decay": 0.0})
        return optimizer

    def move_on(self, model: nn.Module) -> None:
        """After every update: histories of delayed scaling take in its amaxes."""
        if self.products is not None and PRODUCTS[self.products]().history:
            advance(model)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as it is stored, quantized or plain, with its master weights; in evaluation mode."""
        if self.quant is not None:
            return convert(model)
        if self.level is not None and LEVELS[self.level].weight is not None:
            optimizer.restore()
        if self.products is not None:
            restore(model)
        return model.eval()


def quest(bits: int) -> Recipe:
    """Weights and inputs on QuEST's grid behind a Hadamard map. Raises ``InputError`` outside 1 to 8 bits."""
    rule = Rule(weight=quest_weight(bits), input=quest_input(bits), basis=Incoherence(output=False))
    return Recipe(name="quest", rules=(rule,))


def _decayed(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices; and gains, biases, steps and zeros."""
    steps = ("_step", "_zero", "_alpha")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and not n.endswith(steps)]
    known = {id(p) for p in decayed}
    return decayed, [p for _, p in named if id(p) not in known]


def _known(option: str, got: str | None, known: Mapping[str, Any]) -> None:
    if got is not None and got not in known:
        near = difflib.get_close_matches(got, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{option} {got} is unknown; {hint}known are {', '.join(known) or 'none yet'}")
