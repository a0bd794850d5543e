"""Products of quantized matrices: the roads agree, and what CUDA refuses is refused everywhere."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Block2d, Channel, Format, Group, PerTensor
from fewbit.grid import by_name
from fewbit.kernel.scaled import DECODED, INT8, SCALED, check_scaled_mm, multiply

SHAPES = [(16, 32, 16), (1, 16, 48), (33, 80, 32), (48, 16, 16)]  # m, k, n


def pair(left, right, shape, blocks=(PerTensor(), PerTensor())):
    m, k, n = shape
    torch.manual_seed(0)
    formats = [
        Format(grid=by_name(g), block=b, scale=FP32) for g, b in zip((left, right), blocks, strict=True)
    ]
    return formats[0].quantize(torch.randn(m, k) * 3), formats[1].quantize(torch.randn(n, k))


def exact(a, b):
    return a.dequantize(torch.float64) @ b.dequantize(torch.float64).t()


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "blocks", [(PerTensor(), PerTensor()), (Channel(), Channel()), (Channel(), PerTensor())]
)
@pytest.mark.parametrize(("left", "right"), [("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn"), ("e4m3fn", "e5m2")])
def test_scaled_products_are_those_of_the_decoded_values(shape, blocks, left, right):
    a, b = pair(left, right, shape, blocks)
    for road in (SCALED, DECODED):
        assert error(road.run(a, b, torch.float32, False), exact(a, b)) < 1e-6
    assert error(SCALED.run(a, b, torch.bfloat16, True), exact(a, b)) < 4e-3


@pytest.mark.parametrize("shape", [*SHAPES, (3, 7, 5)], ids=str)
@pytest.mark.parametrize("blocks", [(Channel(), PerTensor()), (Channel(), Channel())])
def test_integer_products_are_those_of_the_decoded_values(shape, blocks):
    a, b = pair("int8-narrow", "int8-narrow", shape, blocks)
    assert INT8.supports(a, b)
    assert error(multiply(a, b), exact(a, b)) < 1e-6
    assert error(multiply(a, b, torch.float64), exact(a, b)) < 1e-7


def test_steps_along_the_sum_take_the_decoded_road():
    a, b = pair("int8-narrow", "int8-narrow", (16, 64, 32), (Group(32), Block2d(32, 32)))
    assert not INT8.supports(a, b)
    assert error(multiply(a, b), exact(a, b)) < 1e-6


def test_autocast_does_not_reach_into_products():
    a, b = pair("e4m3fn", "e4m3fn", (16, 64, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert error(multiply(a, b), exact(a, b)) < 1e-6


def fp8(rows, columns, dtype=torch.float8_e4m3fn):
    return torch.zeros(rows, columns).to(dtype)


ONE = torch.ones(())
REFUSED = {
    "multiples of 16, got k = 24": (fp8(16, 24), fp8(32, 24).t(), ONE, ONE),
    "n = 24": (fp8(16, 32), fp8(24, 32).t(), ONE, ONE),
    "the second by columns": (fp8(16, 32), fp8(32, 16), ONE, ONE),
    "the first matrix by rows": (fp8(32, 16).t(), fp8(16, 32).t(), ONE, ONE),
    "E5M2 by E5M2": (fp8(16, 32, torch.float8_e5m2), fp8(16, 32, torch.float8_e5m2).t(), ONE, ONE),
    "take E4M3 and E5M2": (torch.zeros(16, 32), fp8(16, 32).t(), ONE, ONE),
    r"give \[\] and \[\], or \[16, 1\]": (fp8(16, 32), fp8(48, 32).t(), torch.ones(8, 1), torch.ones(1, 48)),
    r"\[16, 1\] and \[\] do not fit": (fp8(16, 32), fp8(48, 32).t(), torch.ones(16, 1), ONE),
    "steps are float32": (fp8(16, 32), fp8(48, 32).t(), ONE.double(), ONE.double()),
    "no product of matrices": (fp8(16, 32), fp8(48, 16).t(), ONE, ONE),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cuda_refuses_is_refused_on_a_cpu(said):
    with pytest.raises(InputError, match=said):
        check_scaled_mm(*REFUSED[said])


def test_what_cuda_takes_is_taken():
    check_scaled_mm(fp8(7, 32), fp8(48, 32).t(), ONE, ONE)  # tokens are free
    check_scaled_mm(fp8(16, 32, torch.float8_e5m2), fp8(48, 32).t(), torch.ones(16, 1), torch.ones(1, 48))
