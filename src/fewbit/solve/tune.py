"""Block-wise tuning: learn how a block's weights are rounded from the outputs of its float self.

    min over theta of  || F(Q_theta(W), X) - Y ||^2         OmniQuant, eq. 1; SignRound's objective

F is one transformer block, X its calibration inputs, Y what the float block gives, theta a few numbers per
weight block (`lwc`) or per weight (`signround`). Weights stay frozen. X may come through the quantized blocks
before while Y comes from the float model: the block then repairs the errors that reach it. Feeding both from
the float model drops that in silence.

One step: fake-quantize the weights, run ``batch`` calls of the block with them (torch.func.functional_call:
nothing in the block is replaced), take the gradient with respect to the weights, and push it through the
rounding once (`fewbit.format.fake`). Now and then the codes are exported and the block is run with what they
mean on all inputs; the best export so far is the result. Rounding to nearest with the format's own range is
the first candidate, so the result is never worse than that on the calibration inputs.

Shao et al. 2023, https://arxiv.org/abs/2308.13137; Cheng et al. 2023, https://arxiv.org/abs/2309.05516.

Road not taken: the running loss of each batch as the measure of the best step. It saves the looks (a fourth
of a step for each call) and cannot promise anything: losses of two batches do not compare.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Format, Need, QTensor
from fewbit.format.fake import check, export, fake, gaps, interval, steps
from fewbit.solve.calls import Call, Calls, Target, quantized_inputs
from fewbit.solve.let import Joint, Learned, Maps
from fewbit.solve.solver import Solver, SolverWarning


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """The weight of one layer, and of its block the error sum (F - Y)^2 / sum Y^2 over all calls.

    start: rounded to nearest; error: with these weights; looks: what was measured on the way; learned: the
    maps of all joints, whose weights these are, or nothing where the start was best.
    """

    q: QTensor
    start: float
    error: float
    looks: tuple[float, ...]
    learned: tuple[Learned, ...] = ()


@dataclass(eq=False, kw_only=True)
class Layer:
    """A weight while it is tuned: blocks [*scale_shape, n], their widest interval, the rule's share of it.

    gap: steps between the points of the grid around each weight at the start, as the blocks, or 1.
    """

    format: Format
    w: Tensor
    blocks: Tensor
    lo: Tensor
    hi: Tensor
    low: Tensor
    high: Tensor
    gap: Tensor | float

    def ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The interval whose ends are these shares of the widest; a symmetric format has only ``high``."""
        hi = high * self.hi
        return (-hi if self.format.symmetric else low * self.lo), hi


def layer(w: Tensor, fmt: Format, importance: Tensor | None) -> Layer:
    """``w`` [out, in] float32 ready to tune. The widest interval is min-max, or the rule's where wider."""
    blocks = fmt.block.split(w)
    rule, full = interval(fmt, w, importance), torch.aminmax(blocks, dim=-1)
    if fmt.symmetric:
        rule, full = [(-a, a) for a in (torch.maximum(-ends[0], ends[1]) for ends in (rule, full))]
    lo, hi = torch.minimum(rule[0], full[0]), torch.maximum(rule[1], full[1])
    low, high = (
        (part / whole).nan_to_num(1.0).clamp(0, 1) for part, whole in zip(rule, (lo, hi), strict=True)
    )
    gap = gaps(blocks, steps(fmt, *rule, w))
    return Layer(format=fmt, w=w, blocks=blocks, lo=lo, hi=hi, low=low, high=high, gap=gap)


def moved(s: Layer, w: Tensor) -> Layer:
    """The layer with another weight: intervals keep their shares and follow its extremes, differentiably."""
    blocks = s.format.block.split(w)
    if s.format.symmetric:
        hi = blocks.abs().amax(-1) * (s.hi / s.blocks.abs().amax(-1)).nan_to_num(1.0, 1.0)
        return replace(s, w=w, blocks=blocks, lo=-hi, hi=hi)
    (lo, hi), (low, high) = torch.aminmax(blocks, dim=-1), torch.aminmax(s.blocks, dim=-1)
    lo, hi = lo * (s.lo / low).nan_to_num(1.0, 1.0, 1.0), hi * (s.hi / high).nan_to_num(1.0, 1.0, 1.0)
    return replace(s, w=w, blocks=blocks, lo=lo, hi=hi)


