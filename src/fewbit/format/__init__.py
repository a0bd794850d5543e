"""Formats: the types of quantized tensors, and the usual ones for scales."""

from fewbit.format.block import BLOCKS, Block, Block2d, Channel, Flat, Group, PerTensor, Token
from fewbit.format.fit import MSE, RANGES, AbsMax, MinMax, Percentile, Range
from fewbit.format.format import Divisor, Format, Params, Zero
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid import by_name

FP32 = Format(grid=by_name("fp32"))
FP16 = Format(grid=by_name("fp16"))
BF16 = Format(grid=by_name("bf16"))
E8M0 = Format(grid=by_name("e8m0"))
# NVFP4's scales: E4M3 over one float32 scale for the tensor.
E4M3_OVER_FP32 = Format(grid=by_name("ue4m3"), block=PerTensor(), scale=FP32)
# QLoRA's double quantization: scales in 8 bits, blocks of 256, their centre kept as an offset.
DOUBLE_QUANT = Format(grid=by_name("dynamic8"), block=Flat(256), range=MinMax(), zero=Zero.OFFSET, scale=FP32)
SCALES = (FP32, FP16, BF16, E8M0, E4M3_OVER_FP32, DOUBLE_QUANT)

__all__ = [
    "BF16", "BLOCKS", "DOUBLE_QUANT", "E4M3_OVER_FP32", "E8M0", "FP16", "FP32", "MSE", "RANGES", "SCALES",
    "AbsMax", "Block", "Block2d", "Channel", "Divisor", "Flat", "Format", "Group", "MinMax", "Params",
    "PerTensor", "Percentile", "QTensor", "Range", "Token", "Zero", "value_of",
]  # fmt: skip
