"""The compiled loops: the decoded numbers are the reference's bit for bit, products agree up to rounding."""

import pytest
import torch
from quantized import FORMATS
from torch.nn import functional as F

from fewbit.format import (
    FP16,
    FP32,
    Channel,
    Clusters,
    Codebook,
    Format,
    Gaussian,
    Group,
    MinMax,
    PerTensor,
    QTensor,
    Tiles,
    Zero,
)
from fewbit.grid import Learned, Table, Trellis, by_name
from fewbit.kernel import compiled, linear
from fewbit.kernel.pick import pick
from fewbit.nn import QLinear

OUT, IN = 64, 96


def trellis(code: str, rate: int, state_bits: int = 9) -> Format:
    grid = Trellis(code=code, rate=rate, state_bits=max(state_bits, 2 * rate * (2 if code == "hyb" else 1)))
    return Format(grid=grid, range=Gaussian(), scale=FP32)


def learned(grid: Learned, block, rows: bool = False) -> Format:
    steps = {"block": Channel(), "scale": FP16} if rows else {}
    return Format(
        grid=grid, **steps, range=Clusters(iterations=2), codebook=Codebook(block=block, store=FP16)
    )


def offsets(grid: str) -> Format:
    return Format(grid=by_name(grid), block=Group(32), zero=Zero.OFFSET, range=MinMax(), scale=FP16)


MORE = (
    *(trellis(code, rate) for code in ("mad", "inst", "hyb") for rate in (1, 2, 3, 4)),
    learned(Learned(2, 4), Tiles(384, 32)),
    learned(Learned(1, 3), Group(48), rows=True),
    learned(Learned(1, 4), Channel()),
    learned(Learned(8, 5, 2), PerTensor(), rows=True),
    learned(Learned(4, 4, 3), Tiles(1024), rows=True),
    Format(grid=Table("three", (-1, 0, 2.5)), block=Channel(), scale=FP32),
    offsets("int4"),
    offsets("nf4"),
)
KNOWN = [fmt for fmt in (*FORMATS, *MORE) if compiled.supports(fmt)]


def weight(rows: int = OUT, columns: int = IN, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_weight_is_small(monkeypatch):
    monkeypatch.setattr(linear, "_SMALL", 0)


def test_it_knows_what_methods_write():
    assert len(KNOWN) > 100
    assert {fmt.grid for fmt in MORE} <= {fmt.grid for fmt in KNOWN}
    grids = {str(fmt.grid) for fmt in KNOWN}
    assert {"int4", "nf4", "e2m1", "e4m3fn", "higgs-p2-n16", "e8p", "e8p-3b", "e8p-4b"} <= grids


@pytest.mark.parametrize("fmt", KNOWN, ids=str)
def test_decoded_rows_are_the_reference_s_bit_for_bit(fmt):
    q = fmt.quantize(weight())
    run = compiled.decoder(q)
    want = q.dequantize()
    if run is None:
        assert "flat" in str(fmt)  # blocks that end within a row
        return
    assert torch.equal(compiled.decode(run, 0, OUT, IN), want)
    assert torch.equal(compiled.decode(run, 5, 41, IN), want[5:41])
    for at in (0, 17, IN - 1):  # and so are those that are multiplied: 1 w + 0 + ... is w
        unit = F.one_hot(torch.tensor([at]), IN).float()
        assert torch.equal(compiled.multiply(run, unit, q.shape)[0], want[:, at])


@pytest.mark.parametrize("code", ["mad", "hyb"])
@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_a_trellis_of_16_bits_with_every_bit_at_random(code, rate):
    fmt = Format(grid=Trellis(code=code, rate=rate, state_bits=16), range=Gaussian(), scale=FP32)
    bits = torch.randint(0, 2, (48, 5, 16 * rate), generator=torch.Generator().manual_seed(rate))
    codes = (bits << torch.arange(16 * rate)).sum(-1).to(fmt.grid.code_dtype)
    q = QTensor(codes=codes, scale=torch.tensor(0.3), zero=None, format=fmt, shape=torch.Size((48, 80)))
    assert torch.equal(compiled.decode(compiled.decoder(q), 0, 48, 80), q.dequantize())


@pytest.mark.parametrize("fmt", [MORE[1], MORE[12], by_name("int4"), by_name("e8p")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_no_worse_than_the_eager_ones(fmt, dtype):
    fmt = fmt if isinstance(fmt, Format) else Format(grid=fmt, block=Group(32), scale=FP32)
    for rows, columns, tokens in ((OUT, IN, (1,)), (16, 32, (2, 3)), (48, 480, (0,)), (OUT, IN, (9, 2))):
        q, bias = fmt.quantize(weight(rows, columns)), weight(1, rows, 1)[0]
        x = weight(max(1, torch.Size(tokens).numel()), columns, 2)[: torch.Size(tokens).numel()]
        x = x.view(*tokens, columns).to(dtype)
        exact = F.linear(x.double(), q.dequantize(torch.float64), bias.to(dtype).double())
        assert pick(linear.IMPLEMENTATIONS, "cpu", fmt, dtype) is linear.COMPILED
        fast = linear.linear(x, q, bias)
        eager = linear.EAGER.run(x, q, bias)
        assert (fast.dtype, fast.shape) == (dtype, exact.shape)
        close = 2 * (eager - exact).abs().amax() if x.numel() else 0.0
        assert not x.numel() or (fast - exact).abs().amax() <= close + 1e-6 * exact.abs().amax()


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "_PART", 512)
    for fmt in (MORE[1], MORE[2], MORE[13]):
        q, x = fmt.quantize(weight()), weight(3, IN, 2)
        run = compiled.decoder(q)
        alone = compiled.multiply(run, x, q.shape), compiled.decode(run, 3, 50, IN)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 5)
            assert torch.equal(compiled.multiply(run, x, q.shape), alone[0])
            assert torch.equal(compiled.decode(run, 3, 50, IN), alone[1])


def test_a_prompt_is_multiplied_in_parts_that_stay_in_cache(monkeypatch):
    layer, x = QLinear(MORE[1].quantize(weight()), weight(1, OUT, 3)[0]), weight(7, IN, 2)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(linear, "_CACHED", 7 * IN)
        torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)


def test_gradients_go_the_eager_way():
    layer, x = QLinear(MORE[1].quantize(weight())), weight(2, IN, 2).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.qweight.dequantize().sum(0).expand(2, -1))


def test_a_code_without_a_point_decodes_to_nan_and_not_to_what_lies_beyond():
    q = Format(grid=Table("three", (-1, 0, 2.5)), block=Channel(), scale=FP32).quantize(weight(2, 4))
    q.codes[1, 2] = 3
    assert compiled.decode(compiled.decoder(q), 0, 2, 4).isnan().nonzero().tolist() == [[1, 2]]
