"""Named block formats: each against its definition written out, and what must hold for all of them."""

import math

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import (
    FORMATS,
    Group,
    LeastSquares,
    PerTensor,
    PowerOfTwo,
    Scaling,
    format_by_name,
    value_of,
)
from fewbit.format.codec import from_plain, to_plain
from fewbit.format.named import block_floating_point, microexponents, mx, nvfp4, progressive
from fewbit.grid import by_name
from fewbit.io import native

ALL = pytest.mark.parametrize("name", FORMATS)
OCP = [n for n in FORMATS if n.startswith(("mxfp", "mxint"))]
POWER_OF_TWO = [n for n in FORMATS if n.startswith(("mx", "msfp"))]

BITS = {
    **{"nf4": 4.5, "af4": 4.5, "fp4-bnb": 4.5, "nvfp4": 4.5, "mxfp8-e4m3": 8.25, "mxfp8-e5m2": 8.25},
    **{"mxfp6-e2m3": 6.25, "mxfp6-e3m2": 6.25, "mxfp4": 4.25, "mxint8": 8.25, "mx9": 9, "mx6": 6, "mx4": 4},
    **{"msfp16": 8.5, "msfp14": 6.5, "msfp13": 5.5, "msfp12": 4.5, "qoq": 4 + 12 / 128 + 16 / 1024},
    **{"q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "q5_1": 6, "q4_1": 5},
    **{"q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625},
    **dict.fromkeys(("nf4-dq", "af4-dq", "fp4-bnb-dq"), 4.127),
}
GGML = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
HALF = ("qoq", *GGML)  # float16 at the outermost level


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(fmt, x):
    return fmt.quantize(x).dequantize()


@ALL
def test_size_idempotence_and_the_way_to_a_file_and_back(name):
    fmt, x = FORMATS[name], gauss(64, 1024) * torch.logspace(-3, 3, 64)[:, None]
    q = fmt.quantize(x)
    assert q.bits_per_weight == fmt.bits_per_weight(x.shape)
    base = name.removesuffix("-even").removesuffix("-rceil").removesuffix("-ceil")
    assert fmt.bits_per_weight((4096, 1024)) == pytest.approx(BITS[base], rel=1e-4)
    again = fmt.encode(q.dequantize(), type(fmt.fit(x))(scale=q.scale, zero=q.zero))
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=1e-6, atol=0)
    assert from_plain(to_plain(fmt)) == fmt
    stored = native.to_dict("m", q)
    packed = sum(t.numel() * t.element_size() for t in stored.values())
    assert packed == pytest.approx(q.nbytes, rel=1e-4)
    back = native.from_dict("m", stored, fmt, tuple(x.shape))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


@ALL
def test_bad_and_extreme_values(name):
    fmt = FORMATS[name]
    clean = gauss(4, 256)
    for bad in (math.nan, math.inf, -math.inf):
        x = clean.clone()
        x[1, 3] = bad
        with pytest.raises(InputError, match="1 NaN or Inf"):
            fmt.quantize(x)
    assert torch.equal(through(fmt, torch.zeros(4, 256)), torch.zeros(4, 256))
    # a zero block among others: exact zeros there, and the others as good as without it
    x = clean.clone()
    x[2, :128] = 0
    y = through(fmt, x)
    assert (y[2, :128].abs() <= 2e-3).all()  # a step less its mean (double quantization) need not vanish
    assert relative(y[0], x[0]) < 2 * relative(through(fmt, clean)[0], clean[0]) + 1e-3
    for size in (2.0**-126, 1e-30, 1e30, 2.0**120):
        y = through(fmt, clean.double() * size)
        assert torch.isfinite(y).all()
        if name not in HALF or 1e-5 < size < 1e5:
            assert relative(y, clean.double() * size) < 0.12, size
    for constant in (1.0, -0.37):
        y = through(fmt, torch.full((4, 256), constant))
        assert ((y - constant).abs() <= 0.2 * abs(constant)).all()


def relative(y, x):
    return ((y.double() - x.double()).square().sum() / x.double().square().sum()).item()


@ALL
def test_dtypes_strides_and_shapes(name):
    fmt, x = FORMATS[name], gauss(256, 256).to(torch.bfloat16)
    want = through(fmt, x.float())
    assert torch.equal(through(fmt, x), want)
    assert torch.equal(through(fmt, x.half()), through(fmt, x.half().float()))
    if isinstance(fmt.range, LeastSquares):  # of two trials with the same error another may be the first
        errors = [
            (got - x.float()).square().mean().item() for got in (want, through(fmt, x.double()).float())
        ]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    else:  # a tie of float32 need not be one in float64
        assert (through(fmt, x.double()) - want).abs().gt(1e-6).float().mean() < 3e-3
    assert torch.equal(through(fmt, x.t()), through(fmt, x.t().contiguous()))
    assert torch.equal(through(fmt, x[:, None, :]).squeeze(1), want) or "dq" in name or name == "qoq"
    if isinstance(fmt.block, Group):
        with pytest.raises(InputError, match="does not divide the 129 input columns"):
            fmt.quantize(torch.ones(2, 129))
        with pytest.raises(InputError, match="single number"):
            fmt.quantize(torch.ones(()))
        assert through(fmt, torch.ones(0, 256)).shape == (0, 256)
    else:
        assert through(fmt, torch.full((1,), -3.0)).item() == pytest.approx(-3, rel=1e-6)
        assert through(fmt, torch.ones(0)).shape == (0,)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(InputError, match="no block format named 'nvfp5'; did you mean nvfp4"):
        format_by_name("nvfp5")
    assert format_by_name("NVFP4") is FORMATS["nvfp4"]
    assert format_by_name("qoq-g64") == progressive(group=64)
    assert format_by_name("mxfp4-even-g16") == mx("e2m1", rule=Scaling.EVEN, block=16)
    with pytest.raises(InputError, match="no block format named 'mxfp4-gx'"):
        format_by_name("mxfp4-gx")


# -- each format against its definition --


@pytest.mark.parametrize("element", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "q1.6"])
def test_mx_is_ocp_with_the_floor_rule(element):
    x, grid = gauss(16, 256) * torch.logspace(-20, 20, 16)[:, None], by_name(element)
    emax = {"e4m3fn": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "e2m1": 2, "q1.6": 0}[element]
    want = torch.empty_like(x)
    for row in range(16):
        for start in range(0, 256, 32):
            v = x[row, start : start + 32].double()
            shared = 2.0 ** (math.frexp(v.abs().max().item())[1] - 1 - emax)
            want[row, start : start + 32] = (grid.snap(v / shared) * shared).float()
    assert torch.equal(through(mx(element), x), want)


