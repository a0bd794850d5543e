"""EfficientQAT: blocks that learn, then steps alone."""

import copy

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.evaluate.divergence import kl_divergence
from fewbit.format import FP16, FP32, Format, Group, MinMax, Zero
from fewbit.grid import Int
from fewbit.nn import QLinear
from fewbit.recipe import Recipe, Rule
from fewbit.solve.blocktune import BlockTuning
from fewbit.train import LearnedRange, StepLinear, convert, prepare, train_blocks, train_steps
from fewbit.train.blocks import plain

AFFINE = Format(grid=Int(2), block=Group(32), range=MinMax(), zero=Zero.INTEGER, scale=FP16)
RULES = Recipe(name="qat", rules=(Rule(weight=AFFINE),))
BATCHES = [{"input_ids": tiny_ids(batch=4, seed=seed)} for seed in range(6)]
TEST = {"input_ids": tiny_ids(batch=4, seed=99)}


def divergence(model, original) -> float:
    with torch.no_grad():
        p, q = (m(**TEST).logits.float().log_softmax(-1) for m in (original, model))
    return kl_divergence(p, q).mean().item()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_trained_blocks_are_nearer_to_the_float_model_than_rounded_ones(arch):
    original = tiny(arch)
    rounded = convert(prepare(copy.deepcopy(original), RULES))
    model = prepare(copy.deepcopy(original), RULES, weight=LearnedRange())
    errors = train_blocks(model, BATCHES, BlockTuning(steps=40))
    assert all(e.after < 0.95 * e.before for e in errors)
    assert divergence(convert(model), original) < 0.75 * divergence(rounded, original)


def test_without_rounding_the_two_streams_are_one():
    """Blocks of a model that rounds nothing that matters have no error to learn from."""
    fine = Format(grid=Int(8), block=Group(32), scale=FP32)
    model = prepare(tiny("llama"), Recipe(name="fine", rules=(Rule(weight=fine),)), weight=LearnedRange())
    assert all(e.before < 1e-3 for e in train_blocks(model, BATCHES[:2], BlockTuning(steps=4)))
    with torch.no_grad(), plain(model):
        assert torch.equal(model(**TEST).logits, tiny("llama")(**TEST).logits)


def test_only_steps_learn_end_to_end_and_codes_stay():
    original = tiny("llama")
    model = convert(prepare(copy.deepcopy(original), RULES))
    before = divergence(model, original)
    codes = [m.codes.clone() for m in model.modules() if isinstance(m, QLinear)]
    train_steps(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all(name.endswith(".step") for name, _ in trained)
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-3, weight_decay=0.0)
    for _ in range(8):
        for batch in BATCHES:
            with torch.no_grad():
                target = original(**batch).logits.softmax(-1)
            loss = -(target * model(**batch).logits.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        want = model(**TEST).logits
        assert torch.equal(convert(model)(**TEST).logits, want)
    assert divergence(model, original) < 0.92 * before
    assert all(
        torch.equal(m.codes, c)
        for m, c in zip((m for m in model.modules() if isinstance(m, QLinear)), codes, strict=True)
    )


@pytest.mark.parametrize("zero", [Zero.NONE, Zero.INTEGER, Zero.FLOAT, Zero.OFFSET])
def test_the_gradient_of_a_step_is_the_slope_of_the_loss(zero):
    """With fixed codes the function is smooth, so finite differences see it."""
    fmt = Format(grid=Int(3), block=Group(16), range=MinMax(), zero=zero, scale=FP32)
    g = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(*shape, generator=g) for shape in ((4, 32), (7, 32), (7, 4)))
    layer = StepLinear(QLinear(fmt.quantize(w)))
    (layer(x) * dy).sum().backward()
    found, step, h = layer.step.grad.clone(), layer.step.data.clone(), 1e-2
    for i in range(step.numel()):
        sides = []
        for sign in (1, -1):
            layer.step.data = step.clone()
            layer.step.data.view(-1)[i] += sign * h
            with torch.no_grad():
                sides.append((layer(x) * dy).sum())
        slope = ((sides[0] - sides[1]) / (2 * h)).item()
        assert found.view(-1)[i] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_refusals_name_the_remedy():
    with pytest.raises(InputError, match="call prepare first"):
        train_blocks(tiny("llama"), BATCHES)
    with pytest.raises(InputError, match="two batches"):
        train_blocks(prepare(tiny("llama"), RULES), BATCHES[:1])
    with pytest.raises(InputError, match="quantize or convert"):
        train_steps(tiny("llama"))
