"""E8P and residual codes: built as published, encoded exactly, and as good on Gaussian data as they claim."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Format, Gaussian, PerTensor
from fewbit.grid import E8P, GRIDS, Int, Residual, by_name, describe, lattice
from fewbit.io import native

GRID = E8P()
CODES = GRID.codes()
POINTS = GRID.value(CODES, torch.float64)


def gaussian(n, seed=0):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def nearest(x):
    """Squared distance of x [N, 8] to the nearest of all 65536 points, and its code, in float64."""
    parts = [torch.cdist(p, POINTS, compute_mode="donot_use_mm_for_euclid_dist").min(1) for p in x.split(256)]
    return torch.cat([p.values for p in parts]).square(), torch.cat([p.indices for p in parts])


def gaussian_format(name, rho):
    return Format(grid=by_name(name), block=PerTensor(), range=Gaussian(rho=rho), scale=FP32)


# -- the codebook


def test_the_patterns_pack_into_the_published_words():
    table = lattice.patterns()
    table[:, 7] *= 1 - 2 * (table.sum(1) % 2)
    nibbles = (2 * table[:, [0, 2, 4, 6, 1, 3, 5, 7]] + 8).long()
    words = (nibbles << 4 * torch.arange(8)).sum(1).tolist()
    known = {0: 0x99999999, 1: 0x59999999, 2: 0xD9999999}
    known |= {226: 0x799B999D, 227: 0x5B99BB9B, 255: 0x7B9BBB9B}
    assert {i: words[i] for i in known} == known
    norms = lattice.patterns().square().sum(1)
    assert {int(v): int((norms == v).sum()) for v in norms.unique()} == {
        2: 1,
        4: 8,
        6: 28,
        8: 64,
        10: 126,
        12: 29,
    }


def test_the_points_are_shifted_half_integers_with_an_even_sum():
    assert len(POINTS.unique(dim=0)) == len(CODES) == 2**16
    byte = CODES.long() & 255
    odd = sum(byte >> i for i in range(8)) & 1
    plain = POINTS - (0.25 - 0.5 * odd)[:, None]
    assert bool(((plain - 0.5) % 1 == 0).all())
    assert bool((plain.sum(1) % 2 == 0).all())
    assert POINTS.square().mean().sqrt() == 1.09375
    assert (POINTS.min(), POINTS.max(), GRID.least) == (GRID.min, GRID.max, 0.25)


def test_all_codes_come_back_from_values_and_fields():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(GRID.round(GRID.value(CODES, dtype)), CODES)
    assert CODES.dtype == torch.int16
    fields = GRID.to_unsigned(CODES)
    assert torch.equal(fields, torch.arange(2**16, dtype=torch.int32))
    assert torch.equal(GRID.from_unsigned(fields), CODES)
    assert torch.equal(GRID.value(fields), GRID.value(CODES))


# -- encoding


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 30.0, 1e4])
def test_round_is_the_brute_force_nearest(scale):
    x = gaussian(600, seed=1).double() * scale
    distance, codes = nearest(x)
    assert torch.equal(GRID.round(x).long() & 0xFFFF, codes)
    near = (x - GRID.value(GRID.round(x.float()), torch.float64)).square().sum(1)
    assert torch.allclose(near, distance, rtol=1e-5, atol=1e-5)


def test_equally_near_points_are_as_near_as_any_and_chosen_by_rule():
    """On a lattice of quarters about half of all vectors have several nearest points."""
    x = torch.randint(-12, 13, (1500, 8), generator=torch.Generator().manual_seed(2)) / 4
    distance, _ = nearest(x.double())
    assert torch.allclose((x - GRID.snap(x)).square().sum(1).double(), distance, rtol=0, atol=1e-9)
    assert torch.equal(GRID.snap(torch.zeros(8)), torch.full((8,), -0.25))  # both shifts: that of +1/4


def test_rows_do_not_depend_on_their_company_or_on_threads():
    x = gaussian(5000)
    codes = GRID.round(x)
    assert torch.equal(torch.cat([GRID.round(x[i : i + 617]) for i in range(0, 5000, 617)]), codes)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(GRID.round(x), codes)
    finally:
        torch.set_num_threads(threads)


def test_infinities_saturate_and_empty_tensors_stay():
    x = torch.full((2, 8), torch.inf)
    x[1] = -x[1]
    assert torch.equal(GRID.snap(x).sign(), x.sign())
    assert GRID.round(x[:0]).shape == (0,)
    assert GRID.round(x.view(1, 2, 8)).shape == (1, 2)
    with pytest.raises(InputError, match="cannot round at random"):
        GRID.round(x, torch.Generator())
    with pytest.raises(InputError, match=r"rounds vectors \[..., 8\]"):
        GRID.round(torch.zeros(16))


# -- Gaussian data


@pytest.mark.parametrize(
    ("name", "rho", "expected", "within"),
    [
        ("e8p", 1.03, 0.0914, 0.001), ("e8p", 1.0, 0.0919, 0.001), ("e8p", 0.9, 0.0991, 0.001),
        ("e8p-3b", 0.98, 0.0294, 0.0003), ("e8p-4b", 1.03, 0.0095, 0.0003),
    ],
)  # fmt: skip
def test_error_on_gaussian_data_is_the_published_one(name, rho, expected, within):
    w = gaussian(2**15, seed=3).view(512, 512) * 0.02
    q = gaussian_format(name, rho).quantize(w)
    error = ((q.dequantize() - w).square().mean() / w.square().mean()).item()
    assert error == pytest.approx(expected, abs=within)
    assert q.bits_per_weight == by_name(name).bits / 8 + 32 / w.numel()


def test_rho_divides_the_step():
    w = gaussian(64)
    steps = [gaussian_format("e8p", rho).fit(w).scale.item() for rho in (1.0, 0.9)]
    assert steps == pytest.approx([w.square().mean().sqrt().item() / rho for rho in (1.0, 0.9)], rel=1e-6)
    with pytest.raises(InputError, match="rho 0"):
        Gaussian(rho=0)


# -- residual codes


@pytest.mark.parametrize("name", ["e8p-3b", "e8p-4b"])
def test_a_residual_code_is_its_two_codes_side_by_side(name):
    grid, x = by_name(name), gaussian(500)
    first = GRID.round(x)
    second = grid.second.round((x - GRID.value(first)) * grid.gain)
    fields = grid.to_unsigned(grid.round(x)).long()
    assert torch.equal(fields & 0xFFFF, GRID.to_unsigned(first).long())
    assert torch.equal(fields >> 16, grid.second.to_unsigned(second).long())
    assert torch.equal(grid.snap(x), GRID.value(first) + grid.second.value(second) / grid.gain)
    assert torch.equal(grid.from_unsigned(fields), grid.round(x))
    assert grid.value(grid.round(x)).abs().max() <= grid.max == -grid.min or name == "e8p-3b"


def test_the_one_bit_codebook_is_e8_up_to_norm_2_and_15_points_beyond():
    grid = by_name("e8p-3b").second
    points = grid.value(grid.codes())
    norms = points.square().sum(1)
    assert {int(v): int((norms == v).sum()) for v in norms.unique()} == {0: 1, 2: 240, 4: 15}
    assert bool((points.sum(1) % 2 == 0).all())
    gaps = torch.pdist(points)
    assert gaps.min() ** 2 == pytest.approx(2)  # the least distance of E8
    assert not bool((points == torch.tensor([0.0] * 7 + [-2])).all(1).any())


def test_residuals_of_scalars_and_of_stored_points():
    x = gaussian(100).view(-1)
    scalar = Residual(Int(3), Int(3), 8.0)
    want = x.clamp(-4, 3)
    assert (scalar.snap(want) - want).abs().max() <= 0.5 / 8 + 1e-6 + 0.5 / 8
    assert (scalar.bits, scalar.width, scalar.code_dtype) == (6, 1, torch.uint8)
    assert torch.equal(scalar.from_unsigned(scalar.to_unsigned(scalar.round(x))), scalar.round(x))
    pairs = Residual(by_name("higgs-p2-n16"), by_name("higgs-p2-n16"), 3.0)
    y = x.view(-1, 2)
    assert (pairs.snap(y) - y).square().mean() < 0.25 * (pairs.first.snap(y) - y).square().mean()
    long = Residual(by_name("e8p-4b"), GRID, 12.0)
    assert long.code_dtype == torch.int64
    z = gaussian(300) / 1.03
    assert (long.snap(z) - z).square().mean() < 0.3 * (by_name("e8p-4b").snap(z) - z).square().mean()
    for bad in ((GRID, Int(4), 2.0), (GRID, GRID, 0.0), (long, long, 9.0)):
        with pytest.raises(InputError, match="no residual code"):
            Residual(*bad)


# -- as grids of the library


@pytest.mark.parametrize("name", ["e8p", "e8p-3b", "e8p-4b"])
def test_a_checkpoint_holds_the_nominal_bits_and_gives_the_weight_back(name):
    fmt, w = gaussian_format(name, 1.0), gaussian(32 * 24).view(32, 192)
    q = fmt.quantize(w)
    stored = native.to_dict("x", q)
    back = native.from_dict("x", stored, fmt, (32, 192))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert stored["x.codes"].nbytes * 8 == w.numel() * fmt.grid.bits / 8
    assert (
        native.entries_from_config(
            native.quantization_config({"x": native.Entry(format=fmt, shape=(32, 192))})
        )["x"].format
        == fmt
    )


@pytest.mark.parametrize("name", ["e8p", "e8p-3b", "e8p-4b"])
def test_they_are_named_values(name):
    grid = by_name(name)
    assert grid in GRIDS
    assert (describe(grid).name, describe(grid).bits, describe(grid).max) == (name, grid.bits, grid.max)
    for twin in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
        assert twin == grid
        assert hash(twin) == hash(grid)


def test_importing_builds_no_table():
    code = "import fewbit; from fewbit.grid import lattice as l; print(l._points.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
