"""The search of ``search.py`` on a CPU: a compiled loop over 16 tiles at a time.

The tiles of a batch are the innermost axis, so the vector unit works on 16 tiles side by side whatever the
rate, every load is contiguous, and a state's value is read once for all of them. Predecessors are compared
four at a time: LLVM makes vectors of the straight line, and would not of a loop in a loop. Values are
reordered to be read from front to back. Batches are dealt to threads (as many as torch uses), each with its
own scratch; a batch is computed by one thread alone, so the result does not depend on how many there are.

Shapes: x [S, V, 16]; costs [2^(L - kV), 16]; back pointers [S, 2^(L - kV), 16] bytes; values
[2^(L - kV), 2^kV, V], prefix first.

The roads not taken: the vector over states, which needs no batch, but there a step is a transposition of
another shape for every rate; and back pointers packed to kV bits, a quarter of the memory at twice the time.
"""

from __future__ import annotations

import functools
import queue
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

LANES = 16
_FAR = np.float32(1e30)  # of a walk that the constraint forbids, as in ``search.py``
_NONE = np.float32(3e38)  # above any cost


@functools.cache
def _steps(shift: int, v: int):
    """The compiled recurrence for one kV and V: fills ``back`` from first to last step, returns the costs."""
    n = 1 << shift

    @njit(nogil=True, cache=True)
    def step(x, values, old, new, back):
        prefixes = new.shape[0]
        quarter = prefixes // n
        for q in range(quarter):
            for p in range(q * n, q * n + n):
                out, choice = new[p], back[p]
                if n > 4:
                    for l in range(LANES):
                        out[l] = _NONE
                for d in range(0, n, 4):
                    b0, b1 = old[d * quarter + q], old[(d + 1) * quarter + q]
                    f0, f1 = values[p, d, 0], values[p, d + 1, 0]
                    if n > 2:
                        b2, b3 = old[(d + 2) * quarter + q], old[(d + 3) * quarter + q]
                        f2, f3 = values[p, d + 2, 0], values[p, d + 3, 0]
                    if v == 2:
                        g0, g1 = values[p, d, 1], values[p, d + 1, 1]
                        g2, g3 = values[p, d + 2, 1], values[p, d + 3, 1]
                    for l in range(LANES):  # this one becomes vectors: selections only, no branches
                        e0, e1 = f0 - x[0, l], f1 - x[0, l]
                        e0, e1 = e0 * e0, e1 * e1
                        if n > 2:
                            e2, e3 = f2 - x[0, l], f3 - x[0, l]
                            e2, e3 = e2 * e2, e3 * e3
                        if v == 2:
                            h0, h1, h2, h3 = g0 - x[1, l], g1 - x[1, l], g2 - x[1, l], g3 - x[1, l]
                            e0, e1, e2, e3 = e0 + h0 * h0, e1 + h1 * h1, e2 + h2 * h2, e3 + h3 * h3
                        least, c = b0[l] + e0, b1[l] + e1
                        best = np.int32(d + 1) if c < least else np.int32(d)
                        least = c if c < least else least
                        if n > 2:
                            c = b2[l] + e2
                            best = np.int32(d + 2) if c < least else best
                            least = c if c < least else least
                            c = b3[l] + e3
                            best = np.int32(d + 3) if c < least else best
                            least = c if c < least else least
                        if n > 4:
                            best = best if least < out[l] else np.int32(choice[l])
                            least = least if least < out[l] else out[l]
                        out[l] = least
                        choice[l] = best

    @njit(nogil=True, cache=True)
    def steps(x, values, old, new, back):
        for t in range(x.shape[0]):
            step(x[t], values, old, new, back[t])
            old, new = new, old
        return old

    return steps


@njit(nogil=True, cache=True)
def _walk_back(p, back, shift, first, states):
    """From prefixes p [16] after the last step back to step ``first``; fills states [16, S], changes p."""
    prefixes = back.shape[1]
    for t in range(back.shape[0] - 1, first - 1, -1):
        for l in range(LANES):
            s = p[l] + prefixes * back[t, p[l], l]
            states[l, t] = s
            p[l] = s >> shift
    return p


def search(x: Tensor, values: Tensor, shift: int, window: int, memory: int) -> Tensor:
    """States [N, S] int32 of x [N, S, V] float32 on the CPU; see ``viterbi.search``."""
    n, length, v = x.shape
    prefixes = len(values) >> shift
    steps = _steps(shift, v)
    values = values.float().view(-1, prefixes, v).transpose(0, 1).contiguous().numpy()
    batches = -(-n // LANES)
    lanes = torch.zeros(batches * LANES, length, v)
    lanes[:n] = x
    lanes = lanes.unflatten(0, (batches, LANES)).permute(0, 2, 3, 1).contiguous().numpy()
    states = np.empty((batches, LANES, length), np.int32)

    each = LANES * prefixes * (length + 8)  # bytes of scratch
    threads = max(1, min(batches, torch.get_num_threads(), memory // each))
    scratch = queue.SimpleQueue()
    for _ in range(threads):
        back = np.empty((length, prefixes, LANES), np.uint8)
        scratch.put((np.empty((2, prefixes, LANES), np.float32), back))

    def one(i: int) -> None:
        mine = scratch.get()
        (old, new), back = mine
        old.fill(0)
        seam = np.concatenate([lanes[i, length - window :], lanes[i, :window]])
        ends = steps(seam, values, old, new, back[: 2 * window]).argmin(0)
        overlap = _walk_back(ends, back[: 2 * window], shift, window, states[i])
        old.fill(_FAR)
        old[overlap, np.arange(LANES)] = 0
        steps(lanes[i], values, old, new, back)
        _walk_back(overlap, back, shift, 0, states[i])
        scratch.put(mine)

    if threads == 1:
        for i in range(batches):
            one(i)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(batches)))
    return torch.from_numpy(states.reshape(-1, length)[:n])
