"""Tuning a block: better than rounding on its calls, exact, repeatable, and it leaves the block alone."""

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import BF16, FP32, MSE, AbsMax, Format, Group, MinMax, Stats, Token, Zero, format_by_name
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.nn.blocks import find_blocks, is_transposed, linears
from fewbit.solve import SolverWarning
from fewbit.solve.calls import Target
from fewbit.solve.lwc import Lwc
from fewbit.solve.signround import SignRound, SignSGD
from fewbit.solve.tune import layer


def asymmetric(bits, range=None, block=32):
    grid = by_name(f"uint{bits}")
    return Format(grid=grid, block=Group(block), zero=Zero.INTEGER, scale=BF16, range=range or MinMax())


def caught(arch="llama", rows=6, length=16, index=1):
    """A block of a tiny model with its own calls and float outputs, one sequence each."""
    model, inputs, outputs = tiny(arch), [], []
    block = find_blocks(model).modules[index]

    def hook(module, args, kwargs, out):
        inputs.append((args, kwargs))
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handle = block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for ids in tiny_ids(rows, length):
            model(ids[None], use_cache=False)
    handle.remove()
    return block, inputs, outputs


def targets(block, fmt, activation=None):
    return {
        n: Target(format=fmt, activation=activation, transposed=is_transposed(m))
        for n, m in linears(block).items()
    }


@torch.no_grad()
def block_error(block, inputs, outputs, weights):
    """Relative squared error of the block with the given weights put in by hand, then taken out again."""
    before = {n: p.clone() for n, p in block.named_parameters()}
    for n, w in weights.items():
        module = block.get_submodule(n)
        module.weight.copy_(w.t() if is_transposed(module) else w)
    got = [block(*args, **kwargs) for args, kwargs in inputs]
    got = [y[0] if isinstance(y, tuple) else y for y in got]
    for n, p in block.named_parameters():
        p.copy_(before[n])
    error = sum((a - b).square().sum() for a, b in zip(got, outputs, strict=True))
    return float(error / sum(b.square().sum() for b in outputs))


TUNERS = {"lwc": Lwc(steps=40, lr=0.05), "signround": SignRound(steps=40)}
FORMATS = {
    "uint2": asymmetric(2),
    "uint3-mse": asymmetric(3, MSE()),
    "int3": Format(grid=by_name("int3"), block=Group(32), scale=FP32, range=AbsMax()),
    "nvfp4": format_by_name("nvfp4"),
    "nf4": format_by_name("nf4"),
}


@pytest.mark.parametrize("tuner", TUNERS.values(), ids=TUNERS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_lowers_the_error_of_the_block_below_rounding(tuner, fmt):
    block, inputs, outputs = caught()
    got = tuner.tune(block, targets(block, fmt), inputs, outputs, 0)
    first = next(iter(got.values()))
    assert first.error == min(first.start, *first.looks)
    assert first.error < (0.75 if isinstance(tuner, SignRound) else 0.999) * first.start
    weights = {n: t.q.dequantize() for n, t in got.items()}
    assert block_error(block, inputs, outputs, weights) == pytest.approx(first.error, rel=1e-5)


def test_the_start_is_rounding_to_nearest():
    block, inputs, outputs = caught()
    fmt = asymmetric(3)
    got = Lwc(steps=1, looks=1).tune(block, targets(block, fmt), inputs, outputs, 0)
    rounded = {n: fmt.quantize(m.weight.detach()).dequantize() for n, m in linears(block).items()}
    start = next(iter(got.values())).start
    assert block_error(block, inputs, outputs, rounded) == pytest.approx(start, rel=1e-5)


def test_a_rate_that_ruins_the_block_returns_the_start():
    block, inputs, outputs = caught()
    fmt = asymmetric(4, MSE(weighted=False))
    got = Lwc(steps=4, lr=100.0).tune(block, targets(block, fmt), inputs, outputs, 0)
    for n, t in got.items():
        assert min(t.looks) > t.start == t.error
        assert torch.equal(t.q.codes, fmt.quantize(block.get_submodule(n).weight.detach()).codes)


@pytest.mark.parametrize("tuner", TUNERS.values(), ids=TUNERS)
def test_same_seed_same_codes_and_the_block_stays_as_it_was(tuner):
    block, inputs, outputs = caught()
    before = {n: p.clone() for n, p in block.named_parameters()}
    runs = [tuner.tune(block, targets(block, asymmetric(2)), inputs, outputs, s) for s in (5, 5, 6)]
    equal = [all(torch.equal(runs[0][n].q.codes, run[n].q.codes) for n in run) for run in runs]
    assert equal == [True, True, False]
    for n, p in block.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is None
    assert not any(m._forward_pre_hooks for m in block.modules())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_logits_at_infinity_are_the_range_rule_and_logits_of_4_take_982_thousandths(fmt):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    state = layer(w, fmt, None)
    full = [torch.full_like(state.lo, torch.inf)] * 2
    lo, hi, nudge = Lwc().place(state, full)
    assert nudge is None
    torch.testing.assert_close(torch.stack([lo, hi]), torch.stack([state.lo, state.hi]), rtol=0, atol=0)
    small = Lwc().place(state, [torch.full_like(state.lo, 4.0)] * 2)
    torch.testing.assert_close(small[0] / lo, torch.full_like(lo, 0.98201))
    start = Lwc(init=30.0).place(state, Lwc(init=30.0).leaves(state))[:2]
    rule = [state.low * state.lo, state.high * state.hi]
    torch.testing.assert_close(torch.stack(start), torch.stack(rule), rtol=2e-6, atol=0)


def test_start_of_signround_is_the_range_rule_exactly():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    for fmt in FORMATS.values():
        state = layer(w, fmt, None)
        _, hi, nudge = SignRound().place(state, SignRound().leaves(state))
        assert not nudge.any()
        torch.testing.assert_close(hi, state.high * state.hi, rtol=0, atol=0)


def test_a_constant_gradient_moves_a_weight_to_the_other_neighbour_and_no_further():
    p = torch.zeros(3, requires_grad=True)
    rate, total = SignRound(steps=50).rate, 50
    optimizer = SignSGD([{"params": [p], "low": -0.5, "high": 0.5}], rate)
    for t in range(total):
        p.grad = torch.tensor([1e-9, -1e9, 0.0])
        optimizer.param_groups[0]["lr"] = rate * (1 - t / total)
        optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0]


