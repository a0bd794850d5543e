"""How long a run will take, from measurements of a second on the device that will do it.

Arithmetic that is known is counted and divided by the speed of this device's matrix product: passes of the
calibration text through the blocks, Gram matrices, the products with them that solvers make. What is not a
product (rounding, range searches, walks through a trellis, k-means, steps of HQQ, learned rounding) is timed:
each kind of rule solves two small random weights, one with four times the rows of the other, and

    seconds of a layer = a in + b in out + products / speed

with a and b from the two. A trellis of 2^L states is timed at 2^12 at most and scaled by 2^(L - 12).
Block-wise tuning is timed on one linear with the calibration's tokens, per weight and step.

Not counted: learning a rotation (the plan says so itself), imports, downloads. How close it comes is in
benchmarks/results/estimates.md.

Shapes: layers [out, in].
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Stats, Tiles
from fewbit.grid import Trellis
from fewbit.recipe import Recipe
from fewbit.recipe.recipe import Rule
from fewbit.solve import Aqlm, Gptvq, Ldlq, Need
from fewbit.solve.calls import Target, fast_bfloat16
from fewbit.solve.tune import Tuner
from fewbit.stream.data import Calibration
from fewbit.stream.estimate import SENTENCE, SPREAD
from fewbit.transform.awq import Awq
from fewbit.transform.chooser import SCALES, Chooser, Reader

if TYPE_CHECKING:
    from fewbit.stream.planned import PlannedLayer

SIDE = 128  # inputs of the small weights, and the least of their rows
STATES = 12  # the largest L of a trellis that is timed
BLOCK = 1.4  # seconds of a block over those of its products alone: attention, norms, activations
IO = 1.5e-8  # seconds per parameter: reading, writing, reading back


def seconds(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    recipe: Recipe,
    calibration: Calibration | None,
    device: str,
    depth: str,
) -> float:
    """Predicted wall time of a run of the recipe, in seconds, processes and imports apart.

    depth: where forwards are suspended, or "whole" for an encoder, which is run as a whole.
    """
    speed = product_speed(device, torch.float32)
    own = [layer for layer in layers if layer.block >= 0]
    total = IO * sum(p.numel() for p in model.parameters()) + 0.2
    total += sum(_solving(layer, device, speed) for layer in layers)
    if calibration is None:
        return total
    window = min(calibration.seqlen, SENTENCE) if depth == "whole" else calibration.seqlen
    tokens, weights = calibration.samples * window, sum(x.share * math.prod(x.shape) for x in own)
    groups = {(x.block, x.module.rpartition(".")[0], x.shape[1], x.share) for x in own}
    grams = sum((share * tokens + (share < 1) * SPREAD * n) * n * n for _, _, n, share in groups) / speed
    one_pass = BLOCK * 2 * tokens * weights / speed
    passes, gathered = 1.0, 0
    if any(x.rule.needs & {Need.GRAM, Need.CROSS} for x in own):
        gathered, passes = 1, passes + (depth == "block")
        # experts are run for their first layers, and for their last, on own tokens and some of the block's
        reads = ((x.share * tokens + SPREAD * x.shape[1]) * math.prod(x.shape) for x in own if x.share < 1)
        total += 2 * BLOCK * 2 * sum(reads) / speed
    for chooser in recipe.transforms:
        passes, gathered = passes + 1, gathered + (Need.GRAM in chooser.needs)
        if chooser.kinds & SCALES:
            total += sum(_choosing(chooser, layer, device, speed) for layer in own)
    fast = product_speed(device, torch.bfloat16) if fast_bfloat16(torch.device(device)) else speed
    if recipe.tuning is not None:
        how, each = recipe.tuning, 4  # groups of layers of a block
        held = calibration.samples - how.split(-(-calibration.samples // how.batch)) * how.batch
        passes += 1 + each * (1 + (1 + how.looks) * max(held, how.batch) / calibration.samples)
        learned = each * how.steps * 6 * how.batch * window * weights  # forward, and twice that back
        total += learned * (1 / fast + (BLOCK - 1) / speed)
    tuners = {x.rule.solver for x in own if isinstance(x.rule.solver, Tuner)}
    for solver in tuners:
        passes += 3 + solver.looks  # the float outputs, statistics of ranges, where it starts
        mine = [x for x in own if x.rule.solver == solver]
        each = (tuning_step(x.rule, window, device, x.shape) * math.prod(x.shape) for x in mine)
        beside = 6 * solver.batch * window * sum(math.prod(x.shape) for x in mine) * (BLOCK - 1) / speed
        total += (sum(each) + beside) * solver.steps
    return total + passes * one_pass + gathered * grams


def _solving(layer: PlannedLayer, device: str, speed: float) -> float:
    """Seconds to solve one layer, its dequantized weight and its error included."""
    rule, (out, n) = layer.rule, layer.shape
    gram = Need.GRAM in rule.needs
    products = (1 + _products(rule.solver)) * gram * 2 * n * n * out + (n**3 if gram else 0)
    if isinstance(rule.solver, Tuner):
        return products / speed
    a, b = pace(rule, device, layer.shape)
    return a * n + b * n * out + products / speed


def _products(solver: object) -> float:
    """Products of a weight with its Gram matrix that a solver makes."""
    match solver:
        case Ldlq():
            return 0.5 + solver.passes
        case Gptvq():
            return 0.5 + (solver.passes + 1) * (solver.updates + 4) + solver.passes
        case Aqlm():  # ends by itself; 21 layers of SmolLM2 took 3 to 6 of 6 epochs, 4.3 in the mean
            return 0.5 + (solver.epochs * 2 / 3 + 1) * (solver.updates + 4)
        case _:
            return _products(solver.solver) + 2 if hasattr(solver, "solver") else 0.0


def _choosing(chooser: Chooser, layer: PlannedLayer, device: str, speed: float) -> float:
    """Seconds to choose the scales of one layer's inputs."""
    out, n = layer.shape
    a, b = _chooser_pace(chooser, layer.rule, device, layer.shape)
    tried = (chooser.points * min(out, 1.2 * chooser.rows) + 2 * out) if isinstance(chooser, Awq) else 0
    return a * n + b * n * out + tried * 2 * n * n / speed


