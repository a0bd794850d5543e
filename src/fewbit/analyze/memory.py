"""How much memory a model takes to run, in every number format, before anything is downloaded.

    weights      sum over linears of bits_per_weight(shape) * out * in / 8  +  everything else in 16 bits
    cache        batch * sum over layers of (key + value) * min(context, window - 1) * bits / 8
    activations  2 bytes * batch * context * max(MLP, attention)  +  6 bytes * batch * vocabulary
                 MLP        4 h + 3 f (gated: both branches and their product), 4 h + 2 f (plain)
                 attention  3 h + 4 q + k + v (queries three times more while rotary embedding turns them)

h residual stream (embeddings, input of the block, sum after attention, and that normalised: transformers
holds on to all four), f hidden layer of the MLP, q, k, v elements per token of queries, keys, values.
Activations are those of a prefill of the whole context in one piece with an attention that never stores its
scores (FlashAttention: Dao et al. 2022, https://arxiv.org/abs/2205.14135), in one block at a time, and logits
of the last token alone, in 16 bits and in float32. An engine that cuts the prefill into pieces needs less, an
evaluation that wants all logits needs more. In the scheme fp32, cache and activations are in 32 bits too.

Road not taken: "parameters x bits / 8". Embeddings, head and norms stay in 16 bits, and scales cost bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fewbit.analyze.anatomy import Anatomy
from fewbit.analyze.gpus import Gpu, holding
from fewbit.errors import InputError
from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    FP16,
    FP32,
    Channel,
    Format,
    Group,
    PerTensor,
    Zero,
)
from fewbit.format.named import FORMATS
from fewbit.grid import by_name

_GROUPS = (128, 64, 32, 16, 8)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a model is stored in: ``weight`` for the linears of its blocks, ``rest`` for everything else.

    ``groups``: sizes the groups may have instead, largest first, where the format leaves the size open.
    """

    name: str
    weight: Format
    rest: Format = BF16
    groups: tuple[int, ...] = ()


def _grouped(name: str, grid: str, size: int, *, zero: Zero = Zero.NONE, scale: Format = BF16) -> Scheme:
    """Groups of ``size``, or of the next smaller power of two that divides."""
    weight = Format(grid=by_name(grid), block=Group(size), zero=zero, scale=scale)
    return Scheme(name=name, weight=weight, groups=tuple(g for g in _GROUPS if g <= size))


def _rows(name: str, grid: str) -> Scheme:
    """One scale per output channel."""
    return Scheme(name=name, weight=Format(grid=by_name(grid), block=Channel(), scale=BF16))


SCHEMES: tuple[Scheme, ...] = (
    Scheme(name="fp32", weight=FP32, rest=FP32),
    Scheme(name="bf16", weight=BF16),
    Scheme(name="fp16", weight=FP16, rest=FP16),
    _rows("int8 W8A16 per channel", "int8"),
    _rows("fp8 E4M3 per channel", "e4m3fn"),
    Scheme(name="mxfp8", weight=FORMATS["mxfp8-e4m3"]),
    Scheme(name="mxfp6", weight=FORMATS["mxfp6-e2m3"]),
    Scheme(name="nvfp4", weight=FORMATS["nvfp4"]),
    Scheme(name="mxfp4", weight=FORMATS["mxfp4"]),
    _grouped("W4A16 g{} asymmetric", "int4", 128, zero=Zero.INTEGER),
    _grouped("nf4 g{} double quantization", "nf4", 64, scale=DOUBLE_QUANT),
    _grouped("W4A16 g{} symmetric", "int4", 128),
    _grouped("W3A16 g{} symmetric", "int3", 128),
    _grouped("W2A16 g{} asymmetric", "int2", 64, zero=Zero.INTEGER),
)
"""From wide to narrow. ``{}`` in a name is the group size that divides the model's layers."""

CACHES: tuple[tuple[str, Format], ...] = (
    ("bf16", BF16),
    ("fp8 per tensor", Format(grid=by_name("e4m3fn"), block=PerTensor(), scale=FP32)),
    ("int4 per token and head", Format(grid=by_name("uint4"), block=Channel(), zero=Zero.OFFSET, scale=FP16)),
)
"""What keys and values can be kept in; one step and offset for a token's head in the last one."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights in one scheme: bytes in all, stored bits per weight of the quantized layers.

    ``nbytes`` and ``bits`` are None, and ``note`` says why, where the format's blocks do not divide a layer;
    ``note`` also names a group size that was taken instead.
    """

    scheme: str
    format: Format
    bits: float | None
    nbytes: int | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Bytes to run a model stored in one scheme, and the GPUs that hold the total beside their reserve."""

    weights: Weights
    cache: int | None
    activations: int | None
    total: int | None
    gpus: tuple[Gpu, ...]


def check_load(model: Anatomy, context: int, batch: int) -> str:
    """A sentence to mind about ``context`` tokens in each of ``batch`` sequences, or "".

    Raises ``InputError`` for a number that is not positive.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise InputError(f"--{name} {value} is not a positive number; give 1 or more")
    if model.longest and context > model.longest:
        return f"the model was made for at most {model.longest:,} tokens of context, not {context:,}"
    return ""


