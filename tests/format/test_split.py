"""A split weight: outlier columns exact to their float format, the others as if those were not there."""

import math
from dataclasses import replace

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import BF16, FP16, FP32, Channel, Format, Group, MinMax, Stats, Token, Zero
from fewbit.format.activation import Activation
from fewbit.format.block import Columns
from fewbit.format.codec import from_plain, to_plain
from fewbit.format.split import Apart, Split, SplitTensor, without
from fewbit.grid import Int
from fewbit.solve import Ldlq, Rtn

INT8 = Format(grid=Int(8), block=Channel(), scale=FP32)
INT4 = Format(grid=Int(4), block=Group(32), scale=FP32)
WIDE = [3, 40, 77]


def inputs(seed: int = 0) -> torch.Tensor:
    """[512, 96] with three columns 40 times as large."""
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    x[:, WIDE] *= 40
    return x


def weight(rows: int = 64) -> torch.Tensor:
    """[rows, 96], small at ``WIDE``, where a step of the whole row is coarse."""
    w = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1))
    w[:, WIDE] /= 40
    return w


def stats(x: torch.Tensor) -> Stats:
    return Stats(
        gram=x.T @ x / len(x),
        mean_abs=x.abs().mean(0),
        low=x.amin(0),
        high=x.amax(0),
        sample=x,
        tokens=len(x),
    )


def split(fmt: Format = INT8, solver=Rtn(), **settings) -> SplitTensor:
    q = Split(**settings)(weight(), stats(inputs()), lambda w, s: solver(w, s, fmt))
    assert isinstance(q, SplitTensor)
    return q


@pytest.mark.parametrize("solver", [Rtn(), Ldlq()], ids=["rtn", "gptq"])
@pytest.mark.parametrize("fmt", [INT8, INT4, replace(INT4, zero=Zero.INTEGER, range=MinMax())], ids=str)
def test_outlier_columns_are_found_and_kept_and_leave_an_exact_zero(fmt, solver):
    q = split(fmt, solver)
    assert q.columns.tolist() == WIDE
    assert torch.equal(q.dequantize()[:, WIDE], weight()[:, WIDE].bfloat16().float())
    assert not q.rest.dequantize()[:, WIDE].any()


def test_the_other_columns_have_steps_as_if_the_outliers_were_not_there():
    w = weight()
    w[:, WIDE] *= 4000  # they would set the step of every row
    q = Split()(w, stats(inputs()), lambda v, s: INT8.quantize(v))
    rest = [j for j in range(96) if j not in WIDE]
    assert torch.equal(q.rest.scale, INT8.fit(w[:, rest]).scale)


def test_the_product_in_int8_is_half_as_wrong_with_the_weights_of_outliers_in_float():
    x, w = inputs(), weight()
    act = Activation(format=Format(grid=Int(8), block=Token(), scale=FP32), outliers=6.0)
    y = x @ w.T
    coded, q = INT8.quantize(w), split()
    error = lambda value: ((act(x) @ value.T - y).norm() / y.norm()).item()  # noqa: E731
    assert error(q.dequantize()) < error(coded.dequantize()) / 2
    assert torch.equal(act(x), act(x, None, q.columns))  # O found at the call is the one of calibration


def test_a_threshold_nothing_reaches_or_no_calibration_splits_nothing():
    for threshold, seen in ((1e6, stats(inputs())), (6.0, Stats())):
        q = Split(threshold=threshold)(weight(), seen, lambda w, s: INT8.quantize(w))
        assert torch.equal(q.codes, INT8.quantize(weight()).codes)


def test_a_column_that_is_large_at_single_tokens_only_is_none():
    x = inputs()
    x[:4, 8] = 1000.0  # 0.8 % of the tokens
    pick = lambda share: Split(share=share).pick(stats(x)).tolist()  # noqa: E731
    assert pick(0.01) == WIDE
    assert pick(0.005) == [3, 8, 40, 77]


