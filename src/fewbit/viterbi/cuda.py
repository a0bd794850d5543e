"""The search of ``search.py`` on CUDA: one Triton program a tile, both walks and both ways back in it.

A step reads the costs of 2^kV predecessors for every prefix, adds the errors of their values, keeps the least
and stores it with its choice. Costs alternate between two buffers in global memory, which a step writes once
and reads once: 128 KB at L = 16 and k = 2, from the caches. The values are read 256 times a walk, so they are
float16, as they are given, and stay in the first-level cache, 128 KB of them. Choices take kV bits for
kV <= 2, else a byte, and are written once.

Shapes: x [N, S, V]; values [V, 2^L] float16; costs [N, 2, 2^(L - kV)]; back pointers
[N, S, 2^(L - kV) / packed] bytes; states [N, S].

The road not taken: CUDA C++ with costs and values in shared memory. It needs another copy of the arithmetic,
of which no test without a GPU would see anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x, values, costs, back, first: tl.constexpr, count: tl.constexpr, length: tl.constexpr, L: tl.constexpr,
    KV: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``count`` steps from step ``first`` of the circular sequence; then costs are in buffer count % 2."""
    D: tl.constexpr = 1 << KV
    P: tl.constexpr = 1 << (L - KV)
    Q: tl.constexpr = P >> KV
    ROWS: tl.constexpr = BLOCK // D
    TOGETHER: tl.constexpr = D if D < 4 else 4
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)[None, :]
    for t in range(count):
        here = x + (first + t) % length * V
        x0 = tl.load(here)
        x1 = tl.load(here + V - 1)
        old = costs + t % 2 * P
        new = costs + (1 - t % 2) * P
        for start in range(0, Q, ROWS):
            q = start + row
            p = q[:, None] * D + column
            least = tl.full([ROWS, D], 3e38, tl.float32)
            choice = tl.zeros([ROWS, D], tl.int32)
            for four in range(0, D, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    d = four + i
                    error = tl.load(values + d * P + p).to(tl.float32) - x0
                    error = error * error
                    if V == 2:
                        second = tl.load(values + (1 << L) + d * P + p).to(tl.float32) - x1
                        error = error + second * second
                    # Without the hint Triton loads them by fours and then moves each to its thread.
                    cost = tl.load(tl.max_contiguous(old + d * Q + q, 1))[:, None] + error
                    choice = tl.where(cost < least, d, choice)
                    least = tl.where(cost < least, cost, least)
            tl.store(new + p, least)
            if PACKED > 1:  # all D choices of a row share a byte
                packed = tl.sum(choice << KV * column, 1)
                tl.store(tl.max_contiguous(back + t * Q + q, 1), packed.to(tl.uint8))
            else:
                tl.store(back + t * P + p, choice.to(tl.uint8))
        tl.debug_barrier()


@triton.jit
def _walk_back(
    p, back, states, last: tl.constexpr, stop: tl.constexpr, write: tl.constexpr, L: tl.constexpr,
    KV: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """From prefix p after step ``last`` back to step ``stop``: returns the prefix there."""
    P: tl.constexpr = 1 << (L - KV)
    for i in range(last - stop + 1):
        t = last - i
        byte = tl.load(back + t * (P // PACKED) + p // PACKED).to(tl.int32)
        s = p + (byte >> KV * (p % PACKED) & (1 << KV) - 1) * P
        if write:
            tl.store(states + t, s)
        p = s >> KV
    return p


@triton.jit
def _tile(
    x, values, costs, back, states, length: tl.constexpr, window: tl.constexpr, L: tl.constexpr,
    KV: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 1 << (L - KV)
    tile = tl.program_id(0).to(tl.int64)
    x += tile * length * V
    costs += tile * 2 * P
    back += tile * length * (P // PACKED)
    states += tile * length
    prefix = tl.arange(0, BLOCK)
    for start in range(0, P, BLOCK):
        tl.store(costs + start + prefix, tl.zeros([BLOCK], tl.float32))
    tl.debug_barrier()
    _forward(x, values, costs, back, length - window, 2 * window, length, L, KV, V, PACKED, BLOCK)
    least = 3e38
    overlap = 0
    for start in range(0, P, BLOCK):  # 2 window is even: buffer 0
        cost = tl.load(costs + start + prefix)
        low = tl.min(cost, 0)
        overlap = tl.where(low < least, start + tl.argmin(cost, 0), overlap)
        least = tl.minimum(low, least)
    overlap = _walk_back(overlap, back, states, 2 * window - 1, window, False, L, KV, PACKED)
    tl.debug_barrier()
    for start in range(0, P, BLOCK):
        tl.store(costs + start + prefix, tl.where(start + prefix == overlap, 0.0, 1e30))
    tl.debug_barrier()
    _forward(x, values, costs, back, 0, length, length, L, KV, V, PACKED, BLOCK)
    _walk_back(overlap, back, states, length - 1, 0, True, L, KV, PACKED)


def search(
    x: Tensor, values: Tensor, shift: int, window: int, memory: int, block: int | None = None
) -> Tensor:
    """States [N, S] int32 of x [N, S, V] float32 on its device; see ``viterbi.search``.

    block: prefixes that a program holds in registers at once, for speed only; by default what was fastest on
    an H100.
    """
    n, length, v = x.shape
    prefixes, state_bits = len(values) >> shift, (len(values) - 1).bit_length()
    packed = 1 << shift if shift <= 2 else 1
    values = values.half().t().contiguous()
    states = torch.empty(n, length, dtype=torch.int32, device=x.device)
    block = min(block or (8192 if packed > 1 else 4096), prefixes)
    at_once = min(n, max(1, memory // (prefixes * (8 + length // packed))))
    costs = torch.empty(at_once, 2, prefixes, device=x.device)
    back = torch.empty(at_once, length, prefixes // packed, dtype=torch.uint8, device=x.device)
    for start in range(0, n, at_once):
        part, found = x[start : start + at_once], states[start : start + at_once]
        _tile[(len(part),)](
            part, values, costs, back, found, length, window, state_bits, shift, v, packed, block,
            num_warps=max(1, min(block // 32, max(8, block // 256))), num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return states