def test_floor_clips_where_the_other_rules_do_not():
    x = torch.zeros(1, 32)
    x[0, 0] = 511.0
    got = {rule: through(mx("e4m3fn", rule=rule), x)[0, 0].item() for rule in Scaling}
    assert got == {Scaling.FLOOR: 448, Scaling.EVEN: 512, Scaling.CEIL: 512, Scaling.RCEIL: 512}
    x[0, 0] = 6.5  # between 6 and 7: E2M1 rounds it to 6
    got = {rule: through(mx("e2m1", rule=rule), x)[0, 0].item() for rule in Scaling}
    assert got == {Scaling.FLOOR: 6, Scaling.EVEN: 6, Scaling.CEIL: 6, Scaling.RCEIL: 6}
    x[0, 1] = 0.5
    kept = {rule: through(mx("e2m1", rule=rule), x)[0, 1].item() for rule in Scaling}
    assert kept == {Scaling.FLOOR: 0.5, Scaling.EVEN: 0.5, Scaling.CEIL: 0, Scaling.RCEIL: 0}


def test_even_is_the_best_rule_for_e2m1_and_ceil_the_worst():
    x = gauss(512, 1024)
    error = {rule: relative(through(mx("e2m1", rule=rule), x), x) for rule in Scaling}
    assert sorted(error, key=error.get) == [Scaling.EVEN, Scaling.FLOOR, Scaling.RCEIL, Scaling.CEIL]


