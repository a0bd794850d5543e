"""Integers: the published ranges, ties to even, offset binary fields."""

import pytest
import torch

from fewbit.grid import Int


@pytest.mark.parametrize("bits", range(1, 9))
def test_ranges(bits):
    half = 2 ** (bits - 1)
    signed, unsigned = Int(bits), Int(bits, signed=False)
    assert signed.codes().tolist() == list(range(-half, half))
    assert unsigned.codes().tolist() == list(range(2**bits))
    assert (signed.name, unsigned.name) == (f"int{bits}", f"uint{bits}")
    assert (signed.code_dtype, unsigned.code_dtype) == (torch.int8, torch.uint8)
    assert signed.to_unsigned(signed.codes()).tolist() == list(range(2**bits))
    if bits > 1:
        narrow = Int(bits, narrow=True)
        assert narrow.name == f"int{bits}-narrow"
        assert narrow.codes().tolist() == list(range(-half + 1, half))
        assert narrow.min == -narrow.max
        # The same number packs to the same field whether or not the grid is narrow.
        assert narrow.to_unsigned(narrow.codes()).tolist() == list(range(1, 2**bits))


def test_ties_go_to_even_and_the_ends_clamp():
    x = torch.tensor([-9.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49, 7.5, 300.0])
    assert Int(4).round(x).tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 3, 7, 7]
    assert Int(4, narrow=True).round(x).tolist() == [-7, -7, -2, -2, 0, 0, 2, 2, 3, 7, 7]
    assert Int(4, signed=False).round(x).tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 3, 8, 15]
    assert Int(8, signed=False).round(torch.tensor([254.5, 255.5, 1e9])).tolist() == [254, 255, 255]


def test_the_code_is_the_integer():
    codes = Int(8).codes()
    assert torch.equal(Int(8).value(codes), codes.float())
    assert torch.equal(Int(8).value(codes, torch.bfloat16).float(), codes.float())
    assert Int(8).to_unsigned(torch.tensor([-128, -1, 0, 127], dtype=torch.int32)).tolist() == [
        0,
        127,
        128,
        255,
    ]


def test_stochastic_rounding_of_half_precision_is_not_coarse():
    """2^-13 is below what 11 random bits resolve: in float16 arithmetic the rate would be 0 or 2^-11."""
    n = 2**19
    x = torch.full((n,), 2.0**-13, dtype=torch.float16)
    ones = int(Int(4).round(x, torch.Generator().manual_seed(0)).sum())
    assert abs(ones - n * 2.0**-13) < 4 * (n * 2.0**-13) ** 0.5
