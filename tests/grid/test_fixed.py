"""Fixed point: named by its split, the numbers of an integer times 2^-n, MXINT8's element."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.grid import GRIDS, Fixed, Int, by_name

SPLITS = [
    Fixed(bits, fraction=fraction, signed=signed)
    for signed in (True, False)
    for bits in range(1, 11)
    for fraction in range(bits - signed + 1)
]


@pytest.mark.parametrize("name", ["q1.6", "q0.7", "q3.4", "uq0.8", "q0.15", "q7.8"])
def test_the_common_ones_are_listed(name):
    assert isinstance(by_name(name), Fixed)
    assert by_name(name) in GRIDS


def test_the_element_of_mxint8_counts_64ths():
    q1_6 = by_name("q1.6")
    assert (q1_6.bits, q1_6.min, q1_6.max, q1_6.least) == (8, -2.0, 127 / 64, 1 / 64)
    assert by_name("q1.6-narrow").min == -127 / 64
    assert q1_6.value(torch.tensor([64, -128, 1, 127], dtype=torch.int8)).tolist() == [
        1,
        -2,
        1 / 64,
        127 / 64,
    ]


def test_every_split_has_a_name_and_comes_back_by_it():
    for grid in (*SPLITS, Fixed(8, fraction=6, narrow=True), Fixed(16, fraction=16, signed=False)):
        assert by_name(grid.name) == grid
        assert by_name(grid.name.upper()) == grid
    assert Fixed(7, fraction=3).name == "q3.3"
    assert Fixed(8, fraction=8, signed=False).name == "uq0.8"


def test_up_to_eight_bits_it_is_the_integer_grid_in_steps():
    """Codes, ties, saturation and stored fields are those of Int at x 2^n."""
    x = torch.cat([torch.linspace(-300, 300, 4801), torch.tensor([torch.inf, -torch.inf, -0.0])])
    for bits, signed in ((8, True), (8, False), (5, True), (1, False)):
        for fraction in range(bits - signed + 1):
            grid, twin = Fixed(bits, fraction=fraction, signed=signed), Int(bits, signed=signed)
            y = x / 2**fraction
            assert torch.equal(grid.round(y), twin.round(x))
            assert torch.equal(grid.to_unsigned(grid.codes()), twin.to_unsigned(twin.codes()))
            assert torch.equal(grid.value(grid.codes()) * 2**fraction, twin.value(twin.codes()))
            g1, g2 = (torch.Generator().manual_seed(5) for _ in range(2))
            assert torch.equal(grid.round(y, g1), twin.round(x, g2))


def test_sixteen_bits_hold_every_code_in_every_dtype_that_can():
    for name in ("q0.15", "q15.0", "uq0.16", "uq16.0"):
        grid = by_name(name)
        codes = grid.codes()
        assert len(codes) == 2**16
        assert torch.equal(grid.round(grid.value(codes)), codes)
        assert torch.equal(grid.from_unsigned(grid.to_unsigned(codes)), codes)
        assert int(grid.to_unsigned(codes).max()) == 2**16 - 1


def test_impossible_splits_are_refused_in_a_sentence():
    with pytest.raises(InputError, match="1 to 16 bits"):
        by_name("q9.9")
    with pytest.raises(InputError, match="0 to 7 fraction bits"):
        Fixed(8, fraction=8)
    with pytest.raises(InputError, match="fraction bits"):
        Fixed(8, fraction=-1)
    with pytest.raises(InputError, match="narrow"):
        Fixed(8, fraction=4, signed=False, narrow=True)
    with pytest.raises(InputError, match="no grid named 'q4_0'"):
        by_name("q4_0")
