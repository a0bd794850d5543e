"""Gradients in FP8 as soon as they exist, clipping by their steps, steps left out, levels, loss scaling."""

import copy
import math
import warnings

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32, QTensor, format_by_name
from fewbit.train import (
    LEVELS,
    O2,
    O3,
    Guard,
    LossScaler,
    clip_gradients,
    fp8_gradients,
    gradient,
    gradients,
    low_adamw,
)
from fewbit.train.gradients import clear, covered, rescale, wide
from fewbit.train.guard import NonFiniteStep, gradient_norm
from fewbit.train.states import Held, one_step, quantize


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def loss_of(net, seed=0):
    x = randn(32, 64, seed=seed).to(net[0].weight.dtype)
    return (net(x) - x.flip(-1)).float().square().mean()


def twins():
    """The same model with wide gradients and with FP8 ones, of the same loss."""
    a = model()
    b = copy.deepcopy(a)
    fp8_gradients(b)
    loss_of(a).backward()
    loss_of(b).backward()
    return a, b


# -- gradients


def test_after_backward_covered_parameters_hold_codes_and_nothing_wide():
    a, b = twins()
    assert set(gradients(b)) == {"0.weight", "2.weight"}
    for name, q in gradients(b).items():
        p, g = b.get_parameter(name), a.get_parameter(name).grad
        assert p.grad is None
        assert (q.codes.dtype, q.codes.shape) == (torch.uint8, p.shape)
        assert torch.equal(q.dequantize(), quantize(g, one_step("e4m3fn")).dequantize())
        assert (q.dequantize() - g).abs().max() <= 2**-4 * g.abs().max()
    assert torch.equal(b[0].bias.grad, a[0].bias.grad)


def test_no_two_wide_gradients_of_covered_parameters_live_at_once():
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    fp8_gradients(net)
    alive = []
    for layer in net:
        see = lambda p: alive.append(sum(m.weight.grad is not None for m in net))  # noqa: E731
        layer.weight.register_post_accumulate_grad_hook(see)
    net(randn(8, 64)).sum().backward()
    assert alive == [0, 0, 0, 0]


def test_micro_batches_add_up_in_float32():
    a, b = twins()
    first = {n: q.dequantize() for n, q in gradients(b).items()}
    a.zero_grad()
    loss_of(a, seed=1).backward()
    loss_of(b, seed=1).backward()
    for name, q in gradients(b).items():
        exact = first[name] + a.get_parameter(name).grad
        assert torch.equal(q.dequantize(), quantize(exact, one_step("e4m3fn")).dequantize())


def test_a_sum_of_many_micro_batches_stays_near_the_wide_one():
    a, b = model(), model()
    fp8_gradients(b)
    for seed in range(16):
        loss_of(a, seed).backward()
        loss_of(b, seed).backward()
    exact = a[0].weight.grad
    assert (gradient(b[0].weight).dequantize() - exact).norm() < 0.08 * exact.norm()  # 0.027 for one


def test_embeddings_tied_weights_norms_and_small_tensors_stay_wide():
    net = tiny("llama").train()  # its head is tied to the embedding
    named = covered(net, min_size=1)
    assert set(named) == {n for n, _ in net.named_parameters() if n.endswith("_proj.weight")}
    fp8_gradients(net, min_size=1)
    ids = tiny_ids(2)
    net(input_ids=ids, labels=ids).loss.backward()
    kinds = {n: type(gradient(p)) for n, p in net.named_parameters()}
    assert {n for n, kind in kinds.items() if kind is QTensor} == set(named)
    assert kinds["model.embed_tokens.weight"] is torch.Tensor


def test_hooks_can_be_taken_off_and_gradients_cleared():
    net = model()
    for handle in fp8_gradients(net).values():
        handle.remove()
    loss_of(net).backward()
    assert net[0].weight.grad is not None
    _, b = twins()
    low_adamw("fp32", b.parameters()).zero_grad()
    assert all(gradient(p) is None for p in b.parameters())
    assert not gradients(b)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e4, 1e30])
