"""The search for the best walk through a trellis: Viterbi's algorithm, twice, so that the walk closes.

With cost(s) the least squared error of all walks that end in state s,

    best_t(p) = min_d cost_t(p + d 2^(L - kV)),        p in [0, 2^(L - kV)),  d in [0, 2^kV)
    cost_{t+1}(s) = best_t(s >> kV) + |value(s) - x_{t+1}|^2

only ``best``, a number per prefix p, passes from step to step, and d is all that the way back needs. A
circular (tail-biting) walk needs the prefix of the first state to be the overlap that the last one leaves.
The best overlap would take a search for each; as in QTIP (section 3.2, algorithm 4,
https://arxiv.org/abs/2406.11235) a free walk over the tile, rolled by half so that the seam lies in the
middle, proposes one, and a walk from it to it follows. ``benchmarks/trellis.py`` prints what a shorter first
walk costs.

A trellis is its values, [2^L, V] float16, and its shift kV; what the values are for is the caller's. All
implementations compute in float32 in the units of the values, without fused multiply-add, and take the lowest
d of equal costs: the states are the same on every device and with any number of threads.

Shapes: x [N, S, V], values [2^L, V] -> states [N, S]; best [N, 2^(L - kV)]. S V is 256 for weights.

The road not taken: keeping each tile's costs of all 2^L states. It is the textbook's form; it moves 2^kV
times the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError

MEMORY = 1 << 30  # bytes of working memory, unless the caller says otherwise
FAR = 1e30  # the cost of a walk that the constraint forbids


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """One way to search: ``run(x [N, S, V], values [2^L, V], shift, window, memory) -> states``."""

    name: str
    supports: Callable[[str], bool]  # of the device type
    run: Callable[[Tensor, Tensor, int, int, int], Tensor]


def search(
    x: Tensor, values: Tensor, shift: int, *, window: int | None = None, memory: int = MEMORY
) -> Tensor:
    """States [N, S] int32 of the closed walks near x [N, S, V] float32, on the device of both.

    values: [2^L, V] float16, what each state emits; shift: the bits kV that a step shifts in; window: steps
    to each side of the seam that propose the overlap (None: half the sequence); memory: bytes that back
    pointers and costs may take at once; at least one batch of walks is worked on. Raises InputError when x
    has another V or a walk fewer bits than a state.
    """
    bits = (len(values) - 1).bit_length()
    if x.ndim != 3 or x.shape[2] != values.shape[1] or x.shape[1] * shift < bits:
        raise InputError(
            f"a trellis of 2^{bits} states that emits {values.shape[1]} values a step and shifts in {shift} "
            f"bits searches [N, S, {values.shape[1]}] with S x {shift} at least {bits}, got shape "
            f"{list(x.shape)}"
        )
    if not len(x):
        return torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    half = x.shape[1] // 2
    run = next(s for s in SEARCHERS if s.supports(x.device.type)).run
    return run(x, values, shift, half if window is None else min(window, half), memory)


def best_walk(x: Tensor, values: Tensor, shift: int, overlap: Tensor | None = None) -> Tensor:
    """Exact search: states [N, S] int64 of the best walks for x [N, S, V]; see `search`.

    overlap [N]: the prefix with which the walk starts and the overlap it must leave; None: any.
    """
    n, steps, _ = x.shape
    prefixes, values = len(values) >> shift, values.float()
    best = x.new_zeros(n, prefixes)
    if overlap is not None:
        best.fill_(FAR).scatter_(1, overlap[:, None], 0.0)
    back = torch.empty(steps, n, prefixes, dtype=torch.uint8, device=x.device)
    for t in range(steps):
        error = (values - x[:, t, None]).square().sum(-1)  # [N, 2^L]
        cost = best.repeat_interleave(1 << shift, 1) + error
        best, back[t] = cost.unflatten(1, (1 << shift, prefixes)).min(1)
    p = best.argmin(1) if overlap is None else overlap
    states = torch.empty(n, steps, dtype=torch.int64, device=x.device)
    for t in reversed(range(steps)):
        states[:, t] = p + back[t].gather(1, p[:, None])[:, 0].long() * prefixes
        p = states[:, t] >> shift
    return states


def _eager(x: Tensor, values: Tensor, shift: int, window: int, memory: int) -> Tensor:
    states, v = values.shape
    each = 4 * (4 + v) * states + x.shape[1] * (states >> shift)
    out = []
    for part in x.split(max(1, memory // each)):
        seam = torch.cat([part[:, part.shape[1] - window :], part[:, :window]], 1)
        overlap = best_walk(seam, values, shift)[:, window] >> shift
        out.append(best_walk(part, values, shift, overlap))
    return torch.cat(out).int()


def _cpu(*args) -> Tensor:
    from fewbit.viterbi import cpu

    return cpu.search(*args)


def _cuda(*args) -> Tensor:
    from fewbit.viterbi import cuda

    return cuda.search(*args)


EAGER = Searcher(name="eager", supports=lambda device: True, run=_eager)
CPU = Searcher(name="cpu", supports=lambda device: device == "cpu", run=_cpu)
CUDA = Searcher(name="cuda", supports=lambda device: device == "cuda", run=_cuda)
SEARCHERS = (CPU, CUDA, EAGER)