# -- small measurements


def timed(run: Callable[[], object], device: str, least: float = 0.05) -> float:
    """Seconds of one call: the shortest of some, as many as ``least`` seconds hold.

    On one CPU thread the processor's own time, which other programs do not lengthen.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock, best, spent = time.process_time if alone else time.perf_counter, math.inf, 0.0
    while spent < least:
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        took = clock() - start
        best, spent = min(best, took), spent + max(took, 1e-3)
    return best


@functools.cache
def product_speed(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of 512 x 512."""
    a = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return 2 * 512**3 / timed(lambda: a @ a, device, 0.03)


def pace(rule: Rule, device: str, shape: tuple[int, int]) -> tuple[float, float]:
    """(seconds per input, seconds per weight) of a rule's solver for layers such as one of ``shape``."""
    grid, scale = rule.weight.grid, 1
    if isinstance(grid, Trellis) and grid.state_bits > STATES:
        scale = 1 << grid.state_bits - STATES
        grid = replace(grid, state_bits=max(STATES, 2 * grid.shift))
        rule = replace(rule, weight=replace(rule.weight, grid=grid))
    a, b = _pace(rule, device, _small(rule, shape))
    return a, b * scale


@functools.cache
def _pace(rule: Rule, device: str, small: tuple[int, int]) -> tuple[float, float]:
    def solve(w: Tensor, stats: Stats) -> None:
        if rule.basis is not None:
            w, stats = rule.basis.enter(w), stats.mapped(rule.basis.input_map(w.shape[1]).apply)
        for weight, _ in rule.choices:
            rule.solver.together([w], stats, weight)[0].dequantize()

    return _two_sizes(solve, device, small)


