"""Tables: nearest by brute force, ties down, NF4 from its construction and as shipped."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.grid import Table, by_name, dynamic_map, normal_quantiles
from fewbit.grid.table import TABLES, _cells

SHIPPED_NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
SCRAMBLED = Table("scrambled", (0.5, -2.0, 7.0, 0.0, 0.5, -0.25))
DENSE = Table("dense", torch.linspace(-1, 1, 5000))  # too dense for the fast path


def brute_force(grid, x):
    """Nearest value in float64; values ascend and argmin takes the first of equals, hence the lower."""
    points = torch.tensor(sorted(set(grid.values)), dtype=torch.float64)
    return points[(x.double()[:, None] - points).abs().argmin(dim=1)]


@pytest.mark.parametrize("grid", [*TABLES, SCRAMBLED], ids=str)
@pytest.mark.parametrize("n", [300, 20_000])  # below and above the fast path's threshold
def test_round_is_the_brute_force_nearest(grid, n):
    g = torch.Generator().manual_seed(n)
    points = torch.tensor(sorted(set(grid.values)), dtype=torch.float64)
    middle = ((points[1:] + points[:-1]) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(s)) for s in (-torch.inf, torch.inf)]
    x = torch.cat([middle, *beside, 2.2 * grid.max * (torch.rand(n, generator=g) - 0.5)])
    x = x[(x == 0) | (x.abs() > 1e-30)]  # beside a midpoint at 0 the distances of a denormal agree in float64
    assert torch.equal(grid.value(grid.round(x), torch.float64), brute_force(grid, x))
    assert torch.equal(grid.round(x), grid.round(x.double()))


def test_a_table_too_dense_for_the_fast_path_is_still_exact():
    cpu = torch.device("cpu")
    assert _cells(DENSE, cpu) is None
    assert not any(_cells(grid, cpu) is None for grid in (*TABLES, SCRAMBLED))
    x = torch.rand(9000, generator=torch.Generator().manual_seed(0)) * 2.1 - 1.05
    assert DENSE.code_dtype == torch.int32
    assert DENSE.bits == 13
    assert torch.equal(DENSE.value(DENSE.round(x), torch.float64), brute_force(DENSE, x))


def test_fast_path_agrees_at_infinities_and_denormals():
    x = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    for grid in (*TABLES, SCRAMBLED):
        assert torch.equal(grid.round(x.repeat(2000)), grid.round(x).repeat(2000))
        assert grid.value(grid.round(x[:2])).tolist() == [grid.max, grid.min]


def test_ties_take_the_lower_value():
    grid = Table("even", (-4.0, -2.0, 0.0, 2.0))
    x = torch.tensor([-3.0, -1.0, 1.0])
    for y in (x, x.double(), x.half(), x.repeat(3000)):
        assert grid.value(grid.round(y))[:3].tolist() == [-4, -2, 0]


def test_codes_follow_the_given_order_and_repeats_take_the_first():
    x = torch.tensor([0.4, -9.0, 9.0, 0.1, -0.2])
    assert SCRAMBLED.round(x).tolist() == [0, 1, 2, 3, 5]
    assert SCRAMBLED.value(torch.tensor([4, 2], dtype=torch.uint8)).tolist() == [0.5, 7.0]


def test_nf4_is_the_shipped_table_and_its_construction():
    nf4 = by_name("nf4")
    assert nf4.values == tuple(float(v) for v in SHIPPED_NF4.split())
    built = normal_quantiles(4)
    assert max(abs(a - b) for a, b in zip(built, nf4.values, strict=True)) < 1e-6
    for bits in range(2, 9):
        values = normal_quantiles(bits)
        assert len(set(values)) == 2**bits
        assert list(values) == sorted(values)
        assert (values[0], values[2 ** (bits - 1) - 1], values[-1]) == (-1.0, 0.0, 1.0)
    with pytest.raises(InputError, match="2 to 8"):
        normal_quantiles(1)


def test_nf4_beats_e2m1_on_gaussian_blocks_as_measured():
    """Absmax blocks of 64 of N(0, 1): .00846 for NF4, .01117 for E2M1, .01488 for bitsandbytes' FP4."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    for name, published in (("nf4", 0.00846), ("af4", 0.00915), ("e2m1", 0.01117), ("fp4-bnb", 0.01488)):
        grid = by_name(name)
        scale = x.abs().amax(dim=1, keepdim=True) / grid.max
        error = grid.value(grid.round(x / scale)) * scale - x
        assert error.square().mean().item() == pytest.approx(published, rel=0.01), name


def test_fp4_of_bitsandbytes_keeps_its_scrambled_order():
    grid = by_name("fp4-bnb")
    want = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert torch.equal(grid.value(grid.codes()), torch.cat([want, -want]))
    assert grid.round(torch.tensor([0.0, -0.0, 1.0, 0.6, 0.26, -0.26])).tolist() == [0, 0, 3, 2, 7, 15]


def test_dynamic_map():
    grid = by_name("dynamic8")
    values = dynamic_map()
    assert len(set(grid.values)) == 256
    assert list(values) == sorted(values)
    assert (grid.values[127], grid.values[255]) == (0.0, 1.0)
    assert grid.values[0] == pytest.approx(-0.99296874, abs=1e-8)
    assert grid.values[128] == pytest.approx(0.55e-6)


def test_micro_scale_halves_or_keeps_a_pair():
    micro = by_name("micro1")
    assert (micro.bits, micro.values, micro.least) == (1, (0.5, 1.0), 0.5)


@pytest.mark.parametrize("name", ["midrise2", "nf4", "fp4-bnb"])
def test_compiled_rounding_is_the_eager_one_at_midpoints_and_their_neighbours_too(name):
    """Above 8192 elements, where the eager one goes by cells."""
    torch._dynamo.reset()
    grid = by_name(name)
    points = torch.unique(torch.tensor(grid.values, dtype=torch.float64))
    ties = ((points[1:] + points[:-1]) / 2).float()
    near = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))]
    x = torch.cat([*near, torch.tensor([-9.0, 9.0]), torch.linspace(-4, 4, 9001)])
    snap = torch.compile(grid.snap, backend="aot_eager", fullgraph=True)
    assert torch.equal(snap(x), grid.snap(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_midrise_holds_the_odd_integers_about_zero(bits):
    values = by_name(f"midrise{bits}").values
    assert values == tuple(-v for v in reversed(values))
    assert values[0] == 1 - 2**bits
    assert {b - a for a, b in itertools.pairwise(values)} == {2}