def test_rows_and_bytes_are_those_of_both_parts():
    q = split(apart=FP16)
    part = q.rows(8, 24)
    assert torch.equal(part.dequantize(), q.dequantize()[8:24])
    assert q.shape == (64, 96)
    assert q.nbytes == 64 * 96 + 64 * 4 + 3 * (64 * 2 + 4)
    assert q.bits_per_weight == 8 * q.nbytes / (64 * 96)
    counted = Apart(columns=3, format=FP16).bits(64) + INT8.bits_per_weight((64, 96)) * 64 * 96
    assert math.isclose(counted, 8 * q.nbytes)


def test_statistics_without_columns_are_those_of_inputs_that_are_zero_there():
    x = inputs()
    zeroed = x.index_fill(1, torch.tensor(WIDE), 0)
    got, want = without(stats(x), torch.tensor(WIDE)), stats(zeroed)
    for name in ("gram", "mean_abs", "low", "high", "sample"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_a_quantized_input_leaves_columns_apart_alone_and_fits_without_them():
    x, apart = inputs(), torch.tensor(WIDE)
    act = Activation(format=Format(grid=Int(8), block=Token(), scale=FP32))
    got = act(x, None, apart)
    assert torch.equal(got[:, WIDE], x[:, WIDE])
    rest = [j for j in range(96) if j not in WIDE]
    assert torch.equal(got[:, rest], act(x[:, rest]))


def test_impossible_splits_are_refused_and_possible_ones_go_through_text():
    with pytest.raises(InputError, match=r"a split at 0\.0 for a share 0\.01"):
        Split(threshold=0.0)
    with pytest.raises(InputError, match="kept as plain floats, BF16, FP16 or FP32, got int8 channel"):
        Split(apart=INT8)
    for zero in (Zero.OFFSET, Zero.FLOAT):
        with pytest.raises(InputError, match="holds no exact 0"):
            Split().check(replace(INT4, zero=zero, range=MinMax()))
    Split().check(INT4)
    one = Split(threshold=5.0, apart=BF16)
    assert from_plain(to_plain(one)) == one


# -- groups of columns of like range --

UINT8 = Format(grid=Int(8, signed=False), block=Columns(1), range=MinMax(), zero=Zero.INTEGER, scale=FP32)


def peg(groups: int) -> Activation:
    return Activation(format=UINT8, static=True, groups=groups)


def fitted(groups: int, x: torch.Tensor) -> torch.Tensor:
    act = peg(groups)
    return act(x, act.fit(x, x.amin(0), x.amax(0)))


def test_one_group_is_one_step_per_tensor_and_a_group_per_column_a_step_each():
    x = inputs()
    tensor = replace(UINT8, block=Columns(96))
    assert torch.equal(fitted(1, x), tensor.quantize(x).dequantize())
    assert torch.equal(fitted(96, x), UINT8.quantize(x).dequantize())


def test_groups_hold_columns_of_like_range_wherever_they_are():
    """Only the columns that share the outliers' group suffer: with 32 groups of 3, none."""
    x = inputs()
    normal = [j for j in range(96) if j not in WIDE]
    error = lambda k: (fitted(k, x) - x)[:, normal].square().sum().item()  # noqa: E731
    unsorted = replace(UINT8, block=Columns(3)).quantize(x).dequantize()
    lost = (unsorted - x)[:, normal].square().sum().item()
    assert error(32) < lost / 20
    assert error(32) <= error(4) <= error(1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(fitted(4, x[:, order]), fitted(4, x)[:, order], rtol=0, atol=0)


def test_groups_need_not_divide_the_columns():
    act, x = peg(7), inputs()
    scale = act.fit(x, x.amin(0), x.amax(0)).scale
    sizes = torch.unique(scale, return_counts=True)[1]
    assert scale.shape == (96,)
    assert sorted(set(sizes.tolist())) == [13, 14]


def test_groups_are_refused_where_they_mean_nothing():
    for wrong in (
        {"groups": 0, "static": True},
        {"groups": 6},
        {"groups": 6, "static": True, "momentum": 0.9},
        {"groups": 6, "static": True, "format": replace(UINT8, block=Columns(16))},
    ):
        with pytest.raises(InputError, match="groups of columns sorted by range need"):
            Activation(**{"format": UINT8, **wrong})
