"""k-means: learned tables. One per row for scalars (SqueezeLLM, Deep Compression), one in all for vectors.

Per row, with sensitivities s (SqueezeLLM, https://arxiv.org/abs/2306.07629; s = 1 is Deep Compression's,
https://arxiv.org/abs/1510.00149):

    minimise  sum_j s_j (x_j - c_{k(j)})^2       over centroids c_1 <= ... <= c_k and codes k(j)

On a line clusters are intervals. So each row is sorted once; a Lloyd step finds the borders, the midpoints of
neighbouring centroids, by binary search and takes the means from prefix sums of s and s x (float64: s spans
many orders of magnitude): O(k log n) a row, all rows at once. Lloyd alone ends far from the optimum when s
does that. So in each step one centroid a row moves: the one whose cluster merges with its neighbour at the
least cost (an empty one: at none) goes where splitting a cluster gains most, if that gains more. The sum
never rises.

Shapes: x, weights [..., n]; centroids [..., k]; codes [..., n]; for vectors [n, p], [k, p], [n].

The road not taken: the exact optimum by dynamic programming, O(k n log n) a row and sequential. What is found
here lies about a twentieth above it (see the tests), and methods like SqueezeLLM's refit the table anyway.
"""

from enum import StrEnum

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.points import nearest

_ELEMENTS = 2**22  # of x, worked on at once: about 300 MB


class Start(StrEnum):
    """Where the centroids of `kmeans` begin. Both are deterministic and end near the same sum."""

    SPLIT = "split"  # one cluster; then the one of largest error is split at its mean, until there are k
    LINEAR = "linear"  # evenly from the smallest to the largest value, as Deep Compression prefers


