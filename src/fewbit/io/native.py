"""fewbit's own checkpoint layout: every Format to any depth, densely packed, nothing lost.

A quantized module X holds, instead of ``X.weight``,

    X.codes   uint8 [..., ceil(in * b / 8)]  unsigned fields of b bits, least significant first, row by row
    X.scale   the steps in their own dtype; where a step is itself quantized X.scale_codes, X.scale_scale, ...
    X.table   learned points [tables, entries], stored like the steps: X.table, or X.table_codes, ...
    X.zero    integer zeros packed like codes along the last axis; float zeros and offsets in their own dtype,
              or where they are coded X.zero_codes, X.zero_scale

and config.json says once which Formats there are and which module has which:

    "quantization_config": {"quant_method": "fewbit", "version": 1, "formats": [{"type": "Format", ...}],
                            "modules": {"model.layers.0.mlp.up_proj": {"format": 0, "shape": [1536, 576]}}}

Quantizers of an encoder's sums and outputs are told of beside them (``fewbit.io.sites``), and fixed steps of
keys and values (``fewbit.io.kv``).

The shape is [out, in]; ``"transposed": true`` marks a module whose original weight is stored [in, out]
(GPT-2's Conv1D); ``"activation"`` is how its input is quantized (a static one's steps:
``fewbit.io.inputs``), ``"online"`` a map of the input that comes before, ``"output"`` one whose inverse comes
after. So a file holds exactly ``QTensor.bits_per_weight``, apart from rows that do not end on a byte. Where
columns are kept in float (``fewbit.format.split``), their values are ``X.apart`` [out, k], their places
``X.apart_columns`` int32 [k], and ``"apart"`` says how many. Where the columns were sorted before their
groups were cut (``fewbit.io.ordered``), ``X.order`` int32 [in] lists them, and ``"ordered"`` is true.

Road not taken: a file per engine's kernel layout. Kernels repack when they load; files stay canonical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.bits import pack, row_bytes, unpack
from fewbit.format.codec import from_plain, to_plain
from fewbit.format.format import Format, Zero
from fewbit.format.qtensor import QTensor
from fewbit.format.split import Apart, SplitTensor
from fewbit.grid import Float, Points, Table
from fewbit.grid.grid import Grid
from fewbit.io import kv as cache
from fewbit.io.base import TensorInfo, first_line
from fewbit.io.entry import CLASSES, Entry, Shape
from fewbit.io.files import check_name
from fewbit.io.ordered import OrderedTensor
from fewbit.io.sites import SiteEntry, from_config, to_config
from fewbit.nn.kvcache import KVFormat

QUANT_METHOD = "fewbit"
optional, input_names, kv_format = (), {}, cache.from_config
VERSION = 1
_FLAGS, _PARTS = ("transposed", "ordered"), ("activation", "online", "output", "apart")
_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# -- tensors --


def to_dict(module: str, q: QTensor | SplitTensor | OrderedTensor) -> dict[str, Tensor]:
    """The tensors of a file for the quantized weight of ``module``, names as above."""
    parts = {}
    if isinstance(q, SplitTensor):
        parts = {"apart": q.apart.contiguous(), "apart_columns": q.columns.int()}
        q = q.rest
    elif isinstance(q, OrderedTensor):
        parts, q = {"order": q.order.int()}, q.rest
    return {f"{module}.{name}": tensor for name, tensor in (_pack_all(q, "") | parts).items()}


def from_dict(
    module: str,
    tensors: Mapping[str, Tensor],
    format: Format,
    shape: Shape,
    apart: Apart | None = None,
    ordered: bool = False,
) -> QTensor | SplitTensor | OrderedTensor:
    """Inverse of ``to_dict``; other tensors in the mapping are left alone.

    Raises ``InputError`` for a tensor that is missing or not of the shape and dtype that the Format has.
    """
    got = {}
    for name, (stored, dtype) in layout(format, shape, apart=apart, ordered=ordered).items():
        tensor = tensors.get(f"{module}.{name}")
        if tensor is None:
            raise InputError(
                f"the checkpoint has no tensor {module}.{name}, which {format} needs; it is incomplete"
            )
        if tuple(tensor.shape) != stored or tensor.dtype != dtype:
            raise _other(f"{module}.{name}", tensor, (stored, dtype), format, shape)
        got[name] = tensor
    q = _unpack_all(got, format, torch.Size(shape), "")
    if ordered:
        order = got["order"].long()
        if not torch.equal(order.sort().values, torch.arange(shape[1])):
            raise InputError(f"{module}.order does not list each of {shape[1]} columns once; it is damaged")
        return OrderedTensor(rest=q, order=order)
    if apart is None:
        return q
    columns = got["apart_columns"].long()
    if columns.min() < 0 or columns.max() >= shape[1] or (columns.diff() < 1).any():
        raise InputError(f"{module}.apart_columns are no ascending columns below {shape[1]}; it is damaged")
    return SplitTensor(rest=q, apart=got["apart"], columns=columns)


def names(
    module: str, format: Format, shape: Shape, apart: Apart | None = None, ordered: bool = False
) -> list[str]:
    """Names of the tensors that hold a weight of ``shape`` in ``format``."""
    return [f"{module}.{name}" for name in layout(format, shape, apart=apart, ordered=ordered)]


def layout(
    format: Format, shape: Shape, prefix: str = "", apart: Apart | None = None, ordered: bool = False
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name (without the module) -> shape and dtype of every stored tensor of a weight of ``shape``."""
    out = {} if apart is None else apart.layout(shape[0])
    out |= {"order": ((shape[1],), torch.int32)} if ordered else {}
    out |= {f"{prefix}codes": (_packed_shape(_codes_shape(format, shape), format.grid.bits), torch.uint8)}
    if format.codebook is not None:
        own, tables = format.codebook.store, format.codebook.shape(format.grid, shape)
        plain = {f"{prefix}table": (tables, _NATIVE.get(own.grid.name))}
        out |= plain if _is_plain(own) else layout(own, tables, f"{prefix}table_")
    if format.scale is None:
        return out
    blocks = tuple(format.block.scale_shape(shape))
    if _is_plain(format.scale):
        out[f"{prefix}scale"] = (blocks, _NATIVE[format.scale.grid.name])
    else:
        out |= layout(format.scale, blocks, f"{prefix}scale_")
    if format.offsets is not None:
        out |= layout(format.offsets, blocks, f"{prefix}zero_")
    elif format.zero is Zero.INTEGER:
        out[f"{prefix}zero"] = (_packed_shape(blocks, format.grid.bits), torch.uint8)
    elif format.zero is not Zero.NONE:
        out[f"{prefix}zero"] = (() if format.zero is Zero.MEAN else blocks, format.zero_dtype)
    return out


