"""Rotations of the residual stream, folded block by block.

    x <- x Q    norms: gain 1    readers W <- W diag(gain) Q    writers W <- Q^T W, b <- b Q       (Q^T Q = I)

A norm without a gain commutes with Q, so the whole stream can live in a basis in which no channel stands out,
at no cost at run time: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 4, stage 1a.

Who reads and who writes is found by running the block once: a norm of the stream hands the very tensor it
returns to linears, its readers; a writer's output plus d moves the stream by a multiple of d. Whatever else
is in a block (a multiplier, a router, a fused expert) commutes with Q or not: the rotated block must give
block(x) Q at x Q, else it is put back and the first place where the stream is lost is named.

LayerNorm subtracts the mean, which a Q with 1 Q = 1 leaves alone: `Centred` makes one of any orthogonal map.
Road not taken: subtracting the mean in all writers and putting RMSNorm in LayerNorm's place (SliceGPT,
Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024): the checkpoint would fit no engine's model class.

Shapes: n channels of the stream; x [..., n]; weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import linears, set_weight, weight_of
from fewbit.nn.linear import transform_input
from fewbit.seams.norms import absorb, form_of
from fewbit.seams.trial import SAME, change, first, tolerance
from fewbit.transform import Map

REMEDY = "leave rotations out of the recipe for this model"


@dataclass(frozen=True)
class Centred(Map):
    """An orthogonal ``base`` and then the reflection that brings 1 base back to 1: the mean stays.

    A rank of one more: the entries of a Hadamard map stay near 1 / sqrt(n).
    """

    base: Map

    @property
    def size(self) -> int:
        return self.base.size

    def _apply(self, x):
        return self._reflect(self.base._apply(x))

    def _invert(self, x):
        return self.base._invert(self._reflect(x))

    def _reflect(self, x: Tensor) -> Tensor:
        ones = x.new_ones(self.size)
        v = self.base._apply(ones) - ones
        return x - (x @ v)[..., None] * (v * (2 / v.square().sum().clamp(min=1e-12)))


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm that reads the stream, and the linears that get its output. Names are relative to the block."""

    name: str
    readers: tuple[str, ...]
    centred: bool


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Who touches the residual stream of ``size`` channels in one block."""

    size: int
    norms: tuple[Norm, ...]
    writers: tuple[str, ...]

    @property
    def centred(self) -> bool:
        """Whether a norm subtracts the mean, so that only a `Centred` map will do."""
        return any(norm.centred for norm in self.norms)


@torch.no_grad()
def find_residual(block: nn.Module, call: Callable[[], object]) -> Residual:
    """Norms, readers and writers of ``block``; ``call`` runs it once on a few tokens, at least two.

    One run more for each linear that might be a writer. Raises ``InputError``, with the module's name, where
    a norm stands behind a writer or at the block's end or hands on to no linear, and where nothing is found.
    """
    seen, x, y = _trace(block, call)
    kind, size = type(block).__name__, x.shape[-1]
    modules = linears(block)
    forms = {
        n: form
        for n, (a, b) in seen.items()
        if n not in modules and a.shape == b.shape and b.shape[-1] == size
        if (form := form_of(block.get_submodule(n), size))
    }
    behind = "so its gain stands in the way of a rotation; " + REMEDY
    for name in forms:
        if _same(seen[name][1], y):
            raise InputError(f"{name} of {kind} norms what the block returns, {behind}")
    norms = []
    for name, form in forms.items():
        readers = tuple(n for n in modules if n in seen and _same(seen[n][0], seen[name][1]))
        if readers:
            norms.append(Norm(name=name, readers=readers, centred=form.centred))
    names = tuple(norm.name for norm in norms)
    base, writers = _points(block, call, names), []
    for name in (n for n in (*modules, *forms) if n not in names and n in seen):
        if seen[name][1].shape[-1] == size and _adds(block, call, name, base):
            if name in forms:
                raise InputError(f"{name} of {kind} norms what is added to the residual stream, {behind}")
            writers.append(name)
    for name in (n for n in forms if n not in names):  # norms of queries and keys get what a linear returned
        if not any(_same(seen[name][0], seen[n][1]) for n in modules if n in seen):
            raise InputError(
                f"no linear reads what {name} of {kind} returns (a router or fused experts do), so the "
                f"rotation of the residual stream cannot be folded behind it; {REMEDY}"
            )
    if not norms or not writers:
        raise InputError(
            f"{kind} has {len(norms)} norms that hand a residual stream of {size} channels to linears and "
            f"{len(writers)} linears that write to it, so there is nothing to rotate; {REMEDY}"
        )
    return Residual(size=size, norms=tuple(norms), writers=tuple(writers))


@torch.no_grad()
def fold_gains(block: nn.Module, residual: Residual) -> None:
    """Gains (and biases, where all readers have one) of the norms into their readers, W diag(gain)."""
    for norm in residual.norms:
        absorb(block.get_submodule(norm.name), norm.name, [block.get_submodule(r) for r in norm.readers])


@torch.no_grad()
def rotate(block: nn.Module, residual: Residual, q: Map) -> None:
    """Gains folded and the block moved to the basis x ``q``, in float64, rounded once to each weight's dtype.

    Raises ``InputError`` when q has another size, or a LayerNorm reads the stream and q moves the mean.
    """
    check_map(q, residual.size, residual.centred)
    for norm in residual.norms:
        readers = [block.get_submodule(r) for r in norm.readers]
        absorb(block.get_submodule(norm.name), norm.name, readers, q)
    for name in residual.writers:
        module = block.get_submodule(name)
        set_weight(module, q.apply(weight_of(module).double(), 0))
        if module.bias is not None:
            module.bias.copy_(q.apply(module.bias.double()))


@torch.no_grad()
def rotate_checked(block: nn.Module, residual: Residual, q: Map, call: Callable[[], object]) -> None:
    """`rotate`, and proof: at inputs x q the block must return what it returned at x, times q, to 1e-4.

    ``call`` runs the block as it is, on any x. Otherwise the block is put back and ``InputError`` names the
    first norm that the rotated stream does not reach. Half precision is compared to within its rounding.
    """
    names = tuple(norm.name for norm in residual.norms)
    before = _points(block, call, names)
    with restored(block):
        rotate(block, residual, q)
        undo = transform_input(block, q.apply)
        try:
            after = _points(block, call, names)
        finally:
            undo()
        for name, x in before.items():
            changed = change(q.apply(x), after[name])
            if not changed < tolerance(x.dtype):
                place = f"reaches {name}" if name else "leaves the block"
                raise InputError(
                    f"what {place} of {type(block).__name__} is not the rotated residual stream (relative "
                    f"difference {changed:.1e}), as something before it does not commute with a rotation; "
                    f"{REMEDY}"
                )


def check_map(q: Map, size: int, centred: bool) -> None:
    """Raise ``InputError`` unless ``q`` can rotate a stream of ``size`` channels (centred: for LayerNorm)."""
    if q.size != size:
        raise InputError(f"{q} does not fit a residual stream of {size} channels; give a map of that size")
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if change(q.apply(x), q.dual(x)) > SAME:
        raise InputError(f"{q} is not orthogonal, and no norm commutes with it; give a Hadamard map")
    ones = torch.ones_like(x)
    if centred and change(ones, q.apply(ones)) > SAME:
        raise InputError(f"a LayerNorm subtracts the mean, which {q} moves; give Centred({q})")


@contextmanager
def restored(module: nn.Module):
    """Parameters of ``module`` come back when the body raises; they are held twice meanwhile."""
    kept = [(p, p.detach().clone()) for p in module.parameters()]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for p, old in kept:
                p.copy_(old)
        raise


def _trace(block: nn.Module, call) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Input and output of each leaf that maps one tensor to one, in call order; those of the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    whole: list[Tensor] = []

    def note(name):
        def hook(module, args, kwargs, out):
            given = [*args, *kwargs.values()]
            if not name:
                whole.extend((given[0], first(out)))
            elif len(given) == 1 and isinstance(given[0], Tensor) and isinstance(out, Tensor):
                seen.setdefault(name, (given[0], out))

        return hook

    leaves = {n: m for n, m in block.named_modules() if not n or not any(m.children())}
    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in leaves.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen, *whole[:2]


def _points(block: nn.Module, call, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Copies of the stream [tokens, n] where the named norms read it, in call order, and at the end ("")."""
    points: dict[str, Tensor] = {}

    def note(name, x):
        if name not in points:  # a copy: models add to the stream in place
            points[name] = x.flatten(0, -2).clone()

    handles = [
        block.get_submodule(n).register_forward_pre_hook(
            lambda m, args, kwargs, n=n: note(n, args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
        for n in names
    ]
    handles.append(block.register_forward_hook(lambda m, args, out: note("", first(out))))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return points


def _adds(block: nn.Module, call, name: str, base: dict[str, Tensor]) -> bool:
    """Whether d on the output of ``name`` moves the stream by c d, c a number, where it first moves."""
    added: list[Tensor] = []

    def add(module, args, out):
        d = torch.randn(out.shape, generator=torch.Generator().manual_seed(len(added))).to(out)
        added.append(d * base[""].float().square().mean().sqrt().to(out))
        return out + added[-1]

    handle = block.get_submodule(name).register_forward_hook(add)
    try:
        moved = _points(block, call, tuple(n for n in base if n))
    finally:
        handle.remove()
    d = added[0].flatten(0, -2).double()
    for point, x in base.items():
        by = moved[point].double() - x.double()
        if by.norm() > SAME * d.norm():
            if by.shape != d.shape:
                return False
            c = (by * d).sum() / d.square().sum()
            return bool((by - c * d).norm() <= max(10 * SAME, tolerance(x.dtype)) * by.norm())
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or views of one."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
