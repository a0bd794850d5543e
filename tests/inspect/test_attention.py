"""Shares of attention are those of the weights that the model computes."""

import pytest
import torch
from tiny import tiny

from fewbit.inspect import look
from fewbit.inspect.attention import AttentionWatch
from fewbit.inspect.tokens import Kind
from fewbit.stream.data import Calibration


def test_shares_by_kind_and_head():
    kinds = torch.tensor([[Kind.FIRST, Kind.OTHER, Kind.PUNCTUATION, Kind.OTHER]])
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, :, 0] = 1  # a head that rests on the first token
    weights[0, 1] = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.25, 0.25, 0, 0.5]])
    watch = AttentionWatch(kinds)
    watch.see(None, (), (torch.zeros(1), weights))
    report = watch.report()
    assert report.heads == 2
    assert report.resting == 1
    assert report.first_head == 1
    assert report.shares["first"] == pytest.approx((1 + 0.25 / 3) / 2)
    assert report.shares["punctuation"] == pytest.approx(1 / 3 / 2)
    assert sum(report.shares.values()) == pytest.approx(1)


def test_a_module_without_weights_says_nothing():
    watch = AttentionWatch(torch.zeros(1, 4, dtype=torch.int64))
    watch.see(None, (), (torch.zeros(1, 4, 8), None))
    watch.see(None, (), torch.zeros(1, 4, 8))
    assert watch.report() is None


def test_a_look_sees_what_the_model_attends_to(folders):
    seen = look(folders / "llama", Calibration(samples=3, seqlen=16))
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(seen.tokens.ids, output_attentions=True).attentions
    for report, w in zip(seen.attention, weights, strict=True):
        assert report.shares["first"] == pytest.approx(float(w[:, :, 1:, 0].mean()), rel=1e-4)
        assert report.first_head == pytest.approx(float(w[:, :, 1:, 0].mean((0, 2)).max()), rel=1e-4)


def test_a_model_that_gives_no_weights_is_looked_at_all_the_same(folders):
    seen = look(folders / "falcon", Calibration(samples=2, seqlen=16))
    assert seen.attention == (None, None)
    assert len(seen.groups) == 8
