"""The layouts of bitsandbytes: NF4 and FP4 over flat blocks, and LLM.int8()'s rows.

4 bits  X.weight                 uint8 [ceil(n / 2), 1]   two codes a byte, the first in the HIGH nibble
        X.weight.absmax          float32 [blocks], or with double quantization uint8 codes of
        X.weight.nested_absmax   float32 [blocks / 256]   absmax = map[code] nested_absmax + offset
        X.weight.quant_map       float32 [16]             w = quant_map[code] absmax
        X.weight.nested_quant_map  float32 [256]
        X.weight.quant_state.bitsandbytes__nf4 (or fp4)   JSON as bytes: blocksize, shape, dtype, the offset
8 bits  X.weight                 int8 [out, in]
        X.SCB                    float32 [out]            w = q SCB / 127: the row's largest magnitude
        X.weight_format          uint8                    0: rows as they are

Blocks run over the flattened matrix; groups that divide its rows are such blocks, too. Both tables are
constants and checked (files hold the 8-bit map with an error of up to 1e-7, as it was computed; it is read as
the exact one). The steps of 8 bits are SCB / 127 in float32: exact, and back, for steps of float16, bfloat16
and those that are a maximum over 127; about one in a hundred of all float32 numbers is no such quotient, and
is refused.

QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; LLM.int8(): https://arxiv.org/abs/2208.07339;
the layout is that of https://github.com/bitsandbytes-foundation/bitsandbytes (no code of it is used).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Channel, Flat, Group, Token
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP32, bitsandbytes
from fewbit.format.qtensor import QTensor
from fewbit.grid import by_name
from fewbit.grid.integer import Int
from fewbit.grid.table import FP4_BNB, NF4
from fewbit.io.base import TensorInfo, first_line
from fewbit.io.entry import Entry, Shape
from fewbit.io.parts import info, plain_steps, take

quant_method = "bitsandbytes"
optional, input_names = ("weight_format",), {}
KINDS = {"nf4": NF4, "fp4": FP4_BNB}
STATE = "quant_state.bitsandbytes__"
INNER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_THRESHOLD = 6.0  # of LLM.int8(), where a configuration gives none


def holds(format: Format, shape: Shape | None = None, activation: Activation | None = None) -> str | None:
    """Why a weight in ``format`` cannot be held; None when it can."""
    if isinstance(format.grid, Int) and format.grid.bits == 8:
        if type(format.block) is not Channel or format.zero is not Zero.NONE or not format.grid.signed:
            return f"bitsandbytes has one symmetric step per row for 8 bits, not {format}"
        if plain_steps(format) is None:
            return f"steps of 8 bits are float32 in bitsandbytes, not {format.scale}"
        if activation is not None and activation.format != _input(_THRESHOLD).format:
            return f"inputs are int8 per token in bitsandbytes, not {activation.format}"
        if activation is not None and (activation.static or activation.groups or activation.centred):
            return "inputs get their steps at every call in bitsandbytes"
        return None
    if activation is not None:
        return "bitsandbytes quantizes the inputs of int8 weights only"
    if format.grid not in KINDS.values():
        return f"bitsandbytes holds nf4, fp4-bnb and int8, not {format.grid.name}"
    size = format.block.size if isinstance(format.block, Flat | Group) else 0
    if size not in _BLOCKS or format.zero is not Zero.NONE:
        return f"blocks are {_BLOCKS[0]} to {_BLOCKS[-1]} elements in memory order there, not {format.block}"
    if plain_steps(format) is None and not _doubled(format):
        return f"steps are float32 or doubly quantized in bitsandbytes, not {format.scale}"
    return None


def stored_format(format: Format) -> Format:
    """``format`` as the file will say it."""
    if isinstance(format.grid, Int):
        return Format(grid=Int(8), block=Channel(), scale=FP32)
    scale = format.scale if _doubled(format) else FP32
    return Format(grid=format.grid, block=Flat(format.block.size), scale=scale)


def nearest(format: Format, shape: Shape) -> Format:
    """What a weight that is not held can be rounded to: NF4 up to 4 bits, int8 above."""
    if format.grid.bits / format.grid.width > 4:
        return Format(grid=Int(8), block=Channel(), scale=FP32)
    return bitsandbytes("nf4")


def to_dict(module: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of a file for the weight of ``module``.

    Raises ``InputError`` where ``holds`` gives a reason, and for steps that are no SCB / 127.
    """
    why = holds(q.format) if isinstance(q, QTensor) else "bitsandbytes has no order of columns"
    if why:
        raise InputError(f"{module} cannot be written: {why}; write a native checkpoint")
    if isinstance(q.format.grid, Int):
        return _rows(module, q)
    u = q.codes.flatten()
    u = torch.nn.functional.pad(u, (0, len(u) % 2)).view(-1, 2)
    kind = next(k for k, table in KINDS.items() if table == q.format.grid)
    state = {"quant_type": kind, "blocksize": q.format.block.size, "dtype": "float32", "shape": list(q.shape)}
    out = {"": u[:, :1] << 4 | u[:, 1:], ".quant_map": _table(q.format.grid)}
    if isinstance(q.scale, QTensor):
        own = q.scale
        out |= {
            ".absmax": own.codes.flatten(),
            ".nested_absmax": own.scale,
            ".nested_quant_map": _table(own.format.grid),
        }
        state |= {"nested_blocksize": own.format.block.size, "nested_dtype": "float32"}
        state["nested_offset"] = float(own.zero)
    else:
        out[".absmax"] = q.scale.float().flatten()
    out[f".{STATE}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{module}.weight{name}": tensor.contiguous() for name, tensor in out.items()}


