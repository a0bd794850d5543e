"""Dampening keeps every code, ends oscillation, and training is the better for it (Nagel et al. 2022)."""

import pytest
import torch
from quantized import int_format
from torch import nn

from fewbit.errors import InputError
from fewbit.format import Channel
from fewbit.train import FakeLinear, LearnedRange, Straight, dampen
from fewbit.transform import Incoherence

FORMAT = int_format(3, Channel())


def layer(columns: int = 64, **fields) -> FakeLinear:
    torch.manual_seed(0)
    return FakeLinear(nn.Linear(columns, 32, bias=False), FORMAT, LearnedRange(), **fields)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_weights_go_their_share_of_the_way_and_keep_their_codes(share):
    trained = layer()
    before, codes, value = trained.weight.clone(), trained.to_quantized().qweight.codes, trained.rounded()
    dampen(nn.Sequential(trained), share)
    torch.testing.assert_close(trained.weight, before + share * (value - before))
    assert torch.equal(trained.to_quantized().qweight.codes, codes)
    assert not torch.equal(trained.weight, before)


def test_the_way_lies_in_the_weight_s_own_basis():
    trained = layer(basis=Incoherence(seed=0))
    x = torch.randn(8, 64)
    want = trained(x)
    dampen(trained, 1.0)
    torch.testing.assert_close(nn.functional.linear(x, trained.weight), want, rtol=1e-4, atol=1e-4)


def test_what_is_trained_by_no_step_is_dampened_as_well():
    torch.manual_seed(0)
    trained = FakeLinear(nn.Linear(64, 32, bias=False), FORMAT, Straight())
    value = trained.rounded()
    dampen(trained, 1.0)
    torch.testing.assert_close(trained.weight, value)


def flips_and_loss(strength: float) -> tuple[float, float]:
    """A linear map learned at 3 bits from noisy batches at one rate: codes that change in an update, mean of
    the last 200; the error that is left."""
    torch.manual_seed(1)
    trained, target, eta = layer(), torch.randn(32, 64) / 14, 2e-2
    optimizer = torch.optim.Adam([trained.weight], lr=eta * trained.weight.std().item())
    held, flips, errors, codes = torch.randn(512, 64), [], [], None
    for step in range(600):
        x = torch.randn(32, 64)
        loss = (trained(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dampen(trained, eta * strength)
        if step >= 400:
            now = trained.to_quantized().qweight.codes
            flips.append(0 if codes is None else (now != codes).sum().item())
            codes = now
            with torch.no_grad():
                errors.append((trained(held) - held @ target.T).square().mean().item())
    return sum(flips) / len(flips), sum(errors) / len(errors)


def test_oscillation_ends_and_the_error_falls():
    free, drawn = flips_and_loss(0.0), flips_and_loss(1.0)
    assert drawn[0] < 0.2 * free[0], f"codes that change in an update: {free[0]} -> {drawn[0]}"
    assert drawn[1] < 0.8 * free[1], f"error: {free[1]} -> {drawn[1]}"


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    trained = layer()
    before = trained.weight.clone()
    with pytest.raises(InputError, match="from 0 to 1"):
        dampen(trained, share)
    assert torch.equal(trained.weight, before)


def test_a_model_without_layers_that_train_is_refused():
    with pytest.raises(InputError, match="call prepare first"):
        dampen(nn.Sequential(nn.Linear(4, 4)), 0.5)
