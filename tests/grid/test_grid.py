"""What holds of every grid: the contract over all codes of all named grids."""

import copy
import math
import pickle

import pytest
import torch

from fewbit.errors import InputError
from fewbit.grid import ALIASES, GRIDS, Float, Int, Specials, Table, by_name, describe

SCALAR = [grid for grid in GRIDS if grid.width == 1]  # of the others see test_points.py
LISTED = [grid for grid in SCALAR if grid.bits <= 19]
SMALL = [grid for grid in SCALAR if grid.bits <= 8]
UNEVEN = Table("uneven", (3.0, -7.5, 0.1, 100.0, 0.1, -1e-3))


def named(grids):
    return pytest.mark.parametrize("grid", grids, ids=str)


def points_of(grid):
    """The distinct finite values, ascending, float64."""
    values = grid.value(grid.codes(), torch.float64)
    return torch.unique(values[values.isfinite()] + 0.0)


def sample(grid, n, seed=0):
    """Float32 numbers inside, near and far outside the range, at every magnitude the grid knows."""
    g = torch.Generator().manual_seed(seed)
    spread = points_of(grid if grid.bits <= 16 else by_name("bf16")).float()  # of the widest a part will do
    picks = spread[torch.randint(len(spread), (n,), generator=g)]
    x = picks * (1 + 0.5 * torch.randn(n, generator=g))
    uniform = (torch.rand(n, generator=g) * 3 - 1.5) * min(max(grid.max, -grid.min), 1e30)
    x = torch.cat([x, uniform, spread, spread * 1.0001]).clamp(-3e38, 3e38)
    # E8M0 rounds up between its two smallest values, as torch does: the one exception to "nearest".
    return x[(x <= 2.0**-127) | (x >= 2.0**-126)] if grid.name == "e8m0" else x


def nearest_distance(points, x):
    """|x - nearest point|, float64, by search over all of them."""
    x = x.double().clamp(points[0], points[-1])
    above = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    return torch.minimum((x - points[above - 1]).abs(), (x - points[above]).abs())


@named([*LISTED, UNEVEN])
def test_value_then_round_gives_every_code_back(grid):
    codes = grid.codes()
    values = grid.value(codes, torch.float64)
    again = grid.round(values.float())
    assert again.dtype == codes.dtype == grid.code_dtype
    # NaN has several codes and a table may repeat a value: then the value must come back, not the code.
    same_value = grid.value(again, torch.float64)
    torch.testing.assert_close(same_value, values.clamp(grid.min, grid.max), rtol=0, atol=0, equal_nan=True)
    unique = values.isfinite()
    if isinstance(grid, Table):
        first = {v: i for i, v in reversed(list(enumerate(grid.values)))}
        unique = torch.tensor([first[v] == i for i, v in enumerate(grid.values)])
    assert torch.equal(again[unique], codes[unique])
    assert torch.equal(grid.round(values)[unique], codes[unique])  # and from float64


@named([*LISTED, UNEVEN])
def test_description_agrees_with_the_listed_codes(grid):
    d = describe(grid)
    points = points_of(grid)
    assert (d.name, d.bits, d.distinct) == (grid.name, grid.bits, len(points))
    assert (grid.min, grid.max) == (points[0].item(), points[-1].item())
    assert d.max == grid.max
    positive = points[points > 0]
    smallest = points.abs()[points != 0].min().item()
    assert d.dynamic_range_db == pytest.approx(20 * math.log10(points.abs().max().item() / smallest))
    if not isinstance(grid, Table) and len(positive):
        assert positive[0].item() == (d.smallest_subnormal or d.min_normal)
    if d.epsilon is not None:
        assert positive[positive > 1][0].item() - 1 == d.epsilon
    values = grid.value(grid.codes())
    assert ("nan" in d.specials) == bool(values.isnan().any())
    assert ("inf" in d.specials) == bool(values.isinf().any())
    if isinstance(grid, Float):
        assert ("-0" in d.specials) == bool(((values == 0) & values.signbit()).any())


@named([*LISTED, UNEVEN])
def test_unsigned_fields_fit_their_bits_and_invert(grid):
    codes = grid.codes()
    fields = grid.to_unsigned(codes)
    assert int(fields.min()) >= 0
    assert int(fields.max()) < 2**grid.bits
    assert len(torch.unique(fields)) == len(codes)
    for dtype in (fields.dtype, torch.int64):
        back = grid.from_unsigned(fields.to(dtype))
        assert back.dtype == grid.code_dtype
        assert torch.equal(back, codes)


