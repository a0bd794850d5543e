"""The layout of AWQ files (AutoAWQ, "gemm"): 4 bits packed along the outputs, columns of a word interleaved.

    X.qweight  int32 [in, out / 8]       nibble i of word c is row 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i] of W
    X.qzeros   int32 [G, out / 8]        zeros in the same order, as they are
    X.scales   float16 [G, out]          w[o, i] = scales[g, o] (u[i, o] - z[g, o]),  g = i // group

The scaling of activations that AWQ searches is folded into the layers before, so nothing of it is here. Codes
are signed, as for the other layouts: q = u - 8, z - 8. Files have zeros always: a symmetric weight is written
with z = 8 and comes back with q's zero 0.

AWQ: Lin et al. 2023, https://arxiv.org/abs/2306.00978; the layout is that of
https://github.com/casper-hansen/AutoAWQ (no code of it is used).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Channel, Group
from fewbit.format.fit import MinMax
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP16
from fewbit.format.qtensor import QTensor
from fewbit.grid import by_name
from fewbit.grid.integer import Int
from fewbit.io.base import TensorInfo
from fewbit.io.entry import Entry, Shape
from fewbit.io.parts import STEPS, as_dtype, from_words, info, no_integers, plain_steps, take, to_words

quant_method = "awq"
optional, input_names = (), {}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # row of W, within 8, that nibble i holds
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds it


def holds(format: Format, shape: Shape | None = None, activation: Activation | None = None) -> str | None:
    """Why a weight in ``format`` cannot be held; None when it can."""
    if activation is not None:
        return "AWQ files say nothing of quantized inputs"
    reason = no_integers("AWQ", (4,), format)
    if reason is not None:
        return reason
    if shape is not None and shape[0] % 8:
        return f"AWQ files pack 8 rows into a word, which do not divide {shape[0]}"
    return None


def stored_format(format: Format) -> Format:
    """``format`` as the file will say it: signed codes with zeros, float16 steps."""
    return _format(format.block, torch.float16)


def nearest(format: Format, shape: Shape) -> Format:
    """What a weight of ``shape`` that is not held can be rounded to."""
    size = getattr(format.block, "size", 128)
    fits = (g for g in (size, 128, 64, 32) if shape[1] % g == 0)
    return _format(Group(next(fits, shape[1])), torch.float16)


def to_dict(module: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of a file for the weight of ``module``.

    Raises ``InputError`` where ``holds`` gives a reason, for columns in another order, and for steps that do
    not fit into float16.
    """
    why = holds(q.format, tuple(q.shape)) if isinstance(q, QTensor) else "AWQ files have no order of columns"
    if why:
        raise InputError(f"{module} cannot be written: {why}; write a native checkpoint")
    grid = q.format.grid
    zero = torch.full(q.scale.shape, 8, dtype=torch.uint8) if q.zero is None else grid.to_unsigned(q.zero)
    return {
        f"{module}.qweight": _pack(grid.to_unsigned(q.codes).T),
        f"{module}.qzeros": _pack(zero.T),
        f"{module}.scales": as_dtype(q.scale, torch.float16, module).T.contiguous(),
    }


def quantization_config(entries: Mapping[str, Entry], left: Collection[str]) -> dict:
    """The ``quantization_config`` of config.json; left: linear modules that stay float.

    Raises ``InputError`` where modules differ in their groups.
    """
    blocks = {e.format.block for e in entries.values()}
    if len(blocks) > 1:
        raise InputError("AWQ files have one group size for all modules; use compressed-tensors")
    block = blocks.pop()
    return {
        "quant_method": quant_method,
        "bits": 4,
        "group_size": block.size if isinstance(block, Group) else -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(left) or None,
    }


def entries(config: Mapping, infos: Mapping[str, TensorInfo], read: Callable) -> dict[str, Entry]:
    """What the headers and the configuration say of every quantized module.

    Raises ``InputError`` for another version of the layout, and for shapes that do not fit together.
    """
    bits, version = (config.get(a, config.get(b)) for a, b in (("bits", "w_bit"), ("version", "version")))
    if str(version or "gemm").lower() != "gemm" or bits != 4:
        raise InputError(
            f"this AWQ checkpoint has {bits!r:.40} bits in the layout {version!r:.40}, which is not read; "
            'use one of 4 bits as "gemm"'
        )
    modules = [n.removesuffix(".qweight") for n in infos if n.endswith(".qweight")]
    if not modules:
        raise InputError("this checkpoint says AWQ but holds no tensor named qweight; it is incomplete")
    return {m: _entry(m, config, infos) for m in modules}


def names(module: str, format: Format, shape: Shape) -> list[str]:
    """Names of the tensors that hold a weight."""
    return [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]


def from_dict(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> QTensor:
    """Inverse of ``to_dict`` for an entry's format. Raises ``InputError`` for what does not fit it."""
    (rows, columns), grid = shape, format.grid
    groups = format.block.scale_shape(shape)[1]
    codes = take(tensors, f"{module}.qweight", (columns, rows // 8), torch.int32)
    zeros = take(tensors, f"{module}.qzeros", (groups, rows // 8), torch.int32)
    scale = take(tensors, f"{module}.scales", (groups, rows), plain_steps(format))
    return QTensor(
        codes=grid.from_unsigned(_unpack(codes, rows)).T.contiguous(),
        scale=scale.T.contiguous(),
        zero=grid.from_unsigned(_unpack(zeros, rows)).T.contiguous(),
        format=format,
        shape=torch.Size(shape),
    )


def _pack(u: Tensor) -> Tensor:
    """uint8 [n, out] -> int32 [n, out / 8]."""
    return to_words(u.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2), 4)


def _unpack(words: Tensor, rows: int) -> Tensor:
    return from_words(words, 4, rows).unflatten(-1, (-1, 8))[..., list(PLACE)].flatten(-2)


def _format(block: Group | Channel, steps: torch.dtype) -> Format:
    own = FP16 if steps == torch.float16 else Format(grid=by_name(STEPS[steps]))
    return Format(grid=Int(4), block=block, range=MinMax(), zero=Zero.INTEGER, scale=own)


def _entry(module: str, config: Mapping, infos: Mapping[str, TensorInfo]) -> Entry:
    (columns, packed), zeros = (
        info(infos, f"{module}.{n}", 2, torch.int32).shape for n in ("qweight", "qzeros")
    )
    steps = info(infos, f"{module}.scales", 2, *STEPS)
    groups, rows = steps.shape
    wanted = config.get("group_size", config.get("q_group_size", -1))
    size = columns // groups
    whole = rows == 8 * packed and zeros == (groups, packed) and columns % groups == 0
    if not whole or wanted not in (size, -1) or (wanted == -1 and groups > 1):
        raise InputError(
            f"the tensors of {module} fit no AWQ layout of groups of {wanted!r:.40} (qweight "
            f"{[columns, packed]}, qzeros {list(zeros)}, scales {[groups, rows]}); configuration and "
            "file do not belong together"
        )
    block = Channel() if wanted == -1 else Group(size)
    return Entry(format=_format(block, steps.dtype), shape=(rows, columns))
