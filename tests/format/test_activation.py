"""Centred inputs: what the means of columns take from the error, and how they are given."""

from dataclasses import replace

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Format, Params, PerTensor, Token
from fewbit.format.activation import Activation
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import by_name

INT4 = Activation(format=Format(grid=by_name("int4"), block=Token(), scale=FP32))
CENTRED = replace(INT4, centred=True)


def rows(tokens=300, n=64):
    """Inputs half of whose energy is one vector that all tokens share."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, n, generator=g) + torch.randn(n, generator=g)


def test_without_the_means_half_of_the_energy_brings_half_of_the_error():
    x = rows()
    lost = [(own(x, p) - x).square().mean() for own, p in ((INT4, None), (CENTRED, CENTRED.center(x)))]
    assert lost[1] < 0.6 * lost[0]


def test_a_centred_input_is_its_mean_and_the_rounded_rest():
    x = rows()
    params = CENTRED.center(x)
    assert params.scale is None
    assert params.zero.dtype == torch.bfloat16
    c = params.zero.float()
    assert torch.equal(CENTRED(x.view(3, 100, 64), params).flatten(0, 1), c + INT4(x - c))
    assert CENTRED(x.bfloat16(), params).dtype == torch.bfloat16


def test_columns_apart_stay_as_they_are():
    x = rows()
    x[:, 5] *= 100
    apart = torch.tensor([5])
    got = CENTRED(x, CENTRED.center(x), apart)
    torch.testing.assert_close(got[:, 5], x[:, 5])
    c = torch.where(torch.arange(64) == 5, 0.0, CENTRED.center(x).zero.float())
    torch.testing.assert_close(got[:, 6:], (c + INT4((x - c).index_fill(1, apart, 0)))[:, 6:])


def test_it_is_plain_data_and_says_what_it_is():
    assert from_plain(to_plain(CENTRED)) == CENTRED
    assert str(CENTRED).endswith("dynamic, centred")


def test_means_that_are_missing_and_impossible_settings_are_refused():
    with pytest.raises(InputError, match="calibration has to find"):
        CENTRED(rows())
    with pytest.raises(InputError, match="centred inputs need dynamic steps"):
        replace(CENTRED, outliers=6.0)
    with pytest.raises(InputError, match="centred inputs need dynamic steps"):
        replace(CENTRED, static=True, format=replace(INT4.format, block=PerTensor()))
    assert CENTRED(rows()[:0]).shape == (0, 64)
    assert CENTRED(rows(), Params(scale=None, zero=torch.zeros(64))).isfinite().all()