@named([*LISTED, UNEVEN])
def test_least_is_the_smallest_positive_value(grid):
    positive = points_of(grid)[points_of(grid) > 0]
    if len(positive):
        assert grid.least == positive[0].item()
    else:
        assert grid == Int(1)
        with pytest.raises(InputError, match="no positive value"):
            _ = grid.least


def test_fp32_has_too_many_codes_to_list_and_still_converts():
    fp32 = by_name("fp32")
    with pytest.raises(InputError, match="describe"):
        fp32.codes()
    x = torch.tensor([1.5, -2.0, -0.0, 3.4e38])
    codes = fp32.round(x)
    assert torch.equal(fp32.from_unsigned(fp32.to_unsigned(codes)), codes)
    assert int(fp32.to_unsigned(codes).min()) >= 0
    assert fp32.least == 2.0**-149
    assert torch.equal(fp32.value(codes).view(torch.int32), x.view(torch.int32))


@named([*LISTED, UNEVEN])
def test_round_chooses_a_nearest_value(grid):
    points = points_of(grid)
    many = sample(grid, 20_000)
    for x in (many, many[:1000], many.double()):  # large, small and float64 inputs take different paths
        got = grid.value(grid.round(x), torch.float64)
        target = x.double().clamp(grid.min, grid.max)
        assert torch.equal((got - target).abs(), nearest_distance(points, x))


@named([*SCALAR, UNEVEN])
def test_snap_is_round_then_value(grid):
    x = sample(grid, 2000)[:3000]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        assert torch.equal(grid.snap(y), grid.value(grid.round(y), dtype))
        assert grid.snap(y).dtype == dtype


@named([*SCALAR, UNEVEN])
def test_out_of_range_and_infinite_inputs_saturate(grid):
    big = torch.tensor([float("inf"), 3.4e38, float("-inf"), -3.4e38])
    # A finite 3.4e38 lies inside the range of the 8-bit exponents; there only the order matters.
    got = grid.value(grid.round(big), torch.float64)
    assert got[0] == grid.max
    assert got[2] == grid.min
    assert bool((got >= grid.min).all())
    assert bool((got <= grid.max).all())


@named([*SCALAR, UNEVEN])
def test_every_float_dtype_and_shape(grid):
    x = sample(grid, 200, seed=1).clamp(-6e4, 6e4)[:240]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        reference = grid.round(y.double())
        assert torch.equal(grid.round(y), reference), dtype
    codes = grid.round(x)
    assert torch.equal(grid.round(x.view(4, 5, 12)), codes.view(4, 5, 12))
    strided = x.view(20, 12).T
    assert torch.equal(grid.round(strided), codes.view(20, 12).T)
    assert torch.equal(grid.value(codes.view(20, 12).T), grid.value(codes).view(20, 12).T)
    assert torch.equal(grid.round(x.view(20, 12)[:, 3]), codes.view(20, 12)[:, 3])
    assert grid.round(x[0]).shape == ()
    assert torch.equal(grid.round(x[0]), codes[0])
    assert grid.round(x[:0]).shape == (0,)
    assert grid.value(codes[:0].view(0, 3)).shape == (0, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert grid.value(codes, dtype).dtype == dtype
    kept = x.clone()
    grid.round(x)
    assert torch.equal(kept, x), "round changed its input"
    assert torch.equal(grid.round(x.clone().requires_grad_()), codes)


@named([Int(4), Int(8), *(g for g in SCALAR if not isinstance(g, Int)), UNEVEN])
def test_float64_input_is_not_rounded_twice(grid):
    """Just beside a midpoint, nearer than float32 can tell, the nearer side must win."""
    if grid.bits > 19:
        low = torch.tensor([1.0], dtype=torch.float64)
        high = low + 2.0**-23
    else:
        points = points_of(grid)
        points = points[1:] if grid.name == "e8m0" else points  # see sample()
        low, high = points[:-1], points[1:]
    middle = (low + high) / 2
    off = (high - low) * 2.0**-28
    assert torch.equal(grid.value(grid.round(middle - off), torch.float64), low)
    assert torch.equal(grid.value(grid.round(middle + off), torch.float64), high)


@named([*SMALL, by_name("bf16"), by_name("tf32"), UNEVEN])
def test_stochastic_rounding_is_unbiased_between_two_neighbours(grid):
    n = 20_000
    points = points_of(grid)
    g = torch.Generator().manual_seed(7)
    pick = torch.randint(len(points) - 1, (6,), generator=g)
    for i, fraction in zip(pick.tolist(), (0.5, 0.25, 0.75, 0.1, 0.9, 0.01), strict=True):
        low, high = points[i], points[i + 1]
        x = low + (high - low) * fraction
        got = grid.value(grid.round(x.expand(n), g), torch.float64)
        assert bool(((got == low) | (got == high)).all())
        rate = (got == high).double().mean().item()
        p = ((x - low) / (high - low)).item()
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / n)