@pytest.mark.parametrize("name", POWER_OF_TWO)
@pytest.mark.parametrize("shift", [-60, -1, 1, 37])
def test_scaling_by_a_power_of_two_scales_the_result(name, shift):
    fmt, x = FORMATS[name], gauss(8, 256)
    assert torch.equal(through(fmt, x * 2.0**shift), through(fmt, x) * 2.0**shift)


@pytest.mark.parametrize("name", [n for n in POWER_OF_TWO if n not in ("mx9", "mx6", "mx4")])
def test_a_second_pass_changes_nothing(name):
    # where a maximum that was rounded up to the next power of two gives another step, the grid gets coarser
    fmt, x = FORMATS[name], gauss(64, 256)
    once = through(fmt, x)
    same = value_of(fmt.fit(once).scale) == value_of(fmt.fit(x).scale)
    twice = through(fmt, once)
    kept = same.unsqueeze(-1).expand_as(fmt.block.split(x))
    assert torch.equal(fmt.block.split(twice)[kept], fmt.block.split(once)[kept])
    if fmt.range.rule in (Scaling.FLOOR, Scaling.RCEIL):
        assert torch.equal(twice, once)


@pytest.mark.parametrize(("name", "m"), [("msfp16", 7), ("msfp14", 5), ("msfp13", 4), ("msfp12", 3)])
def test_block_floating_point_is_one_exponent_and_plain_magnitudes(name, m):
    x = gauss(8, 64)
    v = x.unflatten(-1, (-1, 16))
    step = 2.0 ** (torch.frexp(v.abs().amax(-1, keepdim=True))[1] - 1 - m + 1)
    want = (torch.round(v / step).clamp(-(2**m) + 1, 2**m - 1) * step).flatten(-2)
    assert torch.equal(through(FORMATS[name], x), want)
    assert FORMATS[name] == block_floating_point(m)


@pytest.mark.parametrize(("name", "m"), [("mx9", 7), ("mx6", 4), ("mx4", 2)])
def test_shared_microexponents_shift_pairs_by_at_most_one(name, m):
    x = gauss(64, 256) * torch.randint(-3, 3, (64, 256), generator=torch.Generator().manual_seed(1)).exp2()
    x[0, :2] = 0  # a pair of zeros takes the shift
    v = x.unflatten(-1, (-1, 8, 2))
    pair = torch.frexp(v.abs().amax(-1, keepdim=True))[1] - 1
    pair = torch.where(v.abs().amax(-1, keepdim=True) > 0, pair, -99)
    shared = pair.amax(-2, keepdim=True)
    step = torch.exp2((shared - (shared - pair).clamp(max=1) - (m - 1)).float())
    want = (torch.round(v / step).clamp(-(2**m) + 1, 2**m - 1) * step).flatten(-3)
    assert torch.equal(through(FORMATS[name], x), want)
    assert FORMATS[name] == microexponents(m)


def test_nvfp4_is_two_scales_and_no_block_vanishes():
    x = gauss(32, 64)
    x[0, :16] *= 1e-7  # its step would round to 0 in E4M3
    g = 448 * 6 / x.abs().max()
    v = x.unflatten(-1, (-1, 16))
    step = (v.abs().amax(-1) / 6 * g).clamp(min=2.0**-9).to(torch.float8_e4m3fn).float() / g
    want = (by_name("e2m1").snap(v / step[..., None]) * step[..., None]).flatten(-2)
    got = nvfp4().quantize(x)
    torch.testing.assert_close(got.dequantize(), want, rtol=1e-6, atol=0)
    assert (value_of(got.scale) > 0).all()
    assert value_of(got.scale.scale).shape == ()


