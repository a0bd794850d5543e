"""FP8 casts: both layouts, power-of-two steps, folded steps; the Triton kernels in their interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from fewbit.format import Params
from fewbit.kernel.cast import GRIDS, cast_fp8, cast_gradient_fp8, rows

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def wide(*shape, seed=0):
    """Rows over twelve decades, one of them zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.logspace(-6, 6, shape[0])[:, None]
    x[3] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_is_the_format_with_power_of_two_steps(dtype):
    x = wide(40, 24)
    q, qt, step = cast_fp8(x, x.abs().amax(1), dtype)
    own = rows(dtype).fit(x)
    assert torch.equal(step, own.scale.flatten())
    codes = rows(dtype).encode(x, Params(scale=own.scale, zero=None)).codes
    assert torch.equal(q.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(qt.view(torch.uint8), codes.t().view(torch.uint8))
    assert qt.is_contiguous()
    assert (torch.frexp(step)[0] == 0.5).all()
    largest = q.float().abs().amax(1)[x.abs().amax(1) > 0]  # no step is twice too large, nothing saturates
    assert (largest > GRIDS[dtype].max / 2 * 0.93).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_for_the_whole_tensor(dtype):
    x = wide(40, 24)[20:]
    q, qt, step = cast_fp8(x, x.abs().amax(), dtype)
    assert step.shape == ()
    assert torch.equal(q.float().t(), qt.float())
    top = x.abs() == x.abs().amax()
    assert ((q.float() * step - x)[top].abs() <= x[top].abs() * 2.0 ** -(3 + (dtype == DTYPES[0]))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_take_the_steps_of_the_other_operands_with_them(dtype):
    dy = wide(32, 48)
    s, a = 2.0 ** torch.randint(-9, 9, (48,)), 2.0 ** torch.randint(-9, 9, (32,))
    g, r, ht, c = cast_gradient_fp8(dy, s, a, dtype)
    half, least = (2.0**-4, 2.0**-6) if dtype == DTYPES[0] else (2.0**-3, 2.0**-14)
    for codes, step, exact in ((g, r, dy * s), (ht, c, (dy * a[:, None]).t())):
        normal = exact.abs() >= least * step[:, None]
        error = (codes.float() * step[:, None] - exact).abs()
        assert normal.float().mean() > 0.1
        assert (error <= half * exact.abs())[normal].all()


def test_nan_and_infinity_take_their_row_and_no_other():
    x = wide(16, 8)
    x[5, 2], x[9, 1] = torch.nan, torch.inf
    q, qt, _ = cast_fp8(x, x.abs().amax(1), DTYPES[0])
    bad = torch.zeros(16, dtype=torch.bool)
    bad[[5, 9]] = True
    assert torch.equal(q.float().isnan().all(1), bad)
    assert torch.equal(qt.float().isnan().any(0), bad)
    g, r, ht, _c = cast_gradient_fp8(x, torch.ones(8), torch.ones(16), DTYPES[0])
    assert torch.equal(g.float().isnan().all(1), bad)
    assert torch.equal(r.isnan(), bad)
    assert ht.float().isnan().any(1).nonzero().flatten().tolist() == [1, 2]  # the columns that hold them


def test_the_triton_kernels_equal_the_reference_in_their_interpreter():
    # Points of the grid, so that nothing is rounded: the interpreter's casts to FP8 lose carries.
    code = """
import torch
from fewbit.kernel import cast, cast_triton
torch.manual_seed(0)
def same(a, b):
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(a, b, strict=True)), dtype
for dtype, grid in cast.GRIDS.items():
    points = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    points = points[points.isfinite()]
    x = points[torch.randint(0, len(points), (40, 72))]
    x[:, 0] = grid.max
    x *= 2.0 ** torch.randint(-9, 9, (40, 1))
    x[5] = 0
    x, wide = x.bfloat16(), x  # other dtypes than bfloat16 take another way to the transpose
    same(cast.cast_fp8(wide, wide.abs().amax(1), dtype), cast_triton.cast(wide, wide.abs().amax(1), dtype))
    whole = points[torch.randint(0, len(points), (40, 72))]
    for x, amax in ((x, x.float().abs().amax(1)), (whole.bfloat16(), torch.tensor(grid.max))):
        same(cast.cast_fp8(x, amax, dtype), cast_triton.cast(x, amax, dtype, tile=(32, 32)))
    dy = torch.where(torch.rand(40, 72) < 0.5, -1.0, 1.0) * 2.0 ** torch.randint(-3, 4, (40, 72))
    dy[3], dy[:, 7] = 0, 0
    s, a = 2.0 ** torch.randint(-3, 3, (72,)), 2.0 ** torch.randint(-3, 3, (40,))
    small = dict(tile=(32, 32), look=(16, 32, 2))
    for dy in (dy, dy.bfloat16()):
        same(cast.cast_gradient_fp8(dy, s, a, dtype), cast_triton.cast_gradient(dy, s, a, dtype, **small))
print("equal")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the kernels on a GPU with the reference")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(520, 392), (256, 768), (4096, 256)], ids=str)
def test_the_kernels_equal_the_reference_on_a_gpu(dtype, of, shape):
    x = wide(*shape).clamp(-1e4, 1e4).to(of)
    s, a = 2.0 ** torch.randint(-9, 9, shape[1:]), 2.0 ** torch.randint(-9, 9, shape[:1])
    pairs = [(cast_fp8, (x, amax)) for amax in (x.float().abs().amax(1), x.float().abs().amax())]
    for run, args in (*pairs, (cast_gradient_fp8, (x, s, a))):
        for own, other in zip(run(*args, dtype), run(*(t.cuda() for t in args), dtype), strict=True):
            assert torch.equal(own.float(), other.cpu().float())
