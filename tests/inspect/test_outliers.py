"""Figures of an input: known ones for known distributions, the same however the text is cut into batches."""

import math

import pytest
import torch
from tiny import tiny_tokenizer

from fewbit.inspect.outliers import SAMPLE, Watch, gauss_reach
from fewbit.inspect.residual import depth
from fewbit.inspect.tokens import Kind, Tokens


@pytest.fixture(scope="module")
def tokens():
    """Eight windows of 64 tokens."""
    ids = torch.randint(4, 288, (8, 64), generator=torch.Generator().manual_seed(1))
    return Tokens(ids, tiny_tokenizer())


def normal(n=512, width=96, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def seen(x, tokens, batch=512):
    watch = Watch(len(x))
    for part in x.split(batch):
        watch.add(part)
    return watch.report(tokens)


def test_normal_values_lose_nothing(tokens):
    report = seen(normal() * 0.3, tokens)
    assert report.kurtosis == pytest.approx(3, rel=0.05)
    assert report.rms == pytest.approx(0.3, rel=0.02)
    assert abs(report.bits_lost) < 0.3
    assert abs(report.bits_lost_token) < 0.2
    assert report.channels == ()
    assert report.tokens_out == 0


def test_a_shift_changes_no_kurtosis(tokens):
    assert seen(normal() + 5, tokens).kurtosis == pytest.approx(3, rel=0.05)


def test_one_value_16_times_as_far_costs_four_bits(tokens):
    x = normal()
    x[7, 3] = 16 * x.abs().max()
    before, after = seen(normal(), tokens), seen(x, tokens)
    grown = 0.5 * math.log2(float(x.square().mean() / normal().square().mean()))
    assert after.bits_lost - before.bits_lost == pytest.approx(4 - grown, abs=1e-3)
    assert after.bits_lost_token - before.bits_lost_token < 0.02  # one token of 512


def test_the_reach_of_normal_values():
    x = normal(4000, 1000)
    assert float((x.abs() > gauss_reach(1000)).float().sum(1).mean()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("batch", [512, 100, 64, 1])
def test_batches_do_not_matter(tokens, batch):
    x = normal() * torch.linspace(0.1, 9, 96)
    whole, parts = seen(x, tokens), seen(x, tokens, batch)
    assert [c.index for c in parts.channels] == [c.index for c in whole.channels]
    assert [c.share for c in parts.channels] == [c.share for c in whole.channels]
    assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-4)
    assert (parts.low, parts.high) == (whole.low, whole.high)
    one, many = Watch(512), Watch(512)
    one.add(x)
    for part in x.split(batch):
        many.add(part)
    assert torch.equal(one.sample, many.sample)
    assert len(one.sample) == SAMPLE


def test_channels_stand_out_by_either_criterion(tokens):
    x = normal() * 0.1
    x[:, 5] *= 8  # far from the others, but small
    x[:, 9] *= 200
    x[::20, 30] = 7  # at 5 % of the tokens: not often enough, but far
    found = {c.index: c for c in seen(x, tokens).channels}
    assert set(found) == {5, 9, 30}
    assert (found[5].by, found[9].by, found[30].by) == ("relative", "both", "relative")
    assert found[9].share == pytest.approx(float((x[:, 9].abs() >= 6).float().mean()))
    assert found[5].ratio == pytest.approx(8, rel=0.1)
    big = {c.index: c.by for c in seen(normal() * 4, tokens).channels}
    assert len(big) == 96  # LLM.int8()'s criterion knows no scale of its own
    assert set(big.values()) == {"absolute"}


def test_tokens_that_stand_out_have_kinds_and_texts(tokens):
    x = normal()
    x[::64] *= 40  # the first of each window
    report = seen(x, tokens)
    assert report.tokens_out == pytest.approx(8 / 512)
    assert report.kinds == {"first": 8}
    assert set(report.texts) <= {tokens.text(int(i)) for i in tokens.ids[:, 0]}
    assert report.texts


def test_an_input_of_some_tokens_has_figures_but_no_kinds(tokens):
    x = normal(100)
    x[::20] *= 40
    report = seen(x, tokens)
    assert report.tokens == 100
    assert report.tokens_out == pytest.approx(0.05)
    assert (report.kinds, report.texts) == ({}, ())


def test_kinds_of_tokens():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(" the", add_special_tokens=False).input_ids[0]]
    ids += [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "Ċ", "Ġ", ".", "7", "a", "é")]
    made = Tokens(torch.tensor([ids]), tokenizer)
    kinds = [
        Kind.FIRST,
        Kind.SPECIAL,
        Kind.SEPARATOR,
        Kind.SEPARATOR,
        Kind.PUNCTUATION,
        Kind.OTHER,
        Kind.OTHER,
    ]
    assert made.kinds[0, :7].tolist() == kinds
    assert made.text(ids[2]) == "\\n"
    assert made.at(4) == "'.' at 4"


def test_massive_activations_are_large_and_far(tokens):
    x = normal(512, 96).view(8, 64, 96)
    x[3, 0, 17] = -5000
    x[5, 2, 17] = 4000
    x[1, 1, 4] = 90  # far, but not above 100
    found = depth(2, list(x.split(3)), tokens)
    assert [(m.channel, m.value) for m in found.massive] == [(17, -5000)]
    assert found.massive[0].token == tokens.at(3 * 64)
    assert found.largest == 5000
    assert found.token == pytest.approx(float(x.abs().amax(-1).median()), rel=1e-3)
    assert depth(2, [x.clamp(-90, 90)], tokens).massive == ()
