"""The trellis: its codes' values, its circular bit stream, what it stores and what it loses."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, MSE, Channel, Format, Gaussian
from fewbit.format.bits import pack, row_bytes, unpack
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import Trellis, by_name, trellis
from fewbit.solve import Ldlq, Stats

EVERY = [Trellis(code=code, rate=k, state_bits=16) for code in ("mad", "inst", "hyb") for k in (1, 2, 3, 4)]


def random_codes(grid, out=32, groups=3):
    """Every bit of the stream at random: codes [out, groups]."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (out, groups, grid.bits), generator=generator)
    return (bits << torch.arange(grid.bits)).sum(-1).to(grid.code_dtype)


@pytest.mark.parametrize(
    ("code", "mean", "rms", "kurtosis"), [("mad", -4e-4, 1.0001, 2.70), ("inst", 2e-4, 1.0, 2.88)]
)
def test_values_of_the_states_look_gaussian(code, mean, rms, kurtosis):
    x = Trellis(code=code).points().double()
    assert x.shape == (65536, 1)
    assert x.mean().item() == pytest.approx(mean, abs=1e-4)
    assert x.square().mean().sqrt().item() == pytest.approx(rms, abs=1e-4)
    assert (x / x.std()).pow(4).mean().item() == pytest.approx(kurtosis, abs=0.01)


def test_values_of_single_states():
    mad = Trellis(code="mad")
    assert mad.raw()[0].item() == sum((76625530).to_bytes(4, "little")) - 510
    assert mad.raw()[1].item() == sum((34038481 + 76625530).to_bytes(4, "little")) - 510
    assert len(mad.points().unique()) == 908 == mad.describe().distinct
    hyb = Trellis(code="hyb")
    assert hyb.points().square().mean().sqrt().item() == pytest.approx(1, abs=0.01)
    assert len(hyb.points().unique(dim=0)) == 1024  # 512 points and their mirror images


@pytest.mark.parametrize("grid", [*EVERY, Trellis(rate=3, state_bits=11)], ids=str)
def test_states_are_windows_of_one_circular_stream(grid):
    codes = random_codes(grid)
    states = grid.states(codes)  # [32, 3, 16 / V]
    tiles = states.unflatten(0, (2, 16)).transpose(1, 2).reshape(6, -1).tolist()
    streams = codes.unflatten(0, (2, 16)).transpose(1, 2).reshape(6, 16).tolist()
    for mine, rows in zip(tiles, streams, strict=True):
        bits = "".join(f"{row % 2**grid.bits:0{grid.bits}b}" for row in rows)
        assert len(bits) == 256 * grid.rate
        for t, state in enumerate(mine):
            end = (t + 1) * grid.shift
            assert f"{state:0{grid.state_bits}b}" == (bits + bits)[: end + len(bits)][-grid.state_bits :]
    assert torch.equal(grid.new_bits(torch.tensor(tiles)), torch.tensor(streams).to(grid.code_dtype))


@pytest.mark.parametrize("grid", EVERY, ids=str)
def test_packed_codes_come_back_and_hold_k_bits_a_weight(grid):
    codes = random_codes(grid)
    packed = pack(grid.to_unsigned(codes), grid.bits)
    assert packed.numel() == 32 * 48 * grid.rate / 8 == 32 * row_bytes(3, grid.bits)
    back = grid.from_unsigned(unpack(packed, grid.bits, 3))
    assert back.dtype == grid.code_dtype
    assert torch.equal(back, codes)
    values = grid.value(back)
    assert values.shape == (32, 3, 16)
    assert torch.equal(values.flatten(), grid.points()[grid.states(codes).flatten().long()].flatten())
    assert torch.equal(grid.value(codes, torch.float64).float(), values)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("qtip-mad-2b-l12", 0.0765), ("qtip-inst-2b-l12", 0.0755), ("qtip-hyb-2b-l12", 0.078),
        ("qtip-mad-2b-l10", 0.0795), ("qtip-mad-3b-l12", 0.020), ("qtip-mad-4b-l12", 0.0055),
    ],
)  # fmt: skip
def test_gaussian_error_lies_between_the_bound_and_the_published(name, most):
    grid = by_name(name)
    x = torch.randn(256, 4, 16, generator=torch.Generator().manual_seed(0)) * 0.95
    error = ((grid.snap(x) - x).square().mean() / x.square().mean()).item()
    assert 4.0**-grid.rate < error < most


