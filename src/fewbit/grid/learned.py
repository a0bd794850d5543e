"""Learned tables: vectors of the tensor's own; a code means one of them, or the sum of several.

    value(code) = sum_m C_m[code_m],    code = sum_m code_m 2^(m b)       M books of 2^b entries in R^w

One book is k-means (Deep Compression, https://arxiv.org/abs/1510.00149) and GPTVQ (van Baalen et al. 2024,
https://arxiv.org/abs/2402.15319); several are AQLM (Egiazarian et al. 2024,
https://arxiv.org/abs/2401.06118). Errors are measured by a positive matrix A [w, w] that says how much each
direction costs the layer's output. What a method needs of a table is

    `choose`   codes of x: a beam over the books, since x A c = (x A) . c and c A c is tabulated; M = 1: exact
    `learn`    tables of x: EM, GPTVQ's section 3.2, each book on what the ones before it leave
    `decode`   and its adjoint `collect`: they make the tables a linear least squares problem for given codes

In EM both steps are linear in the features (x A, A) of a vector: |x - c|_A^2 = const - 2 (x A).c + A.(c c^T),
so finding entries is one product, and an entry solves (sum A) c = sum x A over its members.

Shapes: T tables of N vectors each: x [T, N, w], codes [T, N] int64, tables C [T, M, K, w], K = 2^b.

The road not taken: k-means++ as the start. Entries start at vectors of evenly spaced length instead
(GPTVQ's Mahalanobis start), which needs no generator; one that loses all members moves to the worst vector.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Grid
from fewbit.grid.kmeans import kmeans

_SCORES = 2**22  # held at once


@dataclass(frozen=True)
class Learned(Grid):
    """Codes of ``books`` x ``entry_bits`` bits for ``width`` weights; their points belong to each tensor.

    ``Learned(2, 4)`` has 16 pairs, 2 bits a weight; ``Learned(8, 8, 2)`` is AQLM's 2x8.
    """

    width: int = field()  # the contract has a default, this has none
    entry_bits: int
    books: int = 1
    min = -1.0  # so a step is what divides a block before it meets its table
    max = 1.0

    def __post_init__(self):
        if not (1 <= self.width <= 64 and 1 <= self.entry_bits <= 16 and 1 <= self.books <= 8):
            raise InputError(
                f"{self.books} books of 2^{self.entry_bits} vectors of {self.width} are impossible; "
                "give 1 to 8 books, 1 to 16 bits and vectors of 1 to 64"
            )
        if self.bits > 62:
            raise InputError(f"{self.name} needs codes of {self.bits} bits; at most 62 can be held")

    @property
    def name(self) -> str:
        return f"learned-p{self.width}-b{self.entry_bits}" + (f"-x{self.books}" if self.books > 1 else "")

    @property
    def bits(self) -> int:
        return self.books * self.entry_bits

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32 if self.bits < 32 else torch.int64

    @property
    def entries(self) -> int:
        """Numbers in one table: books, entries and coordinates."""
        return (self.books << self.entry_bits) * self.width

    def round(self, x, generator=None):
        raise InputError(f"the points of {self.name} belong to a tensor; use Format.fit and Format.encode")

    def value(self, codes, dtype=torch.float32):
        raise InputError(f"the points of {self.name} belong to a tensor; use QTensor.dequantize")

    def describe(self):
        raise InputError(f"the points of {self.name} are learned for each tensor; there is nothing to list")


def parse_learned(name: str) -> Learned | None:
    """The grid of a name such as "learned-p2-b4" or "learned-p8-b8-x2"; None for another form."""
    found = re.fullmatch(r"learned-p(\d{1,2})-b(\d{1,2})(?:-x(\d))?", name)
    return found and Learned(int(found[1]), int(found[2]), int(found[3] or 1))


def _flat(codes: Tensor, tables: Tensor) -> list[Tensor]:
    """For each book the rows [T, N] of the tables, taken as [T M K, w], that codes mean."""
    t, m, k, _ = tables.shape
    first = torch.arange(t, device=codes.device)[:, None] * (m * k)
    bits = k.bit_length() - 1
    return [first + (i * k) + ((codes.long() >> (i * bits)) & (k - 1)) for i in range(m)]


def decode(codes: Tensor, tables: Tensor) -> Tensor:
    """Codes [T, N] -> their vectors [T, N, w], in the dtype of the tables [T, M, K, w]."""
    rows = tables.reshape(-1, tables.shape[-1])
    parts = (rows.index_select(0, at.flatten()) for at in _flat(codes, tables))
    return sum(parts).view(*codes.shape, -1)


def collect(codes: Tensor, x: Tensor, tables: Tensor) -> Tensor:
    """The adjoint of `decode`: sums of the vectors x [T, N, w] by entry, in the shape of ``tables``."""
    out, x = torch.zeros_like(tables).view(-1, tables.shape[-1]), x.flatten(0, 1)
    for at in _flat(codes, tables):
        out.index_add_(0, at.flatten(), x)
    return out.view(tables.shape)


def choose(x: Tensor, tables: Tensor, a: Tensor | None = None, beam: int = 4) -> Tensor:
    """Codes [T, N] of least (x - c) A (x - c)^T; exact for one book, else the best of a beam over the books.

    a: [w, w] symmetric, one for all vectors; None: the identity.
    """
    t, n, _ = x.shape
    _, books, k, w = tables.shape
    turned = tables if a is None else tables @ a
    half = (turned * tables).sum(-1) / 2
    size = max(1, _SCORES // (t * k * (1 if books == 1 else beam)))
    if n > size:
        return torch.cat([choose(part, tables, a, beam) for part in x.split(size, 1)], 1)
    rest = (x if a is None else x @ a).unsqueeze(2)  # [T, N, beam, w]: A (x - c)
    score, codes = rest.new_zeros(t, n, 1), torch.zeros(t, n, 1, dtype=torch.int64, device=x.device)
    for m in range(books):
        gain = (rest.flatten(1, 2) @ tables[:, m].mT - half[:, m, None]).view(t, n, -1, k)
        total = (gain + score.unsqueeze(-1)).flatten(2)
        last = m == books - 1
        score, at = total.max(-1, keepdim=True) if last else total.topk(min(beam, total.shape[-1]), -1)
        before, entry = at // k, at % k
        codes = codes.gather(2, before) + (entry << m * (k.bit_length() - 1))
        if not last:
            taken = turned[:, m].gather(1, entry.flatten(1)[..., None].expand(-1, -1, w))
            rest = rest.gather(2, before[..., None].expand(-1, -1, -1, w)) - taken.view(t, n, -1, w)
    return codes.squeeze(2)


def learn(x: Tensor, grid: Learned, a: Tensor | None = None, iterations: int = 50) -> Tensor:
    """Tables [T, M, K, w] for vectors x [T, N, w], book after book.

    a: the cost of an error, [T, N, w, w] (for scalars [T, N, 1, 1]), or None. Deterministic.
    """
    books, rest = [], x
    for m in range(grid.books):
        k = 2**grid.entry_bits
        if grid.width == 1:
            weights, line = None if a is None else a[..., 0, 0], rest[..., 0].contiguous()
            table = kmeans(line, k, weights=weights, iterations=iterations)[0].unsqueeze(-1)
        else:
            table = em(rest, k, a, iterations)[0]
        books.append(table.to(x.dtype))
        if m < grid.books - 1:
            rest = rest - decode(_assign(_features(rest, a), books[-1]), books[-1].unsqueeze(1))
    return torch.stack(books, 1)


def em(x: Tensor, k: int, a: Tensor | None, iterations: int) -> tuple[Tensor, list[float]]:
    """One book [T, k, w] for vectors x [T, N, w] under costs ``a`` as in `learn`, and the cost of all vectors
    before each of its steps, which never rises.
    """
    t, n, w = x.shape
    f = _features(x, a)
    own = (f[..., :w] * x).sum(-1)  # x A x
    at = torch.linspace(0, n - 1, k, device=x.device).round().long()
    order = own.argsort(dim=1, stable=True)[:, at]
    c = x.gather(1, order[..., None].expand(-1, -1, w)).contiguous()
    ridge, costs, last = (
        1e-6 * torch.eye(w, dtype=x.dtype, device=x.device),
        [],
        own.new_full((t, n), -1).long(),
    )
    for _ in range(iterations):
        codes = _assign(f, c)
        costs.append((error := _cost(f, own, codes, c)).sum())
        count = collect(codes, x.new_ones(t, n, 1), x.new_empty(t, 1, k, 1))[:, 0]
        empty = count == 0
        moved, lost = torch.stack([(codes != last).any(), empty.any()]).tolist()  # the only wait for a GPU
        if not moved:
            break
        last = codes
        sums = collect(codes, f, x.new_empty(t, 1, k, f.shape[-1]))[:, 0]
        mass = sums[..., w:].unflatten(-1, (w, w))
        scale = mass.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]
        # c moves by (sum A)^-1 (sum A (x - c)): members without cost, or along a direction without, pull none
        pull = sums[..., :w] - (mass @ c.unsqueeze(-1)).squeeze(-1)
        c = c + torch.linalg.solve(mass / scale + ridge, (pull / scale[..., 0]).unsqueeze(-1)).squeeze(-1)
        if lost:
            worst = error.argsort(dim=1, descending=True, stable=True)
            rank = (empty.long().cumsum(1) - 1).clamp(0, n - 1).squeeze(-1)
            c = torch.where(empty, x.gather(1, worst.gather(1, rank)[..., None].expand(-1, -1, w)), c)
    return c, torch.stack(costs).tolist()


def _features(x: Tensor, a: Tensor | None) -> Tensor:
    """(x A, A) of every vector, [T, N, w + w w]."""
    w = x.shape[-1]
    if a is None:
        a = torch.eye(w, dtype=x.dtype, device=x.device).expand(*x.shape, w)
    return torch.cat([(x.unsqueeze(-2) @ a).squeeze(-2), a.flatten(-2)], -1)


def _assign(f: Tensor, c: Tensor) -> Tensor:
    """Codes [T, N] of the entries c [T, K, w] of least cost for vectors of features f."""
    g = torch.cat([c, (c.unsqueeze(-1) * c.unsqueeze(-2)).flatten(-2) / -2], -1).mT
    parts = f.split(max(1, _SCORES // (len(f) * c.shape[1])), 1)
    return torch.cat([(part @ g).argmax(-1) for part in parts], 1)


def _cost(f: Tensor, own: Tensor, codes: Tensor, c: Tensor) -> Tensor:
    """(x - c) A (x - c)^T of each vector for its entry, [T, N]."""
    w = c.shape[-1]
    v = decode(codes, c.unsqueeze(1))
    return (
        own
        - 2 * (f[..., :w] * v).sum(-1)
        + (f[..., w:] * (v.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)).sum(-1)
    )
