"""The mean of a gradient over ranks, in 8 bits on the wire: one shared step, and the factor mu.

Peng et al. 2023, "FP8-LM: Training FP8 Large Language Models", https://arxiv.org/abs/2310.18313, section 2.1.
With W ranks, local gradients g_i and E4M3 (largest value F = 448):

    s_i = F / max|g_i|, down to a power of two      a scale multiplies: q = s g; the steps here are 1 / s
    s_g = min_i s_i                                 one all-reduce of a vector, a number for each tensor
    q_i = FP8(mu s_g g_i)                           the same multiplier on all ranks
    S   = FP8(sum_i q_i)                            saturates at +-F
    g   = S / (mu s_g W)                            only the scale is edited
    r   = share of entries of S at +-F              equal on all ranks, for S is
    mu <- mu / 2 where r > 0.001 %, else mu 2^(1/1000)

To divide by W before the sum underflows, to divide after it overflows; mu lies between and is found as
training goes. It must stand outside the scale: a scale taken from max|mu g| cancels it. With mu <= 1 no rank
clips what it sends, and only the sum can saturate, so that is where entries are counted.

Bytes travel as uint8, because gloo has no FP8 type. Three ways there, the first two with the same result:

    GATHER      all-gather of q, every rank sums all          (W - 1) n bytes sent by a rank, one step
    TWO_PHASE   all-to-all of q; the owner of a part sums     2 (W - 1) n / W, half of bfloat16's for any W
                and rounds S once; all-gather of S
    NATIVE      an FP8 sum of the backend (NCCL 2.24 and      2 (W - 1) n / W, but partial sums are rounded
                newer), where `native_sum` found it works     to FP8 on their way

Decoded values are whole multiples of 2^-9 below 449, so up to 64 ranks the local float32 sum of E4M3 is exact
and S is the exact sum, rounded once, whatever the order.

Shapes: n numbers of a tensor, k tensors; amax, steps, mu [k].
Road not taken: a sum with a scale for each rank (dequantize, add). It needs no agreement and no mu, but its
result is wide, and only a gather can carry it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import FP32, Format, Params, PerTensor, QTensor, value_of
from fewbit.format.affine import raw_step
from fewbit.train.distributed.wire import all_gather
from fewbit.train.folded import Folded
from fewbit.train.gradients import wide
from fewbit.train.states import one_step

E4M3, E5M2 = one_step("e4m3fn"), one_step("e5m2")  # the least power of two with which nothing is clipped


class Road(StrEnum):
    """How bytes reach the other ranks; see the head of the file."""

    GATHER = "gather"
    TWO_PHASE = "two-phase"
    NATIVE = "native"

    @classmethod
    def best(cls, world: int) -> Road:
        """The road with the fewest bytes, then the fewest steps: two ranks gather, more take two phases."""
        return cls.GATHER if world <= 2 else cls.TWO_PHASE


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The rule of mu. initial: its start, 1 / sqrt(W) where None; threshold: the share of saturated entries
    that halves it; window: clean steps in which it doubles; most: above 1 single ranks would clip.
    """

    initial: float | None = None
    threshold: float = 1e-5
    window: int = 1000
    most: float = 1.0

    def __post_init__(self):
        start = self.most if self.initial is None else self.initial
        if not (0 < start <= self.most < math.inf and 0 <= self.threshold < 1 and self.window >= 1):
            raise InputError(
                f"mu from {self.initial} up to {self.most}, halved above a share of {self.threshold}, "
                f"doubled in {self.window} steps is no rule; take 0 < initial <= most, a threshold in "
                "[0, 1) and a window of 1 or more"
            )

    def start(self, k: int, world: int, device: torch.device | str = "cpu") -> Tensor:
        """mu of ``k`` tensors before the first step, [k] float64."""
        first = min(self.most, 1 / math.sqrt(world)) if self.initial is None else self.initial
        return torch.full((k,), first, dtype=torch.float64, device=device)

    def next(self, mu: Tensor, share: Tensor) -> Tensor:
        """mu after a step in which a ``share`` [k] of S was at the ends; where that is NaN mu stays."""
        grown = (mu * 2 ** (1 / self.window)).clamp(max=self.most)
        return torch.where(share > self.threshold, mu / 2, torch.where(share.isnan(), mu, grown))


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What all ranks hold alike after `mean`.

    tensors: means over the ranks, QTensors of the sum's codes and a float32 step. share: [k] float64, share
    of entries of each sum that is saturated, NaN for a tensor that was NaN or Inf on some rank; such a tensor
    decodes to NaN everywhere. finite: bool [].
    """

    tensors: list[QTensor]
    share: Tensor
    finite: Tensor


def shared_amax(tensors: Sequence[Tensor | QTensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Largest magnitude of each tensor over all ranks, [k] float32, in one collective.

    Inf where any rank holds NaN or Inf: a MAX may lose a NaN, so NaN is sent as Inf.
    """
    local = torch.stack([_amax(t) for t in tensors])
    local = torch.where(local.isnan(), math.inf, local)
    dist.all_reduce(local, dist.ReduceOp.MAX, group=group)
    return local


