"""Claims: codes that a grid does not have, and orders of columns that are none, are refused on reading."""

import pytest
import torch
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import FP32, Format, Group
from fewbit.grid import Table
from fewbit.io import native

W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def test_a_code_beyond_the_table():
    fmt = Format(grid=Table("ternary", (-1.0, 0.0, 1.0)), block=Group(32), scale=FP32)
    stored = native.to_dict("m", fmt.quantize(W))
    native.from_dict("m", stored, fmt, (8, 64))
    stored["m.codes"].fill_(255)
    with pytest.raises(InputError, match="codes that ternary does not have"):
        native.from_dict("m", stored, fmt, (8, 64))


@pytest.mark.parametrize("order", [[0] * 64, [-1, *range(1, 64)], [*range(63), 64]])
def test_an_order_that_does_not_list_each_column_once(order):
    fmt = int_format(4)
    stored = native.to_dict("m", fmt.quantize(W)) | {"m.order": torch.tensor(order, dtype=torch.int32)}
    with pytest.raises(InputError, match="does not list each of 64 columns once"):
        native.from_dict("m", stored, fmt, (8, 64), None, True)
