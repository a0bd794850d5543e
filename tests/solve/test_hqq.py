"""HQQ lowers the error it claims to lower, block by block, on any grid, and depends on no unit or chunk."""

from dataclasses import fields, replace

import pytest
import torch
from tiny import save_tiny

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Group, MinMax, Zero, format_by_name
from fewbit.grid import by_name
from fewbit.recipe import from_yaml, hqq
from fewbit.solve import Hqq, Rtn, Stats
from fewbit.solve.hqq import column_weights, shrink

INT3 = Format(grid=by_name("int3"), block=Group(64), scale=FP16, zero=Zero.FLOAT, range=MinMax())
KINDS = {
    "float zero": INT3,
    "offset": replace(INT3, zero=Zero.OFFSET),
    "integer zero": replace(INT3, zero=Zero.INTEGER),
    "symmetric": replace(INT3, zero=Zero.NONE),
    "rows": replace(INT3, block=Channel(), scale=FP32),
    "nf4": replace(INT3, grid=by_name("nf4"), zero=Zero.NONE),
    "e2m1 offset": replace(INT3, grid=by_name("e2m1"), zero=Zero.OFFSET),
}


def heavy(seed=0, rows=96, columns=256):
    """Student's t with four degrees of freedom, the spread of a language model's weights."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


def block_errors(fmt, q, w, norm=2.0, weights=1.0):
    return fmt.block.split((q.dequantize() - w).abs().pow(norm) * weights).sum(-1)


def run(w, fmt, **settings):
    return Hqq(**settings)(w, Stats(), fmt)


@pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS)
def test_no_block_gets_worse_and_the_tensor_gets_better(fmt):
    w = heavy()
    before = block_errors(fmt, Rtn()(w, Stats(), fmt), w)
    after = block_errors(fmt, run(w, fmt, columns=0, round_zero=False), w)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nf4", "nf4-dq", "qoq-g64"])
def test_formats_with_quantized_steps_are_served(name):
    """Their steps are tried one block at a time, so the sum is promised and not each block."""
    fmt, w = format_by_name(name), heavy(11)
    before, after = (block_errors(fmt, q, w).sum() for q in (Rtn()(w, Stats(), fmt), run(w, fmt, columns=0)))
    assert after <= before


@pytest.mark.parametrize("norm", [1.0, 0.7])
def test_a_robust_norm_lowers_its_own_error(norm):
    w = heavy(1)
    robust, least_squares, rounded = (
        block_errors(INT3, q, w, norm)
        for q in (run(w, INT3, columns=0, norm=norm), run(w, INT3, columns=0), run(w, INT3, iterations=0))
    )
    assert (robust <= rounded * (1 + 1e-5)).all()
    assert robust.sum() < least_squares.sum()


@pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS)
def test_no_iteration_is_plain_rounding(fmt):
    w = heavy(2)
    got, rounded = run(w, fmt, iterations=0, round_zero=False), Rtn()(w, Stats(), fmt)
    assert torch.equal(got.codes, rounded.codes)
    assert torch.equal(got.dequantize(), rounded.dequantize())


def test_the_first_move_is_the_papers_update_of_the_zero():
    """z <- mean(Q(W) - (W - E) / s), with the step kept, E = shrink(W - W_r) in steps; float32 storage."""
    w = heavy(3).double()
    fmt = replace(INT3, scale=FP32)
    params = fmt.fit(w)
    s, z = params.scale.double().unsqueeze(-1), params.zero.double().unsqueeze(-1)
    x = fmt.block.split(w)
    codes = fmt.code(x, s, z)
    for norm, beta in ((2.0, 10.0), (0.7, 10.0)):
        e = 0 if norm == 2 else s * shrink((x - fmt.decode(codes, s, z)) / s, norm, beta)
        wanted = (codes - (x - e) / s).mean(-1)
        got = run(w, fmt, norm=norm, beta=beta, iterations=1, stretch=False, columns=0, round_zero=False)
        moved = got.zero != params.zero  # the other blocks kept what was better
        assert moved.float().mean() > 0.3
        torch.testing.assert_close(got.zero[moved].double(), wanted[moved], rtol=0, atol=1e-5)


def test_the_fixed_point_is_the_closed_form_of_least_squares():
    """At the end, steps and zeros are those of the 2 x 2 normal equations for the codes of each block."""
    w = heavy(4).double()
    fmt = replace(INT3, scale=FP32)
    q = run(w, fmt, columns=0, iterations=200)
    codes, x = fmt.block.split(q.codes.double()), fmt.block.split(w)
    solution = torch.linalg.lstsq(torch.stack([codes, torch.ones_like(codes)], -1), x.unsqueeze(-1)).solution
    s, zero = solution[..., 0, 0], -solution[..., 1, 0] / solution[..., 0, 0]
    torch.testing.assert_close(q.scale.double(), s, rtol=1e-4, atol=0)
    torch.testing.assert_close(q.zero.double(), zero, rtol=0, atol=1e-3)


def test_columns_that_count_more_get_a_smaller_error():
    """A column of tiny weights, as attention sinks leave in v_proj, keeps its place on the grid."""
    w = heavy(5)
    w[:, 10] *= 0.1
    a = column_weights(w, 1.5)
    assert a.argmax() == 10
    plain, weighted = (run(w, INT3, columns=c, round_zero=False) for c in (0, 1.5))
    tiny = [(q.dequantize() - w)[:, 10].square().sum() for q in (plain, weighted)]
    assert tiny[1] < 0.25 * tiny[0]
    assert block_errors(INT3, weighted, w).sum() < 1.2 * block_errors(INT3, plain, w).sum()
    start = block_errors(INT3, Rtn()(w, Stats(), INT3), w, weights=a)
    assert (block_errors(INT3, weighted, w, weights=a) <= start * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["float zero", "offset", "e2m1 offset"])
def test_a_rounded_first_zero_keeps_zero_near_a_point_of_the_grid(kind):
    """0.0 is exact at the start, and after the search still nearer to a point than from a start without."""
    fmt, w = KINDS[kind], heavy(10)
    w[:, ::16] = 0
    start, with_, without = (
        run(w, fmt, **settings).dequantize()[:, ::16].abs().mean()
        for settings in ({"iterations": 0}, {"columns": 0}, {"columns": 0, "round_zero": False})
    )
    assert start < 0.002 * w.std()  # the zero is stored as float16
    assert with_ < 0.8 * without


def test_measured_importance_takes_the_place_of_the_columns_energies():
    w = heavy(6)
    h = torch.rand(w.shape[1]) ** 4 + 1e-3
    got = Hqq()(w, Stats(gram=h.diag()), INT3)
    blind = run(w, INT3)
    assert block_errors(INT3, got, w, weights=h).sum() < block_errors(INT3, blind, w, weights=h).sum()
    assert Hqq().needs == frozenset()


@pytest.mark.parametrize("settings", [{}, {"norm": 0.7}, {"norm": 1.0, "beta": 3.0}])
def test_the_unit_of_the_weights_does_not_matter(settings):
    w = heavy(7)
    assert torch.equal(run(w, INT3, **settings).codes, run(64 * w, INT3, **settings).codes)


def test_blocks_do_not_see_each_other():
    w = heavy(8, rows=3000)  # more than one chunk
    whole = run(w, INT3, columns=0)
    for part in (slice(0, 1), slice(1500, 1600)):
        alone = run(w[part], INT3, columns=0)
        assert torch.equal(alone.codes, whole.codes[part])
        assert torch.equal(alone.zero, whole.zero[part])


def test_constant_and_zero_blocks_stay_exact():
    w = heavy(9)
    w[0, :64], w[1, :64], w[2, :64] = 0.0, 0.5, -0.25
    got = run(w, INT3).dequantize()
    assert torch.equal(got[:3, :64], w[:3, :64])
    assert torch.isfinite(got).all()


def test_shrinkage_is_odd_never_grows_and_keeps_zero():
    x = torch.linspace(-3, 3, 601)
    for p in (0.3, 0.7, 1.0):
        y = shrink(x, p, 10.0)
        torch.testing.assert_close(y, -shrink(-x, p, 10.0))
        assert torch.isfinite(y).all()
        assert (y.abs() <= x.abs()).all()
        assert (y[x.abs() < 0.99 * 10 ** (-1 / (2 - p))] == 0).all()
        assert (y[x.abs() > 1.01 * 10 ** (-1 / (2 - p))] != 0).all()
    torch.testing.assert_close(shrink(x, 1.0, 10.0), torch.nn.functional.softshrink(x, 0.1))


def test_impossible_settings_and_formats_are_refused():
    for wrong in ({"norm": 0}, {"norm": 3}, {"beta": 0}, {"kappa": 0.9}, {"iterations": -1}, {"columns": -1}):
        with pytest.raises(InputError, match="HQQ with"):
            Hqq(**wrong)
    with pytest.raises(InputError, match="use a grid of width 1 with a scale"):
        Hqq().check(Format(grid=by_name("e4m3fn")))


def test_the_recipe_survives_yaml_and_stores_float_zeros():
    recipe = hqq(bits=3, norm=0.7)
    assert from_yaml(recipe.to_yaml()) == recipe
    fmt = recipe.rules[0].weight
    assert (fmt.zero, fmt.bits_per_weight((64, 128))) == (Zero.FLOAT, 3.5)
    assert recipe.rules[0].needs == frozenset()


def test_every_setting_of_the_solver_is_one_of_the_recipe():
    other = {"norm": 0.7, "beta": 5.0, "kappa": 1.1, "iterations": 3, "stretch": False, "round_zero": False}
    assert hqq(columns=0.5, **other).rules[0].solver == Hqq(columns=0.5, **other)
    assert {f.name for f in fields(Hqq)} == {"columns", *other}
    assert hqq().rules[0].solver == Hqq()


def test_a_layer_in_a_model_is_solved_as_if_it_were_alone(tmp_path):
    """Layers that read one tensor may be solved as one stack; the energies of a column are a layer's own."""
    save_tiny("llama", tmp_path / "model")
    fewbit.quantize(tmp_path / "model", hqq(bits=3, group_size=32), output=tmp_path / "out")
    original, got = (fewbit.load(tmp_path / name) for name in ("model", "out"))
    rule = hqq(bits=3, group_size=32).rules[0]
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{projection}"
        w = original.get_submodule(name).weight.detach().float()
        with torch.no_grad():
            stored = got.get_submodule(name)(torch.eye(w.shape[1])).t()
        wanted = rule.solver(w, Stats(), rule.weight).dequantize()
        torch.testing.assert_close(stored, wanted, rtol=1e-5, atol=1e-6)