def _chooser_pace(chooser: Chooser, rule: Rule, device: str, shape: tuple[int, int]) -> tuple[float, float]:
    return _measured_chooser(chooser, rule, device, _small(rule, shape))


@functools.cache
def _measured_chooser(
    chooser: Chooser, rule: Rule, device: str, small: tuple[int, int]
) -> tuple[float, float]:
    def choose(w: Tensor, stats: Stats) -> None:
        chooser([Reader(weight=w, format=rule.weight, activation=rule.input)], stats, None)

    return _two_sizes(choose, device, small)


def _small(rule: Rule, shape: tuple[int, int]) -> tuple[int, int]:
    """A small shape that the rule's formats and basis take, within ``shape``; that itself if no other is."""
    rows, columns = SIDE, SIDE
    if rule.weight.grid.height > 1:  # as many tiles as the search takes at once
        rows = 2 * SIDE
    elif rule.weight.codebook is not None and isinstance(rule.weight.codebook.block, Tiles):
        rows, columns = (
            9 * SIDE // 8,
            2 * SIDE,
        )  # sides with many divisors: tables serve as much as in a layer
    tried = [
        (min(r, shape[0]), min(n, shape[1])) for n in (columns, 2 * SIDE, shape[1]) for r in (rows, shape[0])
    ]
    return next((s for s in tried if _takes(rule, s) and _takes(rule, (4 * s[0], s[1]))), shape)


def _takes(rule: Rule, shape: tuple[int, int]) -> bool:
    try:
        for weight, _ in rule.choices:
            weight.check(shape)
        if rule.basis is not None:
            rule.basis.check(shape, "")
    except InputError:
        return False
    return True


def _two_sizes(run: Callable[[Tensor, Stats], None], device: str, small: tuple[int, int]):
    """(seconds per input, seconds per weight) from two weights, the second of four times the rows."""
    (rows, n), times = small, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w, stats = _example(rows, n, device)
        run(w, stats)  # what is done once: tables, compilation
        for r in (rows, 4 * rows):
            w, stats = _example(r, n, device)
            times.append(timed(functools.partial(run, w, stats), device))
    b = max(0.0, times[1] - times[0]) / (3 * n * rows)
    return max(0.0, times[0] / n - b * rows), b


def _example(rows: int, n: int, device: str) -> tuple[Tensor, Stats]:
    """A random weight [rows, n], and statistics of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(rows, n, generator=g)
    x = torch.randn(4 * n, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g) / n**0.5)
    w, x = w.to(device), x.to(device)
    gram, mean = x.T @ x / len(x), x.abs().mean(0)
    low, high = x.amin(0), x.amax(0)
    return w, Stats(
        gram=gram, cross=0.01 * gram, mean_abs=mean, low=low, high=high, sample=x[:64], tokens=len(x)
    )


def tuning_step(rule: Rule, tokens: int, device: str, shape: tuple[int, int]) -> float:
    """Seconds per weight and step of a tuner, for calls of ``tokens`` tokens and layers such as ``shape``."""
    n = min(4 * SIDE, *shape)
    square = next(((s, s) for s in (n, max(shape)) if _takes(rule, (s, s))), shape)
    return _tuning_step(replace(rule, input=None), tokens, device, square)


@functools.cache
def _tuning_step(rule: Rule, tokens: int, device: str, shape: tuple[int, int]) -> float:
    block = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(device).requires_grad_(False)
    x = torch.randn(1, tokens, shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    calls, layers, targets = [((x,), {})], {"0": Target(format=rule.weight)}, [block(x)]

    def tune(steps: int) -> None:
        replace(rule.solver, steps=steps, looks=1, let=None).tune(block, layers, calls, targets)

    tune(1)
    one, five = (timed(functools.partial(tune, steps), device) for steps in (1, 5))
    return max(0.0, five - one) / 4 / math.prod(shape)