def test_inputs_that_will_be_quantized_are_quantized_while_tuning():
    block, inputs, outputs = caught()
    act = Activation(format=Format(grid=by_name("int4"), block=Token(), scale=FP32))
    fmt = asymmetric(4, MSE(weighted=False))
    alone = SignRound(steps=20).tune(block, targets(block, fmt), inputs, outputs, 0)
    both = SignRound(steps=20).tune(block, targets(block, fmt, act), inputs, outputs, 0)
    a, b = next(iter(alone.values())), next(iter(both.values()))
    assert b.start > 2 * a.start
    assert b.error < b.start


def test_transposed_weights_are_tuned_as_out_by_in():
    block, inputs, outputs = caught("gpt2")
    got = SignRound(steps=20).tune(block, targets(block, asymmetric(2)), inputs, outputs, 0)
    assert got["mlp.c_fc"].q.shape == (128, 64)
    error = block_error(block, inputs, outputs, {n: t.q.dequantize() for n, t in got.items()})
    assert error == pytest.approx(got["mlp.c_fc"].error, rel=1e-5)
    assert error < got["mlp.c_fc"].start


class RootOfZero(nn.Module):
    """Finite forward, NaN backward: the derivative of the root at 0 is infinite, times 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 8, bias=False)

    def forward(self, x):
        y = self.linear(x)
        return y + (0 * y).sqrt()


def test_steps_with_nan_gradients_are_skipped_and_told():
    block = RootOfZero()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = block(x)
    with pytest.warns(SolverWarning, match="3 of 3"):
        got = Lwc(steps=3, looks=3).tune(
            block, {"linear": Target(format=asymmetric(2))}, [((x,), {})], [y], 0
        )
    assert len(set(got["linear"].looks)) == 1  # nothing moved
    assert torch.isfinite(got["linear"].q.dequantize()).all()


def test_bad_requests_are_refused_in_a_sentence():
    block, inputs, outputs = caught(rows=2)
    tune = Lwc(steps=1, looks=1).tune
    with pytest.raises(InputError, match="no layer 'mlp"):
        tune(block, {"mlp.nothing": Target(format=asymmetric(4))}, inputs, outputs, 0)
    with pytest.raises(InputError, match="2 calls and 1 targets"):
        tune(block, targets(block, asymmetric(4)), inputs, outputs[:1], 0)
    with pytest.raises(InputError, match="cannot be learned"):
        tune(block, targets(block, Format(grid=by_name("bf16"))), inputs, outputs, 0)
    bad = [((torch.full_like(a[0], torch.nan), *a[1:]), k) for a, k in inputs]
    with pytest.raises(InputError, match="NaN or Inf"):
        tune(block, targets(block, asymmetric(4)), bad, outputs, 0)
    with pytest.raises(InputError, match="whole block"):
        Lwc()(torch.ones(2, 32), Stats(), asymmetric(4))
    with pytest.raises(InputError, match="looks"):
        SignRound(steps=2, looks=3)
