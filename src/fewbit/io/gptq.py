"""The layout of GPTQ files (AutoGPTQ, GPTQModel, optimum): words packed along the inputs, transposed.

    X.qweight  int32 [in b / 32, out]    fields u, 0 .. 2^b - 1, of 32 / b neighbouring inputs, LSB first
    X.qzeros   int32 [G, out b / 32]     z - 1 ("gptq", version 1) or z ("gptq_v2"), modulo 2^b
    X.scales   float16 [G, out]          w[o, i] = scales[g, o] (u[i, o] - z[g, o]),  g = g_idx[i]
    X.g_idx    int32 [in]                i // group, or with act-order the group of every input

3 bits are dense: 32 fields in 3 words. Here codes are signed, q = u - 2^(b-1), as for compressed-tensors, so
that one tensor has one set of codes in all layouts. A symmetric file has z = 2^(b-1) throughout; it is
recognised by its stored words, whichever version its configuration claims, since some tools label version 2
files "gptq". Where z is free the label decides. Version 1 cannot tell z = 0 from z = 2^b, and kernels that
add 1 to whole words would carry into the next field: such tensors are written as version 2 only.

GPTQ: Frantar, Ashkboos, Hoefler, Alistarh 2022, https://arxiv.org/abs/2210.17323; the layout is that of
https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/ModelCloud/GPTQModel (no code of theirs is used).

Shapes: in % 32 == 0 and out % 32 == 0, as kernels ask; G = in / group; group -1 is the whole column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Channel, Group
from fewbit.format.fit import AbsMax, MinMax
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP16
from fewbit.format.qtensor import QTensor
from fewbit.grid import by_name
from fewbit.grid.integer import Int
from fewbit.io.base import TensorInfo
from fewbit.io.entry import Entry, Shape
from fewbit.io.ordered import OrderedTensor, order_of
from fewbit.io.parts import STEPS, as_dtype, from_words, info, no_integers, plain_steps, take, to_words

BITS = (2, 3, 4, 8)
Read = Callable[[Collection[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """The layout with the zeros of one version."""

    v2: bool

    quant_method = "gptq"
    optional = ("g_idx",)

    @property
    def input_names(self) -> dict[str, str]:
        """Of static steps: there are none."""
        return {}

    # -- out --

    def holds(
        self, format: Format, shape: Shape | None = None, activation: Activation | None = None
    ) -> str | None:
        """Why a weight in ``format`` cannot be held; None when it can."""
        if activation is not None:
            return "GPTQ files say nothing of quantized inputs"
        reason = no_integers("GPTQ", BITS, format)
        if reason is not None:
            return reason
        if shape is not None and (shape[0] % 32 or shape[1] % 32):
            return f"GPTQ files pack 32 rows and columns at a time, which do not divide {list(shape)}"
        return None

    def stored_format(self, format: Format) -> Format:
        """``format`` as the file will say it: signed codes, float16 steps."""
        return _format(format.grid.bits, format.block, format.zero is Zero.NONE, torch.float16)

    def nearest(self, format: Format, shape: Shape) -> Format:
        """What a weight of ``shape`` that is not held can be rounded to: no fewer bits, up to 8."""
        bits = next((b for b in BITS if b >= format.grid.bits / format.grid.width), 8)
        size = getattr(format.block, "size", 128)
        fits = (g for g in (size, 128, 64, 32) if shape[1] % g == 0)
        return _format(bits, Group(next(fits, shape[1])), False, torch.float16)

    def to_dict(self, module: str, q: QTensor | OrderedTensor) -> dict[str, Tensor]:
        """The tensors of a file for the weight of ``module``.

        Raises ``InputError`` where ``holds`` gives a reason, and for zeros or steps that do not fit.
        """
        rest = q.rest if isinstance(q, OrderedTensor) else q
        fmt, (rows, columns) = rest.format, rest.shape
        why = self.holds(fmt, (rows, columns))
        if why:
            raise InputError(f"{module} cannot be written: {why}; write a native checkpoint")
        half, bits = 2 ** (fmt.grid.bits - 1), fmt.grid.bits
        group = _group(fmt.block, columns)
        u, g_idx = fmt.grid.to_unsigned(rest.codes), torch.arange(columns, dtype=torch.int32) // group
        if isinstance(q, OrderedTensor):
            back = q.order.argsort()
            u, g_idx = u[:, back], g_idx[back]
        if rest.zero is None:
            zero = torch.full(rest.scale.shape, half, dtype=torch.uint8)
        else:
            zero = fmt.grid.to_unsigned(rest.zero)
        if not self.v2:
            if not zero.all():
                raise InputError(
                    f"{module} has zeros of 0 below its codes, which version 1 of the GPTQ layout cannot "
                    "tell from 2^b; use gptq_v2"
                )
            zero = zero - 1
        return {
            f"{module}.qweight": to_words(u, bits).T.contiguous(),
            f"{module}.qzeros": to_words(zero.T, bits),
            f"{module}.scales": as_dtype(rest.scale, torch.float16, module).T.contiguous(),
            f"{module}.g_idx": g_idx.contiguous(),
        }

    def quantization_config(self, entries: Mapping[str, Entry], left: Collection[str]) -> dict:
        """The ``quantization_config`` of config.json; one setting serves all modules.

        left: linear modules that stay float. Raises ``InputError`` where modules differ.
        """
        entry = next(iter(entries.values()))
        if len({scheme(e) for e in entries.values()}) > 1:
            raise InputError(
                "GPTQ files have one width, group size and symmetry for all modules; use compressed-tensors"
            )
        size = entry.format.block.size if isinstance(entry.format.block, Group) else -1
        out = {
            "quant_method": self.quant_method,
            "bits": entry.format.grid.bits,
            "group_size": size,
            "desc_act": any(e.ordered for e in entries.values()),
            "sym": entry.format.zero is Zero.NONE,
            "damp_percent": 0.01,
            "true_sequential": True,
            "static_groups": False,
            "lm_head": "lm_head" in entries,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
        }
        inside = [name for name in left if re.search(r"\.\d+\.", name)]
        if inside:  # optimum lists what it replaces, GPTQModel what it skips
            kept = dict.fromkeys(re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in entries)
            out["modules_in_block_to_quantize"] = [[name] for name in kept]
            out["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
        return out

    # -- in --

    def entries(self, config: Mapping, infos: Mapping[str, TensorInfo], read: Read) -> dict[str, Entry]:
        """What the headers and the configuration say of every quantized module.

        Raises ``InputError`` for shapes that fit together in no way, or not to the configuration.
        """
        modules = [n.removesuffix(".qweight") for n in infos if n.endswith(".qweight")]
        if not modules:
            raise InputError("this checkpoint says GPTQ but holds no tensor named qweight; it is incomplete")
        orders = [f"{m}.g_idx" for m in modules if config.get("desc_act") and f"{m}.g_idx" in infos]
        found = {m: _entry(m, config, infos) for m in modules}
        for name, g_idx in read(orders).items():
            module = name.removesuffix(".g_idx")
            entry = found[module]
            take({name: g_idx}, name, (entry.shape[1],), torch.int32)
            group = _group(entry.format.block, entry.shape[1])
            found[module] = replace(entry, ordered=order_of(g_idx, group, name) is not None)
        return found

    def names(
        self, module: str, format: Format, shape: Shape, apart: None = None, ordered=False
    ) -> list[str]:
        """Names of the tensors that hold a weight."""
        parts = ("qweight", "qzeros", "scales", *(["g_idx"] if ordered else []))
        return [f"{module}.{part}" for part in parts]

    def from_dict(
        self,
        module: str,
        tensors: Mapping[str, Tensor],
        format: Format,
        shape: Shape,
        apart: None = None,
        ordered: bool = False,
    ) -> QTensor | OrderedTensor:
        """Inverse of ``to_dict`` for an entry's format. Raises ``InputError`` for what does not fit it."""
        (rows, columns), bits, grid = shape, format.grid.bits, format.grid
        group, half = _group(format.block, columns), 2 ** (bits - 1)
        groups = columns // group
        words = take(tensors, f"{module}.qweight", (columns * bits // 32, rows), torch.int32)
        zeros = take(tensors, f"{module}.qzeros", (groups, rows * bits // 32), torch.int32)
        scale = take(tensors, f"{module}.scales", (groups, rows), plain_steps(format))
        u, stored = from_words(words.T, bits, columns), from_words(zeros, bits, rows).T.contiguous()
        zero = None
        if format.zero is Zero.NONE:
            if not ((stored == half).all() or (stored == half - 1).all()):
                raise InputError(
                    f"{module}.qzeros holds other zeros than {half}, but the configuration says that the "
                    'weights are symmetric; set "sym" to false in config.json'
                )
        else:
            zero = grid.from_unsigned(stored if self.v2 else (stored + 1) & (2**bits - 1))
        order = None
        if f"{module}.g_idx" in tensors:
            g_idx = take(tensors, f"{module}.g_idx", (columns,), torch.int32)
            order = order_of(g_idx, group, f"{module}.g_idx")
        if (order is not None) != ordered:
            raise InputError(
                f"{module}.g_idx gives columns in another order, but the configuration says "
                f'"desc_act": {str(ordered).lower()}; they do not belong together'
            )
        codes = grid.from_unsigned(u if order is None else u[:, order])
        scale = scale.T.contiguous()
        q = QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=torch.Size(shape))
        return q if order is None else OrderedTensor(rest=q, order=order)


V1, V2 = Gptq(v2=False), Gptq(v2=True)


def of_config(config: Mapping) -> Gptq:
    """The version that a configuration names. Raises ``InputError`` for another layout under this method."""
    kind = config.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise InputError(
            f"this GPTQ checkpoint has the layout {kind!r:.60}, which is not read; use gptq or gptq_v2"
        )
    return V2 if kind == "gptq_v2" else V1


def scheme(entry: Entry) -> tuple:
    """What all modules of a file must agree in."""
    return (entry.format.grid.bits, entry.format.block, entry.format.zero)


def _format(bits: int, block: Group | Channel, symmetric: bool, steps: torch.dtype) -> Format:
    return Format(
        grid=Int(bits),
        block=block,
        range=AbsMax() if symmetric else MinMax(),
        zero=Zero.NONE if symmetric else Zero.INTEGER,
        scale=FP16 if steps == torch.float16 else Format(grid=by_name(STEPS[steps])),
    )


def _group(block: Group | Channel, columns: int) -> int:
    return block.size if isinstance(block, Group) else columns


def _entry(module: str, config: Mapping, infos: Mapping[str, TensorInfo]) -> Entry:
    """Shape, width and group of a module follow from its headers; the configuration must agree."""
    weight, zeros = (info(infos, f"{module}.{n}", 2, torch.int32).shape for n in ("qweight", "qzeros"))
    steps = info(infos, f"{module}.scales", 2, *STEPS)
    (groups, rows), bits = steps.shape, 32 * zeros[1] // steps.shape[1]
    columns = 32 * weight[0] // bits if bits else 0
    fits = bits in BITS and zeros == (groups, rows * bits // 32) and rows * bits % 32 == 0
    fits = fits and weight[1] == rows and weight[0] * 32 == columns * bits and columns % groups == 0
    if not fits:
        raise InputError(
            f"the tensors of {module} fit no GPTQ layout (qweight {list(weight)}, qzeros {list(zeros)}, "
            f"scales {list(steps.shape)}); the file is damaged, or its groups do not divide the inputs"
        )
    size, own = columns // groups, config.get("dynamic") or {}
    if not own and (
        config.get("bits", bits) != bits or config.get("group_size", size) not in (size, -1, None)
    ):
        raise InputError(
            f"{module} has {bits} bits in groups of {size}, but the configuration says "
            f"{config.get('bits')!r:.40} bits and group_size {config.get('group_size')!r:.40}; "
            "they do not belong together"
        )
    block = Channel() if groups == 1 and config.get("group_size", -1) in (-1, None) else Group(size)
    symmetric = bool(config.get("sym", True))
    return Entry(format=_format(bits, block, symmetric, steps.dtype), shape=(rows, columns))