def test_double_quantization_is_an_8_bit_step_less_the_mean():
    x = gauss(64, 1024)
    single, double = FORMATS["nf4"].quantize(x), FORMATS["nf4-dq"].quantize(x)
    a = single.scale
    off = a.mean()
    z = (a - off).unflatten(0, (-1, 256))
    a2 = z.abs().amax(-1, keepdim=True)
    want = (by_name("dynamic8").snap(z / a2) * a2).flatten() + off
    torch.testing.assert_close(value_of(double.scale), want, rtol=1e-6, atol=1e-7)
    error = [(q.dequantize() - x).square().mean() for q in (single, double)]
    assert error[1] < 1.01 * error[0]
    # bitsandbytes' blocks ignore rows: 96 columns, blocks of 64
    odd = gauss(6, 96)
    assert torch.equal(through(FORMATS["nf4"], odd).flatten(), through(FORMATS["nf4"], odd.flatten()))


def test_every_nf4_block_keeps_its_largest_element():
    x = gauss(64, 64)
    y, at = through(FORMATS["nf4"], x), x.abs().argmax(-1, keepdim=True)
    assert torch.equal(y.gather(-1, at), x.gather(-1, at))


def test_qoq_costs_little_over_float_steps():
    x = gauss(256, 1024)
    plain = FORMATS["qoq"].__class__(
        grid=FORMATS["qoq"].grid, block=Group(128), range=FORMATS["qoq"].range, zero=FORMATS["qoq"].zero,
        scale=FORMATS["qoq"].scale.scale,
    )  # fmt: skip
    assert relative(through(FORMATS["qoq"], x), x) < 1.03 * relative(through(plain, x), x)


def test_giving_back_the_codes_of_inf_and_nan_improves_fp4():
    """MoFQ: E2M1 with the reserved exponent ends at 3, without it at 6."""
    x = gauss(256, 1024)
    error = {name: relative(through(mx(name, block=128), x), x) for name in ("e2m1", "e2m1-ieee")}
    assert error["e2m1"] < 0.87 * error["e2m1-ieee"]


def test_power_of_two_steps_serve_any_grid_and_an_affine_one():
    from fewbit.format import FP32, Format, Zero

    x = gauss(16, 64).abs() + 0.1
    for grid in ("int4", "uint4", "nf4", "e4m3fn"):
        for zero in (Zero.NONE, Zero.OFFSET):
            for rule in Scaling:
                fmt = Format(
                    grid=by_name(grid), block=Group(32), range=PowerOfTwo(rule=rule), zero=zero, scale=FP32
                )
                step = value_of(fmt.fit(x).scale)
                assert torch.equal(step, torch.exp2(torch.log2(step).round()))
                if rule in (Scaling.CEIL, Scaling.RCEIL) and grid != "nf4":
                    assert ((through(fmt, x) - x).abs() <= step.repeat_interleave(32, -1) * 16.001).all()
    assert PerTensor() != Group(32)


@ALL
def test_denormals_and_a_single_block(name):
    fmt, least = FORMATS[name], torch.finfo(torch.float32).smallest_normal
    tiny = gauss(4, 256) * 1e-41
    assert tiny.any()
    for x in (tiny, tiny.double() * 1e-250):
        # the row steps of qoq are float16, whose least is 6e-5
        assert ((through(fmt, x) - x).abs() <= (2e-3 if name == "qoq" else 16 * least)).all()
    x = gauss(16 if name in ("mx9", "mx6", "mx4") else 256 if name.endswith("_k") else fmt.block.size)
    assert relative(through(fmt, x), x) < (0.2 if name == "q2_k" else 0.1)
    assert torch.equal(through(fmt, x[None]).flatten(), through(fmt, x))


def test_steps_that_their_own_blocks_do_not_tile_are_refused_before_any_work():
    with pytest.raises(InputError, match=r"size 8 does not divide the 9 input .* of the steps of layer q"):
        FORMATS["mx6"].check((4, 18), "layer q")