@dataclass(frozen=True, kw_only=True)
class Tuner(Solver):
    """A solver that needs the whole block: how its weights are learned together.

    steps: updates; batch: calls of the block per update; lr: learning rate of the first, falling linearly to
    0 (None: the method's own); looks: how often the export is measured on all inputs, the last time after the
    last step. let: the same rate of the scales and shifts at the block's seams (see ``let``); None learns
    none.
    """

    steps: int = 200
    batch: int = 1
    lr: float | None = None
    looks: int = 2
    let: float | None = None

    def __post_init__(self):
        if self.let is not None and not self.let > 0:
            raise InputError(f"rate {self.let} of learned scales must be positive, or none without them")
        if self.steps < 1 or self.batch < 1 or not 1 <= self.looks <= self.steps or not self.rate > 0:
            raise InputError(
                f"tuning with {self.steps} steps of {self.batch} calls at rate {self.lr} and {self.looks} "
                "looks is impossible; all must be positive and looks at most steps"
            )

    @property
    @abstractmethod
    def rate(self) -> float:
        """Learning rate of the first step: ``lr``, or the method's own."""

    @property
    def needs(self):
        return frozenset({Need.BLOCK})

    def check(self, fmt):
        check(fmt)

    def together(self, ws, stats, fmt):
        raise InputError(
            f"{type(self).__name__} learns from the outputs of a whole block and cannot solve one layer "
            "alone; call tune()"
        )

    @abstractmethod
    def leaves(self, layer: Layer) -> list[Tensor]:
        """Fresh parameters of a layer, where the range rule would start."""

    @abstractmethod
    def place(self, layer: Layer, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """lo, hi of each block and the nudge of each weight or None, differentiable in the leaves."""

    @abstractmethod
    def optimizer(self, leaves: Sequence[list[Tensor]]) -> torch.optim.Optimizer:
        """An optimizer over the leaves of all layers, at rate ``lr``."""

    def tune(
        self,
        block: nn.Module,
        layers: Mapping[str, Target],
        inputs: Sequence[Call],
        targets: Sequence[Tensor],
        seed: int = 0,
        joints: Sequence[Joint] = (),
    ) -> dict[str, Tuned]:
        """Tuned weights of the named layers; the block itself is left as it is.

        block: float32, on the device of the inputs; layers: by their name in the block; inputs: args and
        kwargs of calls, a sequence or a few each; targets: the float block's outputs for them (the first
        element where it gives a tuple); joints: where scales are learned, too, between the given layers.
        Equal seeds give equal results on one machine. Warns with ``SolverWarning`` when steps were skipped
        for NaN. Raises ``InputError`` for unknown layers, no or unequal numbers of calls, and where the
        rounded block gives NaN.
        """
        if not layers or not inputs or len(inputs) != len(targets):
            raise InputError(
                f"tuning needs layers and one target per call; got {len(layers)} layers, {len(inputs)} "
                f"calls and {len(targets)} targets"
            )
        modules = dict(block.named_modules())
        for name, target in layers.items():
            if name not in modules or getattr(modules[name], "weight", None) is None:
                raise InputError(f"the block has no layer {name!r} with a weight")
            self.check(target.format)
        with torch.enable_grad(), quantized_inputs(modules, layers):
            return self._tune(Calls(block, layers, inputs, targets), seed, joints)

    def _tune(self, run: Calls, seed: int, joints: Sequence[Joint]) -> dict[str, Tuned]:
        products = run.products()
        start = {n: layer(run.weight(n), t.format, products.get(n)) for n, t in run.layers.items()}
        first = {n: s.format.quantize(s.w, products.get(n)) for n, s in start.items()}
        error = run.error({n: q.dequantize() for n, q in first.items()})
        if not math.isfinite(error):
            raise InputError("a block gives NaN or Inf on the calibration inputs; calibrate in float32")
        best = Candidate(codes=first, learned=(), error=error)
        leaves = {n: [p.requires_grad_() for p in self.leaves(s)] for n, s in start.items()}
        maps = Maps(run, joints)
        optimizers = [(self.optimizer(list(leaves.values())), self.rate)]
        if joints:
            optimizers.append((torch.optim.AdamW(maps.leaves, lr=self.let, weight_decay=0.0), self.let))
        generator = torch.Generator().manual_seed(seed)
        queue: list[int] = []
        looks, skipped = [], 0
        for step in range(self.steps):
            for optimizer, _ in optimizers:
                optimizer.zero_grad()
            placed, rest, _ = self._placed(start, leaves, maps)
            learned = {n: _fake(*p) for n, p in placed.items()} | rest
            free = {n: w.detach().requires_grad_() for n, w in learned.items()}
            weights, others = ({n: free[n] for n in part} for part in (placed, rest))
            for _ in range(self.batch):
                queue = queue or torch.randperm(len(run.inputs), generator=generator).tolist()
                run.loss(weights, queue.pop(), others).backward()
            grads = {n: w.grad for n, w in free.items() if w.grad is not None}
            if all(math.isfinite(g.sum()) for g in grads.values()):
                grads = {n: g for n, g in grads.items() if learned[n].requires_grad}
                torch.autograd.backward([learned[n] for n in grads], list(grads.values()))
                for optimizer, rate in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * (1 - step / self.steps)
                    optimizer.step()
            else:
                skipped += 1
            if (step + 1) * self.looks // self.steps > step * self.looks // self.steps:
                with torch.no_grad():
                    placed, rest, found = self._placed(start, leaves, maps)
                    now = {n: _export(*p) for n, p in placed.items()}
                looks.append(run.error({n: q.dequantize() for n, q in now.items()}, rest))
                if looks[-1] < best.error:
                    best = Candidate(codes=now, learned=found, error=looks[-1])
        if skipped:
            said = f"{skipped} of {self.steps} tuning steps were skipped for NaN or Inf gradients"
            warnings.warn(SolverWarning(said), stacklevel=4)
        return {
            n: Tuned(q=q, start=error, error=best.error, looks=tuple(looks), learned=best.learned)
            for n, q in best.codes.items()
        }

    def _placed(self, start: Mapping[str, Layer], leaves, maps: Maps):
        """Arguments of `_fake` for each layer, the block's other parameters that changed, and the maps."""
        if not maps.joints:
            return {n: (s, *self.place(s, leaves[n])) for n, s in start.items()}, {}, ()
        weights, rest, found = maps.applied()
        now = {n: moved(s, weights[n]) for n, s in start.items()}
        return {n: (s, *self.place(s, leaves[n])) for n, s in now.items()}, rest, found


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """Codes by layer, the maps that belong to them (none at first), and the block's error with both."""

    codes: dict[str, QTensor]
    learned: tuple[Learned, ...]
    error: float


def _fake(s: Layer, lo: Tensor, hi: Tensor, nudge: Tensor | None) -> Tensor:
    """The weight [out, in] that training sees."""
    return s.format.block.join(fake(s.blocks, steps(s.format, lo, hi, s.w), nudge), s.w.shape)


def _export(s: Layer, lo: Tensor, hi: Tensor, nudge: Tensor | None) -> QTensor:
    """The same as codes."""
    return export(s.w, steps(s.format, lo, hi, s.w), nudge)