def test_gradients_of_any_size_fit(scale):
    g = randn(64, 64) * scale
    error = quantize(g, one_step("e4m3fn")).dequantize() - g
    assert error.double().norm() < 0.03 * g.double().norm()


def test_what_cannot_hold_a_gradient_is_refused():
    with pytest.raises(InputError, match="a gradient cannot be"):
        fp8_gradients(model(), format_by_name("mxfp8-e4m3"))
    with pytest.raises(InputError, match="need a step of their own, and fp32 has none"):
        fp8_gradients(model(), FP32)
    with pytest.raises(InputError, match="no weight of a linear layer of Embedding trains"):
        fp8_gradients(nn.Embedding(100, 100))


# -- clipping


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_edits_steps_alone_and_is_torchs(max_norm):
    a, b = twins()
    for name, p in a.named_parameters():  # the same numbers on both sides
        p.grad = wide(gradient(b.get_parameter(name))).clone()
    before = {n: (q.codes.clone(), q.scale.clone()) for n, q in gradients(b).items()}
    norm = torch.nn.utils.clip_grad_norm_(a.parameters(), max_norm)
    assert clip_gradients(b.parameters(), max_norm) == pytest.approx(norm.item(), rel=1e-6)
    for name, q in gradients(b).items():
        assert torch.equal(q.codes, before[name][0])
        assert torch.equal(q.scale, before[name][1] * (max_norm / (norm + 1e-6)).clamp(max=1))
    for name, p in b.named_parameters():
        assert torch.allclose(wide(gradient(p)), a.get_parameter(name).grad, rtol=1e-5, atol=0)
    assert gradient_norm(b.parameters()) <= max_norm or max_norm > norm
    with pytest.raises(InputError, match="cannot be clipped to a norm of 0"):
        clip_gradients(b.parameters(), 0.0)


def test_no_gradients_have_the_norm_zero():
    assert gradient_norm(model().parameters()) == 0


# -- steps left out


def everything(net, optimizer):
    states = [
        (s["step"], *(h.codes for h in s.values() if isinstance(h, Held))) for s in optimizer.state.values()
    ]
    return [t.clone() for t in (*net.parameters(), *(t for s in states for t in s))]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["wide", *LEVELS])
def test_a_step_with_inf_or_nan_is_left_out_reported_and_counted(name, bad):
    net = model(torch.float32 if name == "wide" else torch.bfloat16)
    optimizer = low_adamw("adamw-8bit", net.parameters()) if name == "wide" else LEVELS[name].optimizer(net)
    guard = Guard(optimizer, max_norm=1.0, names={p: n for n, p in net.named_parameters()})
    loss_of(net).backward()
    assert guard.step().taken
    optimizer.zero_grad()
    before = everything(net, optimizer)
    (loss_of(net) + bad * net[2].weight[0, 0]).backward()
    with pytest.warns(
        NonFiniteStep, match=r"step 2 left out: the gradient of 2.weight holds NaN or Inf; 1 of 2"
    ):
        step = guard.step()
    assert (step.taken, step.bad) == (False, ("2.weight",))
    assert not math.isfinite(step.norm)
    for now, was in zip(everything(net, optimizer), before, strict=True):
        assert torch.equal(now, was)
    assert all(gradient(p) is None for p in net.parameters())
    loss_of(net).backward()
    assert guard.step().taken
    assert guard.state_dict() == {"steps": 3, "skipped": 1}
    other = Guard(optimizer)
    other.load_state_dict(guard.state_dict())
    assert other.skipped == 1


def test_a_run_with_one_bad_step_is_the_run_without_it():
    def run(bad):
        net = model(torch.bfloat16)
        optimizer = O3.optimizer(net, lr=1e-3)
        guard = Guard(optimizer, max_norm=1.0)
        for seed in range(6):
            if bad and seed == 3:
                (loss_of(net, seed=99) * math.inf).backward()
                with pytest.warns(NonFiniteStep):
                    guard.step()
            loss_of(net, seed).backward()
            guard.step()
            optimizer.zero_grad()
        return net

    for a, b in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_bad_micro_batch_spoils_its_step():
    _, b = twins()
    (loss_of(b) * math.inf).backward()
    loss_of(b).backward()
    assert gradient(b[0].weight).dequantize().isnan().all()