@pytest.mark.parametrize("grid", [Trellis(rate=2, state_bits=8), Trellis(rate=4, state_bits=8)], ids=str)
def test_a_format_stores_k_bits_and_one_step(grid):
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    fmt = Format(grid=grid, range=Gaussian(rho=0.9), scale=FP32)
    q = fmt.quantize(w)
    assert q.codes.shape == (32, 3)
    assert q.scale.item() == pytest.approx(w.square().mean().sqrt().item() / 0.9, rel=1e-6)
    assert q.bits_per_weight == fmt.bits_per_weight(w.shape) == grid.rate + 32 / w.numel()
    assert (q.dequantize() - w).square().mean() < {2: 0.1, 4: 0.012}[grid.rate] * w.square().mean()
    assert not Format(grid=grid, block=Channel(), range=Gaussian(), scale=FP32).rows_independent
    assert from_plain(to_plain(fmt)) == fmt


def test_a_batch_of_matrices_is_its_matrices():
    grid = Trellis(rate=2, state_bits=8)
    x = torch.randn(2, 32, 3, 16, generator=torch.Generator().manual_seed(2))
    codes = grid.round(x)
    assert codes.shape == (2, 32, 3)
    assert torch.equal(codes[1], grid.round(x[1]))
    assert torch.equal(codes[0, 16:, 1:2], grid.round(x[0, 16:, 1:2]))  # and a tile is itself alone
    assert torch.equal(grid.value(codes)[1], grid.value(codes[1]))


def test_decoding_in_parts_changes_nothing(monkeypatch):
    grid = Trellis(rate=3)
    codes = random_codes(grid, 64, 5)
    whole = grid.value(codes)
    for cached in (1, 2 * 16 * 80 + 1):  # one row of tiles at a time, and two
        monkeypatch.setattr(trellis, "_CACHED", cached)
        assert torch.equal(grid.value(codes), whole)
        assert torch.equal(grid.value(codes.expand(2, 64, 5))[1], whole)
    assert grid.value(codes[:0]).shape == (0, 5, 16)


def test_a_layer_of_zeros_decodes_to_almost_zero():
    fmt = Format(grid=Trellis(rate=2, state_bits=8), range=Gaussian(), scale=FP32)
    assert fmt.quantize(torch.zeros(16, 32)).dequantize().abs().max() < 1e-30


def test_feedback_lowers_the_error_of_the_output():
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(32, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    h = x.T @ x / len(x)
    fmt = Format(grid=Trellis(rate=2, state_bits=10), range=Gaussian(rho=0.9), scale=FP32)
    error = {}
    for name, q in (("plain", fmt.quantize(w)), ("fed", Ldlq(act_order=False)(w, Stats(gram=h), fmt))):
        e = q.dequantize() - w
        error[name] = torch.einsum("oi,ij,oj->", e, h, e).item()
    assert error["fed"] < 0.7 * error["plain"]


def test_names_find_every_trellis():
    for grid in EVERY:
        assert by_name(grid.name) == grid
    assert by_name("QTIP-HYB-2b-L12") == Trellis(code="hyb", rate=2, state_bits=12)
    assert Trellis(rate=2).least == pytest.approx(1 / 147.800537109375)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: by_name("qtip-mad-5b-l16"), "rate of a trellis is a number from 1 to 4, got 5"),
        (lambda: by_name("qtip-mad-2b-l20"), "state_bits of a trellis is a number from 8 to 16, got 20"),
        (lambda: by_name("qtip-hyb-4b-l12"), "replaces 8 of its 12 state bits"),
        (lambda: Trellis(code="lut"), "mad, inst or hyb"),
        (lambda: Trellis().codes(), "points"),
        (lambda: Trellis().round(torch.zeros(8, 1, 16)), "multiple of 16"),
        (lambda: Trellis().round(torch.zeros(16, 1, 16), torch.Generator()), "at random"),
        (lambda: Trellis().value(torch.zeros(8, 1, dtype=torch.int32)), "multiple of 16"),
        (lambda: Format(grid=Trellis(), range=MSE(), scale=FP32), "Gaussian"),
        (
            lambda: Format(grid=Trellis(), range=Gaussian(), scale=FP32).quantize(torch.randn(24, 32)),
            "tiles of 16 rows",
        ),
        (
            lambda: Format(grid=Trellis(), range=Gaussian(), scale=FP32).quantize(torch.randn(32, 24)),
            "16 columns at once",
        ),
        (
            lambda: Format(grid=Trellis(), range=Gaussian(), scale=FP32).quantize(torch.randn(32)),
            "tiles of 16 rows",
        ),
    ],
)
def test_the_impossible_is_refused_in_words(make, says):
    with pytest.raises(InputError, match=says):
        make()