def weights(model: Anatomy, scheme: Scheme) -> Weights:
    """What the checkpoint of ``model`` in ``scheme`` weighs, without the headers of its files."""
    fitted, note = _fit(scheme, {shape[1] for shape in model.linears})
    name = scheme.name.format(getattr((fitted or scheme.weight).block, "size", 0))
    if fitted is None:
        return Weights(scheme=name, format=scheme.weight, bits=None, nbytes=None, note=note)
    coded = sum(_bits(fitted, shape) for shape in model.linears)
    nbytes = math.ceil(coded / 8 + model.rest * scheme.rest.grid.bits / 8)
    bits = coded / model.linear_parameters
    return Weights(scheme=name, format=fitted, bits=bits, nbytes=nbytes, note=note)


def _bits(format: Format, shape: tuple[int, ...]) -> float:
    return format.bits_per_weight(shape) * math.prod(shape)


def _fit(scheme: Scheme, columns: Iterable[int]) -> tuple[Format | None, str]:
    """The scheme's Format with a group size that divides all ``columns``, and what is to be said about it."""
    block = scheme.weight.block
    if not isinstance(block, Group):
        return scheme.weight, ""
    odd = next((n for n in sorted(columns) if n % block.size), None)
    if odd is None:
        return scheme.weight, ""
    for size in scheme.groups:
        if all(n % size == 0 for n in columns):
            said = f"groups of {size}, because {block.size} does not divide {odd} input columns"
            return replace(scheme.weight, block=Group(size)), said
    return None, f"not possible, because blocks of {block.size} do not divide {odd} input columns"


def cache_bytes(model: Anatomy, format: Format, context: int, batch: int) -> int | None:
    """Bytes of the keys and values of ``batch`` sequences of ``context`` tokens; None: not modelled."""
    if model.cache is None:
        return None
    total = 0.0
    for layer in model.cache:
        vectors = batch * layer.tokens(context) * layer.heads
        for elements in (layer.key, layer.value):
            if vectors and elements:
                total += _bits(format, (vectors, elements // layer.heads))
    return math.ceil(total / 8)


def cache_per_token(model: Anatomy, format: Format) -> tuple[float, float] | None:
    """Bytes of one more token: (while every window still grows, when only full attention does)."""
    if model.cache is None:
        return None
    ever = replace(model, cache=tuple(layer for layer in model.cache if layer.window is None))
    many = 1 << 20  # a scale for the whole tensor disappears in them
    growing = replace(model, cache=tuple(replace(layer, window=None) for layer in model.cache))
    return tuple(cache_bytes(m, format, many, 1) / many for m in (growing, ever))


def prefill_bytes(model: Anatomy, context: int, batch: int) -> int | None:
    """Peak of the activations while ``batch`` prompts of ``context`` tokens are read; None: not modelled."""
    w = model.widths
    if w is None:
        return None
    mlp = 4 * w.hidden + (3 if w.gated else 2) * w.ffn
    attention = 3 * w.hidden + 4 * w.query + w.key + w.value
    return 2 * batch * context * max(mlp, attention) + 6 * batch * model.vocabulary


def inference(
    model: Anatomy, context: int, batch: int, cache: Format = BF16, schemes: Iterable[Scheme] = SCHEMES
) -> tuple[Inference, ...]:
    """One row per scheme, with keys and values in ``cache``.

    The total counts what is modelled; it is None where the weights are not possible or the cache is not
    modelled. Raises ``InputError`` for a context or batch that is not positive.
    """
    check_load(model, context, batch)
    rows = []
    for scheme in schemes:
        held, wide = weights(model, scheme), scheme.weight == FP32
        kept = cache_bytes(model, FP32 if wide and cache == BF16 else cache, context, batch)
        working = prefill_bytes(model, context, batch)
        working = None if working is None else working * (2 if wide else 1)
        known = held.nbytes is not None and kept is not None
        total = held.nbytes + kept + (working or 0) if known else None
        gpus = holding(total) if known else ()
        rows.append(Inference(weights=held, cache=kept, activations=working, total=total, gpus=gpus))
    return tuple(rows)
