"""KL divergence and top-1 agreement against sums done by hand."""

import math

import pytest
import torch

from fewbit.evaluate.divergence import kl_divergence, top1_agreement


def log(*rows):
    return torch.tensor(rows).log()


def test_kl_is_the_sum_over_the_original_of_the_difference_of_logs():
    original, result = log([0.5, 0.25, 0.25], [0.9, 0.05, 0.05]), log([0.25, 0.5, 0.25], [0.8, 0.1, 0.1])
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    second = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.5)
    assert kl_divergence(original, result).tolist() == pytest.approx([first, second], rel=1e-5)


def test_kl_charges_the_result_for_what_it_rules_out_and_not_the_original():
    sure, open_ = log([1.0, 0.0]), log([0.5, 0.5])
    assert kl_divergence(sure, open_).item() == pytest.approx(math.log(2))
    assert kl_divergence(open_, sure).item() == math.inf


def test_kl_of_a_distribution_with_itself_is_exactly_zero():
    scores = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) * 10
    scores[:, 7] = -math.inf
    same = scores.log_softmax(-1)
    assert kl_divergence(same, same.clone()).tolist() == [0.0] * 50


def test_kl_is_never_below_zero_by_more_than_rounding():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(200, 300, generator=generator).log_softmax(-1) for _ in range(2))
    assert kl_divergence(p, q).min() > 0
    assert kl_divergence(p, p + 1e-6 * torch.randn(200, 300, generator=generator)).abs().max() < 1e-5


def test_top1_agreement_looks_at_the_likeliest_word_alone():
    original, result = log([0.4, 0.6], [0.4, 0.6], [0.9, 0.1]), log([0.0, 1.0], [0.6, 0.4], [0.51, 0.49])
    assert top1_agreement(original, result).tolist() == [True, False, True]