def shared_steps(amax: Tensor, fmt: Format = E4M3) -> Tensor:
    """Steps of tensors of largest magnitudes ``amax`` [k], as ``fmt`` stores them, [k] float32."""
    finite = amax.nan_to_num()
    return value_of(fmt.store(raw_step(fmt, *fmt.range(finite.unsqueeze(-1), fmt, None)), finite)).float()


@torch.no_grad()
def mean(
    tensors: Sequence[Tensor | QTensor],
    mu: Tensor,
    *,
    fmt: Format = E4M3,
    road: Road | None = None,
    group: dist.ProcessGroup | None = None,
) -> Reduced:
    """Means over the ranks of ``tensors`` (float of any shapes, or QTensors), the same bits on every rank.

    mu: [k] float64, equal on all ranks. fmt: an 8-bit float with one step for a tensor. road: None takes the
    best for this group. Tensors must come in the same order on all ranks. Raises ``InputError`` for another
    kind of format, and for the native road where the backend has no FP8 sum.
    """
    check(fmt)
    world = dist.get_world_size(group)
    road = Road.best(world) if road is None else road
    amax = shared_amax(tensors, group)
    unit = (shared_steps(amax, fmt).double() / mu).float()
    codes = [
        fmt.encode(wide(t), Params(scale=s, zero=None)).codes.view(torch.uint8).reshape(-1)
        for t, s in zip(tensors, unit, strict=True)
    ]
    total = summed(torch.cat(codes), fmt, road, group)
    sizes = [len(c) for c in codes]
    top = fmt.grid.value(total).abs() >= fmt.grid.max
    share = torch.stack([part.double().mean() for part in top.split(sizes)])
    bad = ~amax.isfinite()
    steps = torch.where(bad, math.nan, unit / world)
    means = [
        QTensor(codes=c.view(t.shape), scale=s, zero=None, format=fmt, shape=t.shape)
        for c, s, t in zip(total.split(sizes), steps, tensors, strict=True)
    ]
    return Reduced(tensors=means, share=torch.where(bad, math.nan, share), finite=~bad.any())