def kmeans(
    x: Tensor, k: int, *, weights: Tensor | None = None, iterations: int = 50, start: Start = Start.SPLIT
) -> tuple[Tensor, Tensor]:
    """Tables of k values for the rows of x [..., n], any floating dtype, and the codes of x in them.

    ``weights``: >= 0, broadcasts to x; a row of zeros counts as a row of ones, and what has weight 0 does not
    pull a centroid but gets the code of the nearest. Returns centroids [..., k] float32 ascending and codes
    [..., n] uint8, or int32 for k > 256. A row of at most k distinct weighted values is held exactly, its
    last value repeated. The same input gives the same result.

    Raises InputError for NaN or Inf, an empty row, negative weights, weights that do not broadcast, k < 1.
    """
    x, weights = _checked(x, k, weights)
    rows = x.reshape(-1, x.shape[-1])
    s = rows.new_ones(()).expand_as(rows) if weights is None else weights.expand_as(x).reshape_as(rows)
    step = max(1, _ELEMENTS // x.shape[-1])
    parts = [
        _rows(a, b, k, iterations, Start(start)) for a, b in zip(rows.split(step), s.split(step), strict=True)
    ]
    centroids, codes = (torch.cat(each) for each in zip(*parts, strict=True))
    return centroids.view(*x.shape[:-1], k), codes.view(x.shape)


def _rows(x: Tensor, s: Tensor, k: int, iterations: int, start: Start) -> tuple[Tensor, Tensor]:
    """`kmeans` of a part of the rows [R, n]."""
    s = s.double()
    peak, heaviest = s.max(1, keepdim=True)
    s = torch.where(peak > 0, s / peak, 1.0)
    # What has no weight takes the place of something that has, so that it neither starts nor ends a cluster.
    v, order = torch.where(s > 0, x, x.gather(1, heaviest)).double().sort(1)
    s = s.gather(1, order)
    sums = torch.stack([_prefix(s), _prefix(s * v), _prefix(s * v * v)])
    c = _start(v, sums, k, start)
    last = None
    for _ in range(iterations):
        border = _border(v, c)
        if last is not None and torch.equal(border, last):
            break
        last = border
        c = _move(v, sums, border, _mean(v, sums, border[:, :-1], border[:, 1:], c))
    c = _exact(c, v)
    middle = c.float().double()
    codes = torch.searchsorted((middle[:, 1:] + middle[:, :-1]) / 2, x.double())
    return c.float(), codes.to(torch.uint8 if k <= 256 else torch.int32)


def _prefix(terms: Tensor) -> Tensor:
    """[R, n + 1] sums of the first 0..n terms [R, n]."""
    return torch.nn.functional.pad(terms.cumsum(1), (1, 0))


def _border(v: Tensor, c: Tensor) -> Tensor:
    """[R, k + 1] where the clusters of ascending centroids c begin and end in the sorted rows v."""
    inner = torch.searchsorted(v, (c[:, 1:] + c[:, :-1]) / 2, right=True)
    ends = inner.new_tensor([0, v.shape[1]]).expand(len(v), 2)
    return torch.cat([ends[:, :1], inner, ends[:, 1:]], 1)


def _mean(v: Tensor, sums: Tensor, low: Tensor, high: Tensor, otherwise: Tensor) -> Tensor:
    """Weighted means of v[low:high]; ``otherwise`` where that is empty.

    Its ends bound a mean, which the rounding of the prefix sums would move out of a cluster of tiny weight.
    """
    mass, moment = (total.gather(1, high) - total.gather(1, low) for total in sums[:2])
    first, end = v.gather(1, low.clamp(max=v.shape[1] - 1)), v.gather(1, (high - 1).clamp(min=0))
    return torch.where(mass > 0, (moment / mass).minimum(end).maximum(first), otherwise)


def _start(v: Tensor, sums: Tensor, k: int, start: Start) -> Tensor:
    """[R, k] first centroids of sorted rows v [R, n], ascending."""
    if start is Start.LINEAR:
        at = torch.linspace(0, 1, k, dtype=v.dtype, device=v.device)
        return v[:, :1] + (v[:, -1:] - v[:, :1]) * at
    border = torch.tensor([[0, v.shape[1]]], device=v.device).expand(len(v), 2)
    while True:
        c = _mean(v, sums, border[:, :-1], border[:, 1:], v[:, -1:])
        if c.shape[1] == k:
            return c.sort(1)[0]
        _, m1, m2 = (total.gather(1, border).diff(dim=1) for total in sums)
        worst = (m2 - m1 * c).argmax(1, keepdim=True)
        cut = torch.searchsorted(v, c.gather(1, worst), right=True)
        border = torch.cat([border, cut], 1).sort(1)[0]


def _move(v: Tensor, sums: Tensor, border: Tensor, c: Tensor) -> Tensor:
    """Centroids c [R, k], one of each row moved where that lowers the sum, ascending.

    Merging neighbours of masses a and b raises the sum by a b / (a + b) (c - c')^2, nothing if one is empty;
    splitting a cluster at its mean lowers it by the same form of its halves.
    """
    k = c.shape[1]
    if k < 3:
        return c
    low, high = border[:, :-1], border[:, 1:]
    mass = sums[0].gather(1, border).diff(dim=1)
    cut = torch.searchsorted(v, c, right=True).maximum(low).minimum(high)
    left, right = _mean(v, sums, low, cut, c), _mean(v, sums, cut, high, c)
    part = sums[0].gather(1, cut) - sums[0].gather(1, low)
    gain = _spread(part, mass - part, left, right)
    cost, lost = _spread(mass[:, :-1], mass[:, 1:], c[:, :-1], c[:, 1:]).min(1, keepdim=True)
    gain = gain.scatter(1, lost, -1.0).scatter(1, lost + 1, -1.0)
    gain, split = gain.max(1, keepdim=True)
    ends = border.gather(1, lost), border.gather(1, lost + 2)
    moved = c.scatter(1, lost, _mean(v, sums, *ends, c.gather(1, lost)))
    moved = moved.scatter(1, split, left.gather(1, split)).scatter(1, lost + 1, right.gather(1, split))
    return torch.where(gain > cost * (1 + 1e-9), moved, c).sort(1)[0]


def _spread(a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """a b / (a + b) (left - right)^2, zero where a mass is."""
    return torch.where((a > 0) & (b > 0), a * b / (a + b) * (left - right) ** 2, 0.0)


def _exact(c: Tensor, v: Tensor) -> Tensor:
    """Centroids, those of rows with at most k distinct values replaced by these values."""
    new = v[:, 1:] != v[:, :-1]
    few = new.sum(1) < c.shape[1]
    if bool(few.any()):
        rank = torch.nn.functional.pad(new[few].long().cumsum(1), (1, 0))
        c = c.clone()
        c[few] = v[few][:, -1:].repeat(1, c.shape[1]).scatter(1, rank, v[few])
    return c


def kmeans_vectors(
    x: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """k points for the rows of x [n, p] by Lloyd's iteration, minimising sum_j s_j |x_j - c_{k(j)}|^2.

    Starts from k rows that ``generator`` (on the CPU; none: seed 0) picks without regard to weight.
    ``weights`` [n] >= 0. Returns centroids [k, p] float32 and codes [n] int64. A centroid that lost its
    members moves to the row with the largest error. Raises InputError as `kmeans` does, and for
    fewer than k rows.
    """
    if x.ndim != 2 or len(x) < k:
        raise InputError(f"k-means of vectors needs [n, p] with n >= k = {k} rows, got {list(x.shape)}")
    x, _ = _checked(x, k, None)
    x = x.float()
    s = x.new_ones(len(x)) if weights is None else _checked(x.T, k, weights)[1].float().expand(len(x))
    s = s if bool(s.any()) else torch.ones_like(s)
    pick = torch.randperm(len(x), generator=generator or torch.Generator().manual_seed(0))[:k]
    c = x[pick.to(x.device)]
    codes = nearest(x, c)
    for _ in range(iterations):
        mass = x.new_zeros(k, dtype=torch.float64).index_add_(0, codes, s.double())
        total = c.double().new_zeros(c.shape).index_add_(0, codes, (s[:, None] * x).double())
        empty = mass <= 0
        c = torch.where(empty[:, None], c, (total / mass[:, None]).float())
        if lost := int(empty.sum()):
            error = s * (x - c[codes]).square().sum(1)
            c[empty] = x[error.topk(lost).indices]
        last, codes = codes, nearest(x, c)
        if torch.equal(codes, last):
            break
    return c, codes


def _checked(x: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x as float32 or float64 and the weights on its device; InputError where k-means has no answer."""
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k-means needs at least one centroid, got k = {k!r}")
    if x.ndim == 0 or x.numel() == 0:
        raise InputError(f"k-means needs at least one number to fit, got shape {list(x.shape)}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if not bool(x.isfinite().all()):
        raise InputError("k-means got NaN or Inf; take them out, or give finite values with weight 0")
    if weights is None:
        return x, None
    weights = weights.detach().to(x.device)
    try:
        fits = torch.broadcast_shapes(weights.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(f"weights of shape {list(weights.shape)} do not broadcast to {list(x.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise InputError("weights of k-means must be finite and not negative")
    return x, weights