def _is_plain(scale: Format) -> bool:  # steps kept as a float tensor, not as a QTensor
    return scale.scale is None and scale.grid.name in _NATIVE


def _codes_shape(format: Format, shape: Shape) -> Shape:
    return tuple(shape) if format.grid.width == 1 else (*shape[:-1], shape[-1] // format.grid.width)


def _packed_shape(shape: Shape, bits: int) -> Shape:
    """A scalar is packed as a row of one."""
    return (*shape[:-1], row_bytes(shape[-1] if shape else 1, bits))


def _pack_all(q: QTensor, prefix: str) -> dict[str, Tensor]:
    out = {f"{prefix}codes": _pack(q.format.grid, q.codes)}
    whole = q.format.zero is Zero.INTEGER
    zero = _pack(q.format.grid, q.zero) if whole else q.zero
    for name, part in (("scale", q.scale), ("table", q.table), ("zero", zero)):
        if isinstance(part, QTensor):
            out |= _pack_all(part, f"{prefix}{name}_")
        elif part is not None:
            out[f"{prefix}{name}"] = part.contiguous()
    return out


def _unpack_all(tensors: Mapping[str, Tensor], format: Format, shape: torch.Size, prefix: str) -> QTensor:
    codes = _unpack(format.grid, tensors[f"{prefix}codes"], _codes_shape(format, shape))
    scale = zero = table = None
    if format.codebook is not None:
        own, kept = format.codebook.store, torch.Size(format.codebook.shape(format.grid, shape))
        table = tensors.get(f"{prefix}table")
        table = _unpack_all(tensors, own, kept, f"{prefix}table_") if table is None else table
    if format.scale is not None:
        blocks = torch.Size(format.block.scale_shape(shape))
        if _is_plain(format.scale):
            scale = tensors[f"{prefix}scale"]
        else:
            scale = _unpack_all(tensors, format.scale, blocks, f"{prefix}scale_")
        if format.offsets is not None:
            zero = _unpack_all(tensors, format.offsets, blocks, f"{prefix}zero_")
        elif format.zero is not Zero.NONE:
            zero = tensors[f"{prefix}zero"]
            zero = _unpack(format.grid, zero, blocks) if format.zero is Zero.INTEGER else zero
    return QTensor(codes=codes, scale=scale, zero=zero, format=format, shape=shape, table=table)


def _pack(grid: Grid, codes: Tensor) -> Tensor:
    return pack(torch.atleast_1d(grid.to_unsigned(codes)), grid.bits).contiguous()


def _unpack(grid: Grid, packed: Tensor, shape: Shape) -> Tensor:
    fields = unpack(packed, grid.bits, shape[-1] if shape else 1)
    listed = isinstance(grid, Float | Points | Table)  # others use every pattern of bits
    if listed and fields.numel() and int(fields.max()) >= len(grid._list()):
        raise InputError(f"a weight holds codes that {grid.name} does not have; the file is damaged")
    return grid.from_unsigned(fields).reshape(shape)


def _say(shape: Shape, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"


# -- configuration --


def beside(config: Mapping, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of tensors that are no parameters and belong to no weight: steps of keys and values."""
    return cache.stored(infos) if config.get("kv") else []


def quantization_config(
    entries: Mapping[str, Entry], sites: Sequence[SiteEntry] = (), kv: KVFormat | None = None
) -> dict:
    """The ``quantization_config`` of config.json for modules by their names there, sites, keys and values."""
    formats = list(dict.fromkeys(entry.format for entry in entries.values()))
    modules = {}
    for name, entry in entries.items():
        modules[name] = {"format": formats.index(entry.format), "shape": list(entry.shape)}
        modules[name] |= {key: True for key in _FLAGS if getattr(entry, key)}
        there = {key: part for key in _PARTS if (part := getattr(entry, key)) is not None}
        modules[name] |= {key: to_plain(part) for key, part in there.items()}
    plain = [to_plain(f) for f in formats]
    out = {"quant_method": QUANT_METHOD, "version": VERSION, "formats": plain, "modules": modules}
    return out | to_config(sites) | cache.to_config(kv)


def entries(config: Mapping, infos: Mapping | None = None, read: object = None) -> dict[str, Entry]:
    """What a configuration says of every quantized module; it says everything.

    Raises ``InputError`` where a header in ``infos`` has another shape or dtype.
    """
    found = entries_from_config(config)
    for module, entry in found.items() if infos is not None else ():
        check_name(module, "the quantization_config")
        fmt, shape = entry.format, entry.shape
        codes = {"codes": (_packed_shape(_codes_shape(fmt, shape), fmt.grid.bits), torch.uint8)}
        _compare(module, codes, infos, entry)  # first: what follows takes time that grows with the shape
        fmt.check(shape, module)
        _compare(module, layout(fmt, shape, apart=entry.apart, ordered=entry.ordered), infos, entry)
    return found


def _compare(module: str, wanted: Mapping, infos: Mapping[str, TensorInfo], entry: Entry) -> None:
    for name, (shape, dtype) in wanted.items():
        info = infos.get(f"{module}.{name}")
        if info is not None and (info.shape, info.dtype) != (tuple(shape), dtype):
            raise _other(f"{module}.{name}", info, (shape, dtype), entry.format, entry.shape)


def _other(name: str, got: TensorInfo | Tensor, wanted: tuple, format: Format, shape: Shape) -> InputError:
    return InputError(
        f"tensor {name} is {_say(got.shape, got.dtype)}, but a weight {list(shape)} in {format!s:.80} "
        f"has {_say(*wanted)} there; configuration and file do not belong together"
    )


def entries_from_config(config: Mapping) -> dict[str, Entry]:
    """Inverse of ``quantization_config``. Raises ``InputError`` for another version or a broken one."""
    if config.get("version") != VERSION:
        raise InputError(
            f"this checkpoint has version {config.get('version')!r:.40} of fewbit's layout and this release "
            f"reads version {VERSION}; update fewbit"
        )
    try:
        formats = dict(enumerate(from_plain(f) for f in config["formats"]))
        return {
            name: Entry(
                format=formats[m["format"]],
                shape=tuple(m["shape"]),
                **{key: m.get(key, False) for key in _FLAGS},
                **{key: from_plain(m[key], CLASSES) for key in _PARTS if key in m},
            )
            for name, m in config["modules"].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(error) from None


def sites_from_config(config: Mapping) -> tuple[SiteEntry, ...]:
    """The sites of a ``quantization_config``; raises ``InputError`` for broken ones."""
    try:
        return from_config(config)
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise _broken(error) from None


def _broken(error: Exception) -> InputError:
    return InputError(
        "the quantization_config of this checkpoint is broken "
        f"({type(error).__name__}: {first_line(error)}); expected 'formats' and 'modules', and of an encoder "
        "'activations' and 'sites', as fewbit writes them"
    )