def summed(codes: Tensor, fmt: Format, road: Road, group: dist.ProcessGroup | None = None) -> Tensor:
    """Codes of the sum over ranks of ``codes`` [n] uint8 at one common step, rounded and saturated once."""
    grid, world = fmt.grid, dist.get_world_size(group)
    if road is Road.NATIVE:
        if not native_sum(codes.device, grid.torch_dtype, group):
            raise InputError(
                f"the backend {dist.get_backend(group)!r} has no working sum of {grid.name}; take "
                "Road.TWO_PHASE, which sends as many bytes"
            )
        total = codes.view(grid.torch_dtype).clone()
        dist.all_reduce(total, group=group)
        return total.view(torch.uint8)
    if road is Road.GATHER:
        rows = codes.new_empty(world, len(codes))
        all_gather(rows.view(-1), codes, group=group)
        return grid.round(_sum(rows, fmt)).view(torch.uint8)
    part = -(-len(codes) // world)
    padded = torch.nn.functional.pad(codes, (0, part * world - len(codes)))  # byte 0 is the number 0
    rows, whole = torch.empty_like(padded), torch.empty_like(padded)
    dist.all_to_all_single(rows, padded, group=group)
    mine = grid.round(_sum(rows.view(world, part), fmt)).view(torch.uint8)
    all_gather(whole, mine, group=group)
    return whole[: len(codes)]


def native_sum(
    device: torch.device, dtype: torch.dtype = torch.float8_e4m3fn, group: dist.ProcessGroup | None = None
) -> bool:
    """True where the backend adds ``dtype`` as needed here: found by adding known numbers, not by version.

    Asked once for a group; all ranks must ask together, and get the same answer.
    """
    pg = dist.group.WORLD if group is None else group
    key = (pg.group_name, device.type, dtype)
    if key not in _PROBED:
        _PROBED[key] = _probe(device, dtype, pg)
    return _PROBED[key]


_PROBED: dict[tuple, bool] = {}


def _probe(device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup) -> bool:
    top, rank, world = torch.finfo(dtype).max, dist.get_rank(group), dist.get_world_size(group)
    first = float(rank == 0)
    given = torch.tensor([top, -top, first * top, 1.5 * first, -first * 2.0**-9, 0.0], device=device)
    wanted = torch.tensor([top, -top, top, 1.5, -(2.0**-9), 0.0], device=device)
    got = given.to(dtype)
    try:
        dist.all_reduce(got, group=group)
        works = world == 1 or torch.equal(got.float(), wanted)
    except (RuntimeError, TypeError, ValueError):  # as gloo and NCCL before 2.24 refuse the type
        works = False
    verdict = torch.tensor([int(works)], dtype=torch.int32, device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)
    return bool(verdict.item())


def exchangeable(fmt: Format) -> bool:
    """True for an 8-bit float with one float32 step for a tensor."""
    eight = getattr(fmt.grid, "torch_dtype", None) is not None and fmt.grid.bits == 8
    return eight and isinstance(fmt.block, PerTensor) and fmt.scale == FP32 and fmt.symmetric


def check(fmt: Format) -> None:
    """Raise ``InputError`` unless ``fmt`` is `exchangeable`."""
    if not exchangeable(fmt):
        raise InputError(
            f"ranks exchange 8-bit floats with one float32 step for a tensor, got {fmt}; use E4M3 or E5M2 of "
            "fewbit.train.distributed"
        )


def own_format(layer: nn.Module, product: str, side: str) -> Format | None:
    """The format in which ``layer`` rounds an operand itself, where ranks can exchange it; else None.

    product, side: fields of `Products` and `Product`. `Folded` layers with a step per row have none.
    """
    products = getattr(layer, "products", None)
    if isinstance(products, Folded):
        gradient = (product, side) == ("input_gradient", "left") and products.gradient == torch.float8_e5m2
        return None if products.by_rows else E5M2 if gradient else E4M3
    own = None if products is None else getattr(getattr(products, product), side)
    return own if own is not None and exchangeable(own) else None


def _amax(t: Tensor | QTensor) -> Tensor:
    values = wide(t)
    if not values.numel():
        return values.new_zeros(())
    return torch.linalg.vector_norm(values, math.inf)


def _sum(rows: Tensor, fmt: Format) -> Tensor:
    """Rows of codes [W, n] -> their sum in steps, [n] float32, rank after rank."""
    total = torch.zeros(rows.shape[1], device=rows.device)
    for row in rows:
        total += fmt.grid.value(row)
    return total
