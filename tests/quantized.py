"""Tiny quantized checkpoints: every linear inside the blocks of a tiny model, rounded to nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import save_tiny
from transformers.pytorch_utils import Conv1D

from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    E8M0,
    FP16,
    FP32,
    Block2d,
    Channel,
    Divisor,
    Flat,
    Format,
    Group,
    MinMax,
    PerTensor,
    Zero,
)
from fewbit.grid import GRIDS, Int, by_name
from fewbit.io import compressed_tensors, native
from fewbit.io.checkpoint import save_tensors


def int_format(
    bits: int, block=Group(32), asymmetric: bool = False, scale: Format = FP32, **fields
) -> Format:
    """An integer Format; asymmetric ones fit min to max with integer zeros."""
    if asymmetric:
        fields |= {"zero": Zero.INTEGER, "range": MinMax()}
    return Format(grid=Int(bits), block=block, scale=scale, **fields)


# Every kind of Format: each grid, block shape, zero, scale dtype and nesting occurs.
FORMATS = (
    *(Format(grid=grid, block=Group(32), scale=FP32) for grid in GRIDS if 32 % grid.width == 0),
    *(int_format(bits, asymmetric=True, scale=FP16) for bits in range(1, 9)),
    *(
        int_format(4, block=b, scale=BF16)
        for b in (PerTensor(), Channel(), Group(16), Block2d(32, 16), Flat(48))
    ),
    *(int_format(4, scale=s) for s in (FP32, FP16, BF16, E8M0, E4M3_OVER_FP32, DOUBLE_QUANT)),
    *(int_format(3, asymmetric=True, block=b) for b in (PerTensor(), Channel(), Block2d(8, 32), Flat(100))),
    int_format(4, divisor=Divisor.FULL),
    Format(grid=by_name("uint4"), block=Group(32), zero=Zero.INTEGER, range=MinMax(), scale=FP16),
    Format(grid=Int(4), block=Group(32), zero=Zero.FLOAT, range=MinMax(), scale=FP16),
    Format(grid=Int(2), block=Channel(), zero=Zero.OFFSET, range=MinMax(), scale=BF16),
    Format(grid=by_name("nf4"), block=Flat(64), scale=DOUBLE_QUANT),
    Format(grid=by_name("e2m1"), block=Group(16), scale=E4M3_OVER_FP32),
    Format(grid=by_name("e2m1"), block=Group(32), scale=E8M0),
    Format(grid=by_name("e4m3fn")),
    Format(grid=by_name("bf16")),
    Format(grid=by_name("fp32")),
    Format(grid=Int(4), block=Group(16), scale=int_format(8, block=Channel(), asymmetric=True, scale=FP16)),
)


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear of the model but its output head, by name; GPT-2's Conv1D counts."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def save_quantized(
    arch: str, folder: Path, formats, layout=native, dtype: torch.dtype = torch.float32, prefix: str = ""
):
    """Save the tiny model of ``arch`` quantized; return the same model with dequantized weights in ``dtype``.

    formats: one Format, or a function of the module's name; layout: ``native`` or ``compressed_tensors``;
    prefix: cut off every stored name, as in hub files of a bare base model.
    """
    model = save_tiny(arch, folder)
    for parameter in model.parameters():  # not model.to(): rotary tables stay float32, as loading keeps them
        parameter.data = parameter.data.to(dtype)
    plain = folder / "model.safetensors"
    tensors = {name: t.to(dtype) for name, t in load_file(plain).items()}
    plain.unlink()
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    entries, linears = {}, linears_of(model)
    for name, module in linears.items():
        format = formats(name) if callable(formats) else formats
        transposed = isinstance(module, Conv1D)
        weight = module.weight.detach().float()
        weight = weight.T.contiguous() if transposed else weight
        q = format.quantize(weight)
        decoded = q.dequantize(dtype)
        module.weight.data = decoded.T.contiguous() if transposed else decoded
        stored = name.removeprefix(prefix)
        del tensors[f"{stored}.weight"]
        tensors |= layout.to_dict(stored, q)
        entries[stored] = native.Entry(format=format, shape=tuple(weight.shape), transposed=transposed)
    if layout is native:
        config = native.quantization_config(entries)
    else:
        config = compressed_tensors.quantization_config(
            {n: e.format for n, e in entries.items()}, ["lm_head"]
        )
    save_tensors(plain, tensors)
    _edit(folder / "config.json", quantization_config=config, dtype=str(dtype).removeprefix("torch."))
    return model


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_qtensor(a, b) -> bool:
    """Codes, steps and offsets equal to any depth."""
    if not isinstance(a, torch.Tensor) and a is not None:
        return a.shape == b.shape and all(
            same_qtensor(getattr(a, p), getattr(b, p)) for p in ("codes", "scale", "zero")
        )
    return (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def copy_with_config(folder: Path, to: Path, **changes) -> Path:
    """A copy of a checkpoint folder with some keys of its config.json replaced."""
    shutil.copytree(folder, to)
    _edit(to / "config.json", **changes)
    return to
