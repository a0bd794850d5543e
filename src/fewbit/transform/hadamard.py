"""Hadamard maps of any size: the outliers of a few channels are spread over all, at n log n cost.

    x T = x diag(s) (H_K x ... x H_{2^k}) / sqrt(n),      n = K ... 2^k,  s random signs,  x: Kronecker

H has entries +-1 and H H^T = n I, so a channel of size a adds just a / sqrt(n) to each: QuIP#, Tseng et al.
2024, https://arxiv.org/abs/2402.04396, section 3; QuaRot, https://arxiv.org/abs/2404.00456. Orders are built,
not tabulated: Sylvester's doubling, and Paley's two constructions (1933) over GF(q), q a prime power, with
Q_ab = chi(a - b), chi the quadratic character:

    q = 3 mod 4:  H = I + [[0, 1], [-1, Q]], order q + 1
    q = 1 mod 4:  C = [[0, 1], [1, Q]],  H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], order 2 (q + 1)

An odd factor m that no such order covers gets the Hartley matrix, cos(2 pi ij / m) + sin(2 pi ij / m):
orthogonal too, but entries reach sqrt(2), so one outlier may stay 1.41 times as large.

Roads not taken: a random orthogonal factor (entries reach 4 at m = 107), and the butterfly, whose log2(n)
passes over memory lose to a few products with small matrices: both measured in benchmarks/hadamard.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.transform.maps import Map

_LARGEST = 1024  # the largest Paley order that is used as a factor: its product is dense
_PASS, _HARTLEY = 32, 4096  # what one product more, and an inexact factor, count in columns of a product
_TILE = 1 << 17  # elements that stay in a CPU's cache through all products


@dataclass(frozen=True)
class Hadamard(Map):
    """The orthonormal Hadamard map of any size; plain data that means one matrix on every device.

    seed: of random signs before the transform; None: no signs. block: size of the blocks (a head, HIGGS's
    groups) of a block-diagonal map; None: one. Raises ``InputError`` for sizes below 1 or that do not divide.
    """

    size: int
    seed: int | None = None
    block: int | None = None

    def __post_init__(self):
        block = self.size if self.block is None else self.block
        if self.size < 1 or block < 1 or self.size % block:
            raise InputError(
                f"a Hadamard map of size {self.size} in blocks of {block} is impossible; give a positive "
                "size and a block that divides it"
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Orders of the Kronecker factors of a block, the power of two last: (28, 512) for 14336."""
        n = self.block or self.size
        twos = n & -n
        odd = _cut(n // twos, twos.bit_length() - 1)[1]
        return (*sorted(odd, reverse=True), n // math.prod(odd))

    @property
    def exact(self) -> bool:
        """True when all entries are +-1 / sqrt(n) (or 0 between blocks), False with a Hartley factor."""
        return not any(f > 1 and f % 2 for f in self.factors)

    def __str__(self) -> str:
        """'Hadamard 13696 = 107 (Hartley, inexact: spreads outliers up to 1.41x less) x 128'."""
        hartley = " (Hartley, inexact: spreads outliers up to 1.41x less)"
        parts = " x ".join(f"{f}{hartley if f > 1 and f % 2 else ''}" for f in self.factors)
        blocks = f"{self.size // self.block} blocks of " if self.block else ""
        return f"Hadamard {self.size} = {blocks}{parts}{'' if self.seed is None else f', seed {self.seed}'}"

    def _apply(self, x):
        return self._rows(x, lambda t: self._kron(self._flip(t), forward=True))

    def _invert(self, x):
        return self._rows(x, lambda t: self._flip(self._kron(t, forward=False)))

    def _flip(self, x: Tensor) -> Tensor:
        return x if self.seed is None else x * _signs(self.size, self.seed, x.device, x.dtype)

    def _kron(self, x: Tensor, forward: bool) -> Tensor:
        """Rows [r, n] times the Kronecker product or its transpose: each factor acts on [-1, a, rest]."""
        shape, rest = x.shape, 1
        for a in reversed(_matrices(self.factors, x.device, x.dtype)):
            a = a if forward else a.T
            x = x.reshape(-1, len(a)) @ a if rest == 1 else a.T @ x.reshape(-1, len(a), rest)
            rest *= len(a)
        return x.reshape(shape)

    def _rows(self, x: Tensor, act) -> Tensor:
        """``act`` on rows; on a CPU a cacheful at a time, which halves the time of long rows."""
        rows, step = x.reshape(-1, self.size), max(1, _TILE // self.size)
        if x.device.type != "cpu" or len(rows) <= step or x.requires_grad:
            return act(rows).reshape(x.shape)
        out = torch.empty_like(rows)
        for i in range(0, len(rows), step):
            out[i : i + step] = act(rows[i : i + step])
        return out.reshape(x.shape)


def hadamard_matrix(order: int) -> Tensor:
    """H [order, order] float64 of +-1, H H^T = order I, for the orders of Sylvester and Paley (asserted)."""
    if order & (order - 1) == 0:
        two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        return functools.reduce(torch.kron, [two] * (order.bit_length() - 1), two.new_ones(1, 1))
    q, p, k = _paley(order)
    assert q, f"neither Sylvester nor Paley has order {order}"
    c = torch.ones(q + 1, q + 1, dtype=torch.float64)
    c[0, 0], c[1:, 1:] = 0, _characters(p, k)
    if order == q + 1:
        c[1:, 0] = -1
        return c + torch.eye(order)
    two = c.new_tensor([[1, 1], [1, -1]])
    return torch.kron(c, two) - torch.kron(torch.eye(q + 1), two.flip(0, 1))


def _paley(order: int) -> tuple[int, int, int]:
    """(q, p, k), q = p^k, whose Paley matrix has this order; zeros where there is none."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if order > 4 and order % 4 == 0 and q % 4 == residue:
            p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
            k = round(math.log(q, p))
            if p**k == q:
                return q, p, k
    return 0, 0, 0


def _characters(p: int, k: int) -> Tensor:
    """Q [q, q] float64, Q_ab = chi(a - b) over GF(q = p^k): 1 for squares, -1 for the others, 0 for zero.

    Elements are polynomials in x: k digits mod p. Of a primitive x^k = c_0 + c_1 x + ..., found by trial, the
    powers of x are all nonzero elements and the even powers are the squares.
    """
    for c in itertools.product(range(p), repeat=k):
        power, v = {}, (1, *[0] * (k - 1))
        while any(v) and v not in power:
            power[v] = len(power)
            v = tuple((a + v[-1] * b) % p for a, b in zip((0, *v[:-1]), c, strict=True))
        if len(power) == p**k - 1:
            break
    elements = list(itertools.product(range(p), repeat=k))  # in the order of their value in base p
    chi = torch.tensor([(-1) ** power[v] if any(v) else 0 for v in elements]).double()
    digits = torch.tensor(elements)
    return chi[((digits[:, None] - digits) % p * p ** torch.arange(k - 1, -1, -1)).sum(-1)]


@functools.lru_cache(maxsize=1024)
def _cut(odd: int, twos: int) -> tuple[int, tuple[int, ...]]:
    """Least (cost, orders) that cover ``odd`` with up to ``twos`` factors 2: Paley orders, or odd ones."""
    ways = [] if odd > 1 else [(0, ())]
    for f in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        orders = (f << a for a in range(2, twos + 1) if f << a <= _LARGEST and _paley(f << a)[0])
        order = next(orders, f)
        cost, others = _cut(odd // f, twos - (order // f).bit_length() + 1)
        ways.append((cost + order + (_HARTLEY if order == f else _PASS), (order, *others)))
    return min(ways)


@functools.lru_cache(maxsize=64)
def _matrices(factors: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Orthonormal matrices whose Kronecker product is that of ``factors``, its 2^k cut into parts of 8 to 64.

    Less than 8 is joined to the factor before: products with tiny matrices are slow.
    """
    *odd, last = factors
    k = last.bit_length() - 1
    parts = max(1, (k + 3) // 5)
    with torch.inference_mode(False), torch.no_grad():
        made = [_hartley(m) if m % 2 else hadamard_matrix(m) for m in odd]
        made += [hadamard_matrix(1 << (k + i) // parts) for i in range(parts)]
        if odd and k < 3:
            made[-2:] = [torch.kron(*made[-2:])]
        return tuple((m / math.sqrt(len(m))).to(device, dtype) for m in made)


def _hartley(m: int) -> Tensor:
    """cos + sin of 2 pi i j / m [m, m] float64: symmetric, and its square is m I."""
    i = torch.arange(m)
    angle = (i[:, None] * i % m).double() * (2 * math.pi / m)
    return angle.cos() + angle.sin()


@functools.lru_cache(maxsize=64)
def _signs(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n] of +-1, drawn on the CPU so that every device sees the same."""
    with torch.inference_mode(False):
        bits = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
        return (1 - 2 * bits).to(device, dtype)
