"""Compiled loops over the rows of a quantized weight: a row is decoded into a buffer, and multiplied there.

    y[t, o] = sum_j x[t, j] w[o, j]         w[o, :] is n float32 numbers in the first-level cache

Three kinds of codes, one loop each, cover the formats:

    numbers    the code is the number: integers
    sums       the code holds the index of an entry of each of M tables, entries are added: tables, floats of
               8 bits, point sets, lattices, AQLM
    windows    windows of the bits of a row and of the row above are the index: trellises

then every row takes its steps. The arithmetic is that of ``QTensor.dequantize``, operation by operation in
float32, so the decoded numbers are the same, bit for bit; only the sums over j run in another order.

All take rows ``first`` to ``stop`` of the weight, x [T, n] and y [T, out] float32 (T may be 0), scale and
offset [out or 1, groups], empty where there are none, and a place for what is decoded: ``kept`` [1, n] is
overwritten row by row; [stop - first, n] keeps all. Compiled when first called, once for each dtype of codes,
and cached on disk.

The road not taken: closures that make a loop of a row decoder, for one loop in place of three. numba's cache
does not find closures over compiled functions again, and every process would compile for seconds.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# How a step and an offset make a value of a number: `Zero` of a format.
PLAIN, BEFORE, AFTER = 0, 1, 2  # v s, (v - z) s, v s + z


@njit(nogil=True, cache=True)
def numbers(first, stop, codes, scale, offset, kind, x, y, kept):
    """Codes [out, n], of which each is its own number."""
    for o in range(first, stop):
        row = kept[0 if len(kept) == 1 else o - first]
        for j in range(len(row)):
            row[j] = codes[o, j]
        _step(row, o, scale, offset, kind)
        _products(row, o, x, y)


@njit(nogil=True, cache=True)
def sums(first, stop, codes, points, eights, books, gains, tall, wide, scale, offset, kind, x, y, kept):
    """Codes [out, n / w]; points [tables, entries, w], each for ``tall`` x ``wide`` codes.

    books [M, 3] int64: bits to shift a code by, the mask of an index, and the entry it counts from; gains
    [M]: 0, or for a book of ``eights`` (see `_eights`) what its points are divided by.
    """
    across, w = codes.shape[1] // wide, points.shape[2]
    for o in range(first, stop):
        row = kept[0 if len(kept) == 1 else o - first]
        for c in range(across):
            table = points[o // tall * across + c]
            part = row[c * wide * w : (c + 1) * wide * w]
            mine = codes[o, c * wide : (c + 1) * wide]
            for m in range(len(books)):
                shift, mask, start = books[m]
                if gains[m]:
                    _eights(mine, eights, shift, gains[m], m > 0, part)
                else:
                    _entries(mine, table[start:], shift, mask, m > 0, part)
        _step(row, o, scale, offset, kind)
        _products(row, o, x, y)


@njit(nogil=True, cache=True)
def windows(first, stop, codes, points, rate, shift, mask, scale, offset, kind, x, y, kept):
    """Codes [out, n / 16] of ``rate`` k bits a weight, in tiles of 16 rows, circular; points [2^L, V].

    shift: the bits kV that a step shifts in; mask: 2^L - 1. See `fewbit.grid.trellis.Trellis.states`.
    """
    half, down = np.uint64(8 * rate), np.uint64(shift)
    mask, low = np.uint64(mask), (np.uint64(1) << half) - np.uint64(1)
    one, flat = points.shape[1] == 1, points.reshape(-1)
    for o in range(first, stop):
        row = kept[0 if len(kept) == 1 else o - first]
        above = codes[o - 1 if o % 16 else o + 15]
        for c in range(codes.shape[1]):
            code, word = np.uint64(codes[o, c]), np.uint64(above[c])
            for h in range(2):  # half a row of a tile: its 8 k bits under the 16 before them
                word = (word & np.uint64(0xFFFF)) << half | (code >> half if h == 0 else code) & low
                at, rest = 16 * c + 8 * h, word
                if one:
                    for t in range(7, -1, -1):
                        row[at + t] = flat[rest & mask]
                        rest = rest >> down
                else:
                    for t in range(6, -1, -2):
                        pair = (rest & mask) << np.uint64(1)
                        row[at + t], row[at + t + 1] = flat[pair], flat[pair + np.uint64(1)]
                        rest = rest >> down
        _step(row, o, scale, offset, kind)
        _products(row, o, x, y)


@njit(nogil=True, cache=True)
def _entries(codes, table, shift, mask, more, out):
    """The entries [w] that codes name, side by side; ``more``: added to what is there."""
    w = table.shape[1]
    if w == 1 and not more:
        for i in range(len(codes)):
            out[i] = table[np.uint64((codes[i] >> shift) & mask), 0]
    elif w == 2 and not more:
        for i in range(len(codes)):
            at = np.uint64((codes[i] >> shift) & mask)
            out[2 * i], out[2 * i + 1] = table[at, 0], table[at, 1]
    else:
        for i in range(len(codes)):
            at = np.uint64((codes[i] >> shift) & mask)
            for k in range(w):
                out[i * w + k] = out[i * w + k] + table[at, k] if more else table[at, k]


@njit(nogil=True, cache=True)
def _eights(codes, eights, shift, gain, more, out):
    """The points of E8P, of quarters: eight signed bytes in each of ``eights`` [65536] uint64.

    512 KB, of which a point is one load from the second-level cache; in float32 all points take 2 MB.
    """
    packed = np.empty(len(codes), np.uint64)
    for i in range(len(codes)):
        packed[i] = eights[np.uint64((codes[i] >> shift) & 0xFFFF)]
    quarters = packed.view(np.int8)
    if gain == 1 and not more:
        for j in range(len(out)):
            out[j] = np.float32(quarters[j]) * np.float32(0.25)
    else:
        for j in range(len(out)):
            v = np.float32(quarters[j]) * np.float32(0.25) / gain
            out[j] = out[j] + v if more else v


@njit(nogil=True, cache=True)
def _step(row, o, scale, offset, kind):
    """Steps of the groups of row ``o``, in place."""
    s = scale[0 if len(scale) == 1 else o]
    size = len(row) // len(s)
    for g in range(len(s)):
        part = row[g * size : (g + 1) * size]
        if kind == PLAIN:
            for j in range(size):
                part[j] = part[j] * s[g]
            continue
        z = offset[0 if len(offset) == 1 else o, g]
        if kind == BEFORE:
            for j in range(size):
                part[j] = (part[j] - z) * s[g]
        else:
            _after(part, s[g], z)


@njit(nogil=True, cache=True, fastmath={"contract"})
def _after(part, s, z):
    """v s + z rounded once, as ``torch.addcmul`` does."""
    for j in range(len(part)):
        part[j] = part[j] * s + z


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _products(row, o, x, y):
    """Row ``o`` of the weight times every row of x."""
    for t in range(len(x)):
        xs, total = x[t], np.float32(0)
        for j in range(len(row)):
            total += row[j] * xs[j]
        y[t, o] = total