# -- levels


def test_levels_keep_what_their_table_says():
    for name, level in LEVELS.items():
        net = model(torch.bfloat16)
        optimizer = level.optimizer(net, lr=1e-3)
        loss_of(net).backward()
        optimizer.step()
        w, bias = net[0].weight, net[0].bias
        assert isinstance(gradient(w), QTensor)
        states = optimizer.state[w]
        for part in ("first", "second", "master"):
            assert states[part].format == getattr(level.states, part)
            assert optimizer.state[bias][part].format is None or optimizer.state[bias][part].format == FP32
        bytes_each = sum(states[k].codes.nbytes for k in ("first", "second", "master")) / w.numel() + 1
        assert bytes_each == (11 if name == "O1" else 6)
        rounded = quantize(w, one_step("e4m3fn")).dequantize()
        assert torch.equal(rounded, w.float()) == (name == "O3")


def test_at_o3_the_model_computes_with_fp8_weights_from_the_first_step_on():
    net = model(torch.bfloat16)
    master = net[0].weight.detach().clone()
    optimizer = O3.optimizer(net)
    assert torch.equal(net[0].weight.float(), quantize(master, one_step("e4m3fn")).dequantize())
    kept = optimizer.state[net[0].weight]["master"].read()
    assert torch.equal(kept.bfloat16(), master)  # the master has what the weight lost


@pytest.mark.parametrize(("level", "near"), [(O2, 0.02), (O3, 0.05)])
def test_levels_learn_as_float32_does(level, near):
    def losses(net, optimizer):
        guard, found = Guard(optimizer, max_norm=1.0), []
        for seed in range(80):
            optimizer.zero_grad()
            loss = loss_of(net, seed)
            loss.backward()
            guard.step()
            found.append(loss.item())
        return sum(found[-10:])

    wide_net, low_net = model(), model()
    reference = losses(wide_net, low_adamw("fp32", wide_net.parameters(), lr=3e-3))
    assert losses(low_net, level.optimizer(low_net, lr=3e-3)) == pytest.approx(reference, rel=near)


# -- loss scaling (float16) through torch's own parts


@pytest.mark.parametrize("low", [False, True])
def test_loss_scaling_changes_nothing_but_the_range(low):
    def run(scaler):
        net = model()
        if low:
            fp8_gradients(net)
        optimizer = low_adamw("fp8-lm", net.parameters(), lr=1e-3)
        for seed in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, seed)).backward()
            scaler.unscale_(optimizer)
            clip_gradients(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return net

    scaled = run(LossScaler("cpu", init_scale=2.0**16))
    plain = run(LossScaler("cpu", enabled=False))
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [False, True])
def test_the_scaler_backs_off_at_an_overflow_and_grows_after_quiet_steps(low):
    net = model()
    if low:
        fp8_gradients(net)
    optimizer = low_adamw("fp8-lm", net.parameters())
    scaler = LossScaler("cpu", init_scale=2.0**10, growth_interval=4)
    scales = []
    for t in range(9):
        optimizer.zero_grad()
        loss = loss_of(net, t)
        if t == 2:
            loss = loss + math.inf * net[2].weight[0, 0]
        before = everything(net, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(everything(net, optimizer), before, strict=False))
        assert same == (t == 2)
        scales.append(math.log2(scaler.get_scale()))
    assert scales == [10, 10, 9, 9, 9, 9, 10, 10, 10]


def test_rescaling_by_a_power_of_two_is_exact():
    q = quantize(randn(64, 64), one_step("e4m3fn"))
    assert torch.equal(rescale(q, 0.25).dequantize(), q.dequantize() / 4)
    p = nn.Parameter(randn(2, 2))
    p.grad = torch.ones(2, 2)
    clear([p])
    assert gradient(p) is None
