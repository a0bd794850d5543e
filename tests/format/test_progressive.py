"""QoQ's promise: the middle tensor is int8 whatever codes a solver chooses."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import AbsMax, Channel, Format, Group
from fewbit.format.fake import interval, steps
from fewbit.format.fit import Progressive
from fewbit.format.named import FP16, progressive
from fewbit.grid import Int, by_name
from fewbit.solve import Ldlq, Stats


def rows_of_all_extremes(protect=119):
    """Every pair of extremes of a group, in a row that uses the whole protective range: [pairs, 8]."""
    ends = torch.arange(protect + 1)
    low, high = torch.meshgrid(-ends, ends, indexing="ij")
    rows = torch.zeros(low.numel(), 8)
    rows[:, 0], rows[:, 4], rows[:, 5] = protect, low.flatten(), high.flatten()
    return rows


def middles(params):
    """(q - z) s2 of all sixteen codes of every group: [16, ...]."""
    codes = torch.arange(16).view(-1, 1, 1)
    return (codes - params.zero.int()) * params.scale.codes.int()


@pytest.mark.parametrize("protect", [112, 119, 127])
def test_every_code_of_every_group_is_an_int8(protect):
    params = progressive(group=4, protect=protect).fit(rows_of_all_extremes(protect))
    assert middles(params).abs().max() <= 127
    assert params.scale.codes.min() == 1
    assert params.scale.codes.max() == min(15, round(2 * protect / 15))


def test_the_nearest_zero_alone_would_leave_int8():
    """(-119, 114) has step 16 and zero 7 without the rule: code 15 means 128. (-69, 119): 13 and 5, 130."""
    for low, high, step, zero in ((-119, 114, 16, 7), (-69, 119, 13, 5)):
        assert round((high - low) / 15) == step
        assert round(-low / step) == zero
        assert (15 - zero) * step > 127
        params = progressive(group=4).fit(torch.tensor([[119.0, 0, 0, 0, low, high, 0, 0]]))
        assert middles(params).abs().max() <= 127


def test_a_moved_zero_clips_less_than_half_a_step_unless_the_step_was_16():
    rows = rows_of_all_extremes()
    q = progressive(group=4).quantize(rows)
    error = (q.dequantize() - rows).abs().unflatten(-1, (-1, 4)).amax(-1)[:, 1]
    step = q.scale.codes[:, 1].int()  # the second group holds the pair
    span = rows[:, 5] - rows[:, 4]
    short = (span - 15 * step).clamp(min=0)  # what a step rounded down cannot cover
    wide = span >= 233
    assert (error <= step / 2 + short)[~wide].all()
    assert error[wide].max() <= 14


def test_ldlq_uses_codes_that_rounding_does_not_and_stays_in_int8():
    g = torch.Generator().manual_seed(0)
    fmt = progressive(group=32)
    w = torch.rand(64, 128, generator=g) * 2 - 1
    base = torch.randn(512, 8, generator=g) @ torch.randn(8, 128, generator=g)
    x = base + 0.05 * torch.randn(512, 128, generator=g)  # correlated inputs: much feedback
    q = Ldlq()(w, Stats(gram=x.t() @ x / len(x), tokens=len(x)), fmt)
    assert not torch.equal(q.codes, fmt.quantize(w).codes)
    middle = (q.codes.int().unflatten(-1, (-1, 32)) - q.zero.int()[..., None]) * q.scale.codes.int()[
        ..., None
    ]
    assert middle.abs().max() <= 127
    again = middle.flatten(-2) * q.scale.scale.float()
    torch.testing.assert_close(again, q.dequantize())


def test_learned_ranges_keep_the_promise():
    fmt, x = progressive(group=4), rows_of_all_extremes()
    assert middles(steps(fmt, *interval(fmt, x), x).params).abs().max() <= 127


def test_symmetric_groups_keep_it_too():
    own = Format(grid=Int(8, signed=False), block=Channel(), range=Progressive(), scale=FP16)
    fmt = Format(grid=by_name("int4"), block=Group(4), range=AbsMax(), scale=own)
    params = fmt.fit(rows_of_all_extremes())
    assert (params.scale.codes.int() * 8).max() <= 127


@pytest.mark.parametrize("protect", [0, 128])
def test_a_protective_range_beyond_int8_is_refused(protect):
    with pytest.raises(InputError, match="protective range"):
        progressive(protect=protect)
