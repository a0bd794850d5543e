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

All implementations compute in float32 in the units of ``Trellis.raw``, without fused multiply-add, and take
the lowest d of equal costs: the states are the same on every device and with any number of threads.

Shapes: x [N, T] -> [N, T / V, V]; states [N, T / V]; best [N, 2^(L - kV)]. T is 256 for weights.

The road not taken: keeping each tile's costs of all 2^L states. It is the textbook's form; it moves 2^kV
times the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.trellis import Trellis

MEMORY = 1 << 30  # bytes of working memory, unless the caller says otherwise
FAR = 1e30  # the cost of a walk that the constraint forbids


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """One way to search: ``run(x [N, T / V, V] in raw units, trellis, window, memory) -> states``."""

    name: str
    supports: Callable[[str], bool]  # of the device type
    run: Callable[[Tensor, Trellis, int, int], Tensor]


def search(x: Tensor, trellis: Trellis, memory: int = MEMORY, window: int | None = None) -> Tensor:
    """States [N, T / V] int32 of the closed walks near x [N, T] float32, unit scale, on x's device.

    memory: bytes that back pointers and costs may take at once; at least one batch of tiles is worked on.
    window: steps to each side of the seam that propose the overlap; None: half the sequence.
    Infinite and huge x count as the nearest of +-1e4. Raises InputError when T is no multiple of V or has
    fewer bits than a state.
    """
    if x.ndim != 2 or x.shape[1] % trellis.values_per_step or x.shape[1] * trellis.rate < trellis.state_bits:
        raise InputError(
            f"{trellis.name} searches sequences [N, T] with T a multiple of {trellis.values_per_step} and "
            f"T x {trellis.rate} at least {trellis.state_bits} bits, got shape {list(x.shape)}"
        )
    if not len(x):
        return torch.empty(0, x.shape[1] // trellis.values_per_step, dtype=torch.int32, device=x.device)
    half = x.shape[1] // trellis.values_per_step // 2
    run = next(s for s in SEARCHERS if s.supports(x.device.type)).run
    return run(scaled(x, trellis), trellis, half if window is None else min(window, half), memory)


def scaled(x: Tensor, trellis: Trellis) -> Tensor:
    """x [N, T] at unit scale -> [N, T / V, V] float32 in raw units, contiguous."""
    raw = x.float().clamp(-1e4, 1e4) * trellis.rms
    return raw.unflatten(1, (-1, trellis.values_per_step)).contiguous()


def best_walk(x: Tensor, trellis: Trellis, overlap: Tensor | None = None) -> Tensor:
    """Exact search: states [N, S] int64 of the best walks for x [N, S, V] in raw units.

    overlap [N]: the prefix with which the walk starts and the overlap it must leave; None: any.
    """
    n, steps, _ = x.shape
    shift = trellis.shift
    prefixes = 1 << trellis.state_bits - shift
    values = trellis.raw(x.device).float()
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


def _eager(x: Tensor, trellis: Trellis, window: int, memory: int) -> Tensor:
    tile = 4 * (4 + trellis.values_per_step << trellis.state_bits) + (
        x.shape[1] << trellis.state_bits - trellis.shift
    )
    out = []
    for part in x.split(max(1, memory // tile)):
        seam = torch.cat([part[:, part.shape[1] - window :], part[:, :window]], 1)
        overlap = best_walk(seam, trellis)[:, window] >> trellis.shift
        out.append(best_walk(part, trellis, overlap))
    return torch.cat(out).int()


def _cpu(x: Tensor, trellis: Trellis, window: int, memory: int) -> Tensor:
    from fewbit.kernel import viterbi_cpu

    return viterbi_cpu.search(x, trellis, window, memory)


def _cuda(x: Tensor, trellis: Trellis, window: int, memory: int) -> Tensor:
    from fewbit.kernel import viterbi_triton

    return viterbi_triton.search(x, trellis, window, memory)


EAGER = Searcher(name="eager", supports=lambda device: True, run=_eager)
CPU = Searcher(name="cpu", supports=lambda device: device == "cpu", run=_cpu)
CUDA = Searcher(name="cuda", supports=lambda device: device == "cuda", run=_cuda)
SEARCHERS = (CPU, CUDA, EAGER)