@named([*LISTED, UNEVEN])
def test_stochastic_rounding_keeps_points_and_saturates(grid):
    g = torch.Generator().manual_seed(3)
    points = points_of(grid).repeat(1 + 20_000 // len(points_of(grid)))
    assert torch.equal(grid.value(grid.round(points, g), torch.float64), points)
    outside = torch.tensor([float("inf"), 2.0 * grid.max + 1, float("-inf"), 2.0 * grid.min - 1])
    got = grid.value(grid.round(outside.double(), g), torch.float64)
    assert got.tolist() == [grid.max, grid.max, grid.min, grid.min]


def test_stochastic_rounding_follows_its_generator_and_leaves_the_global_one():
    x = torch.linspace(-3, 3, 999)
    state = torch.get_rng_state()
    for name in ("int4", "e4m3fn", "nf4"):
        grid = by_name(name)
        a, b, c = (grid.round(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_grids_are_values():
    assert len({grid.name for grid in GRIDS}) == len(set(GRIDS)) == len(GRIDS)
    assert Int(4) == by_name("int4")
    assert hash(Int(4)) == hash(by_name("int4"))
    assert Int(4) != Int(4, narrow=True)
    assert Table("nf4", by_name("nf4").values) == by_name("nf4")
    for grid in (*SCALAR, UNEVEN):
        assert grid.width == 1
        grid.round(torch.zeros(2))  # whatever is built lazily must not change equality or pickling
        for twin in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
            assert twin == grid
            assert hash(twin) == hash(grid)
        with pytest.raises(AttributeError):
            grid.name = "other"


def test_by_name_finds_every_grid_and_its_aliases():
    for grid in GRIDS:
        assert by_name(grid.name) is grid
        assert by_name(grid.name.upper()) is grid
        assert str(grid) == grid.name
    for alias, name in ALIASES.items():
        assert by_name(alias) is by_name(name)
        assert alias not in {grid.name for grid in GRIDS}


def test_by_name_says_what_is_near():
    with pytest.raises(InputError, match=r"'in4'.*int4"):
        by_name("in4")
    with pytest.raises(InputError, match="e4m3fn"):
        by_name("e4m3f")
    with pytest.raises(InputError, match="`fewbit formats` lists them"):
        by_name("zzzzzzzzzzzz")


def test_impossible_grids_are_refused_when_built():
    for bits in (0, 9, 4.0, "4"):
        with pytest.raises(InputError, match="1 to 8 bits"):
            Int(bits)
    with pytest.raises(InputError, match="only zero"):
        Int(1, narrow=True)
    with pytest.raises(InputError, match="narrow"):
        Int(4, signed=False, narrow=True)
    with pytest.raises(InputError, match="2 to"):
        Table("one", (1.0,))
    with pytest.raises(InputError, match="finite"):
        Table("bad", (1.0, float("nan")))
    with pytest.raises(InputError, match="finite"):
        Table("too large for float32", (1.0, 1e300))
    e2m1 = {"name": "x", "exponent_bits": 2, "mantissa_bits": 1, "bias": 1}
    with pytest.raises(InputError, match="saturate"):
        Float(**e2m1, saturate=False)
    with pytest.raises(InputError, match="exponent"):
        Float(**e2m1 | {"exponent_bits": 9})
    with pytest.raises(InputError, match="sign"):
        Float(**e2m1, zero=False)
    with pytest.raises(InputError, match="FN"):
        Float(**e2m1, signed=False, specials=Specials.FNUZ)
    with pytest.raises(InputError, match="float32"):
        Float(**e2m1 | {"bias": 128})
    with pytest.raises(InputError, match="IEEE"):
        Float(**e2m1 | {"mantissa_bits": 0}, specials=Specials.IEEE)


def test_tables_built_in_inference_mode_serve_training_too():
    grid = Table("fresh", (-2.0, -0.5, 0.25, 3.0))
    float_ = Float(name="fresh", exponent_bits=2, mantissa_bits=2, bias=1)
    with torch.inference_mode():
        for g in (grid, float_):
            g.value(g.round(torch.randn(10)))
    scale = torch.ones(10, requires_grad=True)
    for g in (grid, float_):
        (g.value(g.round(torch.randn(10))) * scale).sum().backward()
    assert scale.grad is not None
