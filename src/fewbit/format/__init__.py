"""Formats: the types of quantized tensors, the rules for their ranges, and the named ones."""

from fewbit.format.aciq import ACIQ
from fewbit.format.block import BLOCKS, Block, Block2d, Channel, Flat, Group, PerTensor, Tiles, Token
from fewbit.format.fit import (
    MSE,
    AbsMax,
    Clusters,
    MinMax,
    OutputMSE,
    Percentile,
    PowerOfTwo,
    Progressive,
    Range,
    Scaling,
)
from fewbit.format.format import Codebook, Divisor, Format, Params, Zero
from fewbit.format.leastsquares import LeastSquares
from fewbit.format.named import (
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    E8M0,
    FORMATS,
    FP16,
    FP32,
    SCALES,
    find_format,
    format_by_name,
)
from fewbit.format.octav import OCTAV
from fewbit.format.prior import Gaussian, Prior
from fewbit.format.qtensor import QTensor, value_of
from fewbit.format.stats import Need, Stats

RANGES = (
    AbsMax, MinMax, Percentile, MSE, OutputMSE, PowerOfTwo, Progressive, Gaussian, ACIQ, OCTAV, Clusters,
    LeastSquares,
)  # fmt: skip

__all__ = [
    "ACIQ", "BF16", "BLOCKS", "DOUBLE_QUANT", "E4M3_OVER_FP32", "E8M0", "FORMATS", "FP16", "FP32", "MSE",
    "OCTAV", "RANGES", "SCALES", "AbsMax", "Block", "Block2d", "Channel", "Clusters", "Codebook", "Divisor",
    "Flat", "Format", "Gaussian", "Group", "LeastSquares", "MinMax", "Need", "OutputMSE", "Params",
    "PerTensor", "Percentile", "PowerOfTwo", "Prior", "Progressive", "QTensor", "Range", "Scaling", "Stats",
    "Tiles", "Token", "Zero", "find_format", "format_by_name", "value_of",
]  # fmt: skip
