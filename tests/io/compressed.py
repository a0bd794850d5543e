"""What compressed-tensors holds: Formats, pairs of Formats, and a weight through its layout."""

import json

import torch
from quantized import int_format

from fewbit.format import (
    BF16,
    FP16,
    FP32,
    Block2d,
    Channel,
    Divisor,
    Format,
    Group,
    MinMax,
    PerTensor,
    Token,
    Zero,
    format_by_name,
)
from fewbit.format.activation import Activation
from fewbit.grid import Int, by_name
from fewbit.io import compressed_tensors as ct

SHAPE = (64, 96)


E4M3 = by_name("e4m3fn")


HELD = (
    *(
        int_format(b, asymmetric=a, block=k)
        for b in range(1, 9)
        for a in (False, True)
        for k in (Group(32), Channel())
    ),
    *(int_format(4, asymmetric=True, scale=s) for s in (FP16, BF16)),
    int_format(4, divisor=Divisor.FULL, scale=FP16),
    Format(grid=Int(4, narrow=True), block=Group(32), scale=FP16),
    Format(grid=by_name("uint4"), block=Group(32), zero=Zero.INTEGER, range=MinMax(), scale=FP16),
    *(Format(grid=E4M3, block=k, scale=FP32) for k in (PerTensor(), Channel(), Block2d(32, 48))),
    Format(grid=E4M3, block=Channel(), scale=BF16),
    *(format_by_name(name) for name in ("nvfp4", "mxfp4", "mxfp6-e2m3", "mxfp8-e4m3")),
)


TOKEN, TENSOR = ({"block": block, "scale": FP32} for block in (Token(), PerTensor()))


# Weights with inputs: W8A8 in int8 and FP8, dynamic and static, and MX formats.
WITH_INPUTS = (
    *(
        (int_format(8, block=b, asymmetric=z), Activation(format=Format(grid=Int(8), **x), static=s))
        for b, z, x, s in (
            (Channel(), False, TOKEN, False),
            (Channel(), True, TOKEN, False),
            (PerTensor(), False, TENSOR, False),
            (PerTensor(), True, TENSOR, True),
        )
    ),
    *(  # W4A8: fewer bits for the weights than for inputs
        (int_format(b, block=k, asymmetric=z), Activation(format=int_format(8, block=Token(), asymmetric=y)))
        for b, k, z, y in (
            (4, Group(32), False, False),
            (4, Channel(), False, True),
            (4, Group(32), True, False),
            (3, Group(32), False, False),
            (8, Channel(), False, True),
        )
    ),
    *(
        (Format(grid=E4M3, block=b, scale=FP32), Activation(format=Format(grid=E4M3, **x), static=s))
        for b, x, s in (
            (Channel(), TOKEN, False),
            (PerTensor(), TENSOR, True),
            (Block2d(32, 48), {"block": Group(48), "scale": FP32}, False),
        )
    ),
    *((format_by_name(name), Activation(format=format_by_name(name))) for name in ("mxfp4", "mxfp8-e4m3")),
)


INT8 = Format(grid=Int(8), **TOKEN)


ROWS = int_format(8, block=Channel())


def weight(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read_back(fmt: Format, shape=SHAPE):
    """A weight through ``to_dict``, the configuration as JSON, and back."""
    q = fmt.quantize(weight(shape))
    stored = ct.to_dict("m", q)
    config = json.loads(json.dumps(ct.quantization_config({"m": fmt}, [])))
    read = ct.formats_from_config(config, {"m": stored["m.weight_scale"].dtype})["m"]
    assert sorted(ct.names("m", read, shape)) == sorted(stored)
    return q, ct.from_dict("m", stored, read, shape)
