"""What each choice of a format does to each layer: its bits, and the error in the linear model's terms.

Rounding in a random basis makes an error like Gaussian noise, and t^2 = |E|^2 / |W|^2 goes straight into
HIGGS's model (`fewbit.search.linearity`). A solver with feedback makes an error that is larger, and lies
where the inputs are weak: there t^2 says nothing. What enters then is the noise that would do the same harm,

    t_eff^2 = tr(E H E^T) / E[ tr(Z H Z^T) ] = tr(E H E^T) * in / (|W|^2 tr H),   Z isotropic, |Z| = |W|

H = X^T X / tokens the Gram matrix of the layer's inputs. For errors that are isotropic it is t^2 again.

HIGGS: https://arxiv.org/abs/2411.17525. Shapes: W, E [out, in]; H [in, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Format, Stats
from fewbit.kernel.gram import add_gram, full
from fewbit.search.judge import Tick, block_linears, logits_of
from fewbit.solve import Need, Rtn, Solver
from fewbit.transform import Incoherence


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A format for a layer's weight, its solver and basis. ``format=None``: the layer stays as it is.

    name: what people call it; nothing depends on it.
    """

    format: Format | None
    solver: Solver = Rtn()
    basis: Incoherence | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if not self.solver.needs <= {Need.GRAM}:
            raise InputError(
                f"{type(self.solver).__name__} learns from more than one layer and cannot be tried on each "
                "alone; choose a recipe that rounds, or feeds errors forward (solver=gptq)"
            )

    @property
    def wants_inputs(self) -> bool:
        """Whether the codes depend on the layer's inputs."""
        return self.format is not None and (
            Need.GRAM in self.solver.needs or self.format.range.wants_importance
        )

    def check(self, shape: tuple[int, int], what: str) -> None:
        """Raise ``InputError`` where format or basis do not fit ``what`` of ``shape`` [out, in]."""
        if self.format is not None:
            self.format.check(shape, what)
            self.solver.check(self.format)
        if self.basis is not None:
            self.basis.check(shape, what)

    def bits(self, shape: tuple[int, int], kept: float = 16) -> float:
        """Stored bits of a weight, everything counted; ``kept`` bits per weight where it stays."""
        return (kept if self.format is None else self.format.bits_per_weight(shape)) * shape[0] * shape[1]

    def solve(self, w: Tensor, stats: Stats) -> Tensor:
        """Quantized values of ``w`` [out, in], in its own basis; rounded where the solver lacks inputs."""
        if self.format is None:
            return w
        solver = Rtn() if stats.gram is None and Need.GRAM in self.solver.needs else self.solver
        if self.basis is None:
            return solver(w, stats, self.format).dequantize()
        own = stats.mapped(self.basis.input_map(w.shape[1]).apply)
        return self.basis.leave(solver(self.basis.enter(w), own, self.format).dequantize())


@dataclass(frozen=True, kw_only=True)
class Error:
    """What a choice does to a layer: t^2 of the weight; squared error of the output relative to it; and
    t_eff^2 (both None where no inputs were gathered).
    """

    weight: float
    output: float | None = None
    effective: float | None = None

    @property
    def best(self) -> float:
        """What goes into the linear model: ``effective`` where it is known."""
        return self.weight if self.effective is None else self.effective


def error(w: Tensor, value: Tensor, h: Tensor | None) -> Error:
    """The error of ``value`` for ``w`` [out, in] under the Gram matrix ``h`` [in, in] of its inputs."""
    e, norm = w - value, float(w.double().square().sum())
    t2 = float(e.double().square().sum()) / norm
    if h is None:
        return Error(weight=t2)
    clean, harm = (float(((a @ h) * a).sum(dtype=torch.float64)) for a in (w, e))
    isotropic = norm * float(h.diagonal().sum()) / len(h)
    return Error(weight=t2, output=harm / clean, effective=harm / isotropic)


def cost(e: Tensor, r: Tensor, m: Tensor | None) -> float:
    """sum_o r_o e_o M e_o^T: what ``e`` [out, in] costs by squared gradients, with ``r`` [out] and ``m``
    [in, in] of `fewbit.search.linearity`; without m, errors are taken to have no direction.
    """
    return float((((e if m is None else e @ m) * e).sum(1) * r).sum(dtype=torch.float64))


@torch.no_grad()
def gram_matrices(
    model: nn.Module, layers: Sequence[str], tokens: Tensor, progress: Tick | None = None
) -> dict[str, Tensor]:
    """H = X^T X / tokens of the input of each layer, [in, in] float32; layers with one input share it.

    Layers that ``tokens`` [w, l] never reach are left out.
    """
    groups = siblings(model, layers, tokens)
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        if name not in sums:
            sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        add_gram(sums[name], rows)

    for i, window in enumerate(tokens, 1):
        _run(model, [g[0] for g in groups], window, see)
        if progress is not None:
            progress(i, len(tokens))
    whole = {name: full(h) / tokens.numel() for name, h in sums.items()}
    return {name: whole[g[0]] for g in groups for name in g}


@torch.no_grad()
def siblings(model: nn.Module, layers: Sequence[str], tokens: Tensor) -> list[list[str]]:
    """The layers that are reached, by the tensor they read (q, k, v; o; gate, up; down), in call order."""
    seen: list[tuple[Tensor, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        for tensor, names in seen[-2:]:  # a held tensor keeps its identity; those before are over
            if tensor is x:
                names.append(name)
                return
        seen.append((x, [name]))

    _run(model, layers, tokens[0, :8], see)
    return [names for _, names in seen]


def _run(model: nn.Module, layers: Sequence[str], window: Tensor, see: Callable[[str, Tensor], None]) -> None:
    """One forward of a window [l]; ``see(name, x)`` gets the input of each layer."""
    modules = block_linears(model)

    def hook(name: str):
        return lambda module, args, kwargs: see(name, args[0] if args else next(iter(kwargs.values())))

    handles = [modules[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in layers]
    try:
        logits_of(model, window[None])
    finally:
        for handle in handles:
            handle.remove()