def _rows(module: str, q: QTensor) -> dict[str, Tensor]:
    steps = q.scale.float().flatten()
    scb = steps * 127
    bad = int((scb / 127 != steps).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(steps)} float32 steps of {module} are no multiple of 1/127 that float32 holds, "
            "which bitsandbytes stores; quantize with bf16 or fp16 scales"
        )
    return {
        f"{module}.weight": q.codes.contiguous(),
        f"{module}.SCB": scb,
        f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def quantization_config(entries: Mapping[str, Entry], left: Collection[str]) -> dict:
    """The ``quantization_config`` of config.json; left: linear modules that stay float.

    Raises ``InputError`` where modules differ in what is said once for all.
    """
    schemes = {(e.format.grid, _doubled(e.format)) for e in entries.values()}
    if len(schemes) > 1:
        raise InputError("bitsandbytes files have one kind of weights; use a native checkpoint for several")
    (grid, double), entry = schemes.pop(), next(iter(entries.values()))
    whole = isinstance(grid, Int)
    threshold = _THRESHOLD if entry.activation is None else entry.activation.outliers or 0.0
    return {
        "quant_method": quant_method,
        "load_in_8bit": whole,
        "load_in_4bit": not whole,
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": list(left) or None,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": "fp4" if grid == FP4_BNB else "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def entries(config: Mapping, infos: Mapping[str, TensorInfo], read: Callable) -> dict[str, Entry]:
    """What headers, states and configuration say of every quantized module; reads the states.

    Raises ``InputError`` for broken ones.
    """
    found = {}
    if config.get("load_in_8bit"):
        threshold = config.get("llm_int8_threshold", _THRESHOLD)
        if not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
            raise InputError(f"llm_int8_threshold {threshold!r:.40} is no number of 0 or more; correct it")
        for name in (n for n in infos if n.endswith(".SCB")):
            module = name.removesuffix(".SCB")
            shape = info(infos, f"{module}.weight", 2, torch.int8).shape
            fmt = Format(grid=Int(8), block=Channel(), scale=FP32)
            found[module] = Entry(format=fmt, shape=shape, activation=_input(threshold))
    states = [n for n in infos if f".weight.{STATE}" in n]
    if any(infos[n].nbytes > 4096 for n in states):
        raise InputError(
            "a quant_state of this bitsandbytes checkpoint is longer than 4096 bytes; it is damaged"
        )
    for name, raw in read(states).items():
        module, _, kind = name.partition(f".weight.{STATE}")
        found[module] = _entry(name, module, kind, raw, infos)
    if not found:
        raise InputError("this checkpoint says bitsandbytes but holds no quantized tensor; it is incomplete")
    return found


def _entry(name: str, module: str, kind: str, raw: Tensor, infos: Mapping[str, TensorInfo]) -> Entry:
    try:
        if f"{module}.weight" not in infos or raw.dtype != torch.uint8:
            raise ValueError("a state of bytes belongs to a weight")
        state = json.loads(bytes(raw.tolist()).decode())
        shape = tuple(int(n) for n in state["shape"])
        double = "nested_blocksize" in state
        fmt = bitsandbytes(
            {"nf4": "nf4", "fp4": "fp4-bnb"}[kind], block=int(state["blocksize"]), double=double
        )
        if double and (state["nested_blocksize"] != 256 or not math.isfinite(state["nested_offset"])):
            raise ValueError("nested blocks of 256 with a finite offset are read")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{name} is no state that bitsandbytes writes ({type(error).__name__}: {first_line(error)}); it "
            "is damaged"
        ) from None
    if len(shape) != 2 or min(shape) < 1 or fmt.block.size not in _BLOCKS:
        raise InputError(f"{name} describes shape {list(shape)!r:.60} in {fmt!s:.60}: no matrix that is read")
    if -(-math.prod(shape) // 2) != infos[f"{module}.weight"].nbytes:
        raise InputError(f"{name} describes shape {list(shape)!r:.60}, for which its weight has other bytes")
    return Entry(format=fmt, shape=shape)


def names(module: str, format: Format, shape: Shape) -> list[str]:
    """Names of the tensors that hold a weight."""
    if isinstance(format.grid, Int):
        return [f"{module}.weight", f"{module}.SCB"]
    kind = next(k for k, table in KINDS.items() if table == format.grid)
    inner = INNER if _doubled(format) else INNER[:2]
    return [f"{module}.weight", *(f"{module}.weight.{n}" for n in (*inner, f"{STATE}{kind}"))]


def from_dict(module: str, tensors: Mapping[str, Tensor], format: Format, shape: Shape) -> QTensor:
    """Inverse of ``to_dict`` for an entry's format. Raises ``InputError`` for what does not fit it."""
    size, n = torch.Size(shape), math.prod(shape)
    get = lambda name, shape, dtype: take(tensors, f"{module}.{name}", shape, dtype)  # noqa: E731
    if isinstance(format.grid, Int):
        if tensors.get(f"{module}.weight_format", torch.zeros(())).any():
            raise InputError(f"{module}.weight is tiled for a GPU (weight_format is not 0); save it again")
        scale = get("SCB", (shape[0],), torch.float32)[:, None] / 127
        codes = get("weight", shape, torch.int8)
        return QTensor(codes=codes, scale=scale, zero=None, format=format, shape=size)
    data = tensors[f"{module}.weight"].contiguous()
    packed = data.view(torch.uint8).flatten()  # FSDP stores the same bytes as another dtype
    if len(packed) != -(-n // 2):
        raise InputError(
            f"{module}.weight holds {len(packed)} bytes instead of {-(-n // 2)} for shape {list(shape)}; the "
            "file is damaged"
        )
    _check_table(module, get("weight.quant_map", (16,), torch.float32), format.grid)
    u = torch.stack([packed >> 4, packed & 15], -1).flatten()[:n].view(size)
    blocks = format.block.scale_shape(shape)
    if not _doubled(format):
        scale = get("weight.absmax", blocks, torch.float32)
        return QTensor(codes=u, scale=scale, zero=None, format=format, shape=size)
    own = format.scale
    _check_table(module, get("weight.nested_quant_map", (256,), torch.float32), own.grid)
    state = next(t for name, t in tensors.items() if name.startswith(f"{module}.weight.{STATE}"))
    offset = json.loads(bytes(state.tolist()).decode())["nested_offset"]
    scale = QTensor(
        codes=get("weight.absmax", blocks, torch.uint8),
        scale=get("weight.nested_absmax", own.block.scale_shape(blocks), torch.float32),
        zero=torch.tensor(offset, dtype=torch.float32),
        format=own,
        shape=torch.Size(blocks),
    )
    return QTensor(codes=u, scale=scale, zero=None, format=format, shape=size)


def _doubled(format: Format) -> bool:
    own = format.scale
    return own is not None and own.scale is not None and own == bitsandbytes("nf4", double=True).scale


def _table(grid) -> Tensor:
    return grid.value(grid.codes())


def _check_table(module: str, found: Tensor, grid) -> None:
    # Maps of 8 bits are computed anew by each release, in float32: the last bit of some entries differs.
    if not torch.allclose(found, _table(grid), rtol=2e-6 if len(found) > 16 else 0, atol=0):
        raise InputError(
            f"{module} brings a table of values that is not {grid.name}'s; it is damaged, or was made by "
            "another tool, which is not read"
        )


def _input(threshold: float) -> Activation:
    """The inputs of LLM.int8(): int8 per token, columns from the threshold on in float."""
    fmt = Format(grid=by_name("int8"), block=Token(), scale=FP32)
    return Activation(format=fmt, outliers=threshold or None)
