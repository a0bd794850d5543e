"""prepare and convert: what trains is what is stored, on tiny models of transformers and by hand."""

import copy

import pytest
import torch
from quantized import int_format
from tiny import save_tiny, tiny, tiny_ids
from torch import nn

import fewbit
from fewbit.errors import InputError
from fewbit.format import (
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    FP16,
    FP32,
    Channel,
    Format,
    Gaussian,
    Group,
    MinMax,
    PerTensor,
    Zero,
)
from fewbit.format.activation import Activation
from fewbit.grid import Int, by_name
from fewbit.io.attached import make_saveable
from fewbit.nn import QLinear
from fewbit.recipe import Recipe, Rule, awq, higgs, rtn
from fewbit.train import (
    LSQ,
    FakeLinear,
    Identity,
    LearnedRange,
    Straight,
    Trust,
    convert,
    prepare,
    quest_input,
    quest_weight,
    start_from,
)
from fewbit.transform import Incoherence

IDS = {"input_ids": tiny_ids()}
SYMMETRIC = Format(grid=Int(4), block=Group(32), scale=FP16)
AFFINE = Format(grid=Int(3), block=Group(32), range=MinMax(), zero=Zero.INTEGER, scale=FP16)
NF4 = Format(grid=by_name("nf4"), block=Group(64), scale=DOUBLE_QUANT)
NVFP4 = Format(grid=by_name("e2m1"), block=Group(16), scale=E4M3_OVER_FP32)
STATIC = Activation(
    format=Format(grid=Int(8, signed=False), range=MinMax(), zero=Zero.OFFSET, scale=FP32), static=True
)
STATIC_SYMMETRIC = Activation(format=Format(grid=Int(8), block=PerTensor(), scale=FP32), static=True)


def recipe(weight, input=None, **fields) -> Recipe:
    return Recipe(name="qat", rules=(Rule(weight=weight, input=input, **fields),))


def train(model, steps: int = 3, lr: float = 1e-3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES = {
    "int4": (recipe(SYMMETRIC), {}),
    "int3 asymmetric": (recipe(AFFINE), {"weight": LearnedRange()}),
    "lsq": (recipe(SYMMETRIC, STATIC_SYMMETRIC), {"weight": LSQ(), "input": LSQ()}),
    "learned input range": (recipe(SYMMETRIC, STATIC), {"input": LearnedRange()}),
    "static input": (recipe(AFFINE, STATIC), {}),
    "nf4": (recipe(NF4), {}),
    "nvfp4": (recipe(NVFP4), {"weight": LearnedRange()}),
    "points of pairs": (higgs(bits=4), {"weight": Straight(surrogate=Identity())}),
    "quest": (
        recipe(quest_weight(4), quest_input(4), basis=Incoherence(output=False)),
        {"weight": Straight(surrogate=Trust()), "input": Straight(surrogate=Trust())},
    ),
    "maps of both sides": (recipe(SYMMETRIC, basis=Incoherence()), {"weight": LSQ()}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_trained_and_its_codes_give_the_same_bits(name):
    rules, how = CASES[name]
    model = prepare(tiny("llama"), rules, batches=[IDS], **how)
    train(model)
    with torch.no_grad():
        want = model.eval()(**IDS).logits
        got = convert(model)(**IDS).logits
    assert torch.equal(got, want)
    assert not any(isinstance(m, FakeLinear) for m in model.modules())
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 14


def test_in_bfloat16_the_bits_agree_too():
    model = prepare(tiny("llama").bfloat16(), recipe(SYMMETRIC), weight=LSQ())
    train(model)
    assert model.model.layers[0].mlp.up_proj.weight_step.dtype == torch.float32
    with torch.no_grad():
        want = model(**IDS).logits
        assert torch.equal(convert(model)(**IDS).logits, want)


def test_steps_stay_float32_and_codes_do_not_depend_on_autocast():
    model = prepare(tiny("llama"), recipe(SYMMETRIC, basis=Incoherence()), weight=LSQ())
    layer = model.bfloat16().model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_step.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.to_quantized()
    assert torch.equal(inside.codes, layer.to_quantized().codes)


def test_integer_products_agree_to_the_order_of_their_sums():
    model = prepare(tiny("llama"), rtn_w8a8())
    train(model)
    with torch.no_grad():
        want = model(**IDS).logits
        torch.testing.assert_close(convert(model)(**IDS).logits, want, rtol=0, atol=0.02 * want.std().item())


def rtn_w8a8() -> Recipe:
    return fewbit.recipes.w8a8()


def test_before_training_the_model_is_the_rounded_one():
    """The outputs of a model whose weights were rounded by hand."""
    model, by_hand = tiny("llama"), tiny("llama")
    for module in by_hand.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = SYMMETRIC.quantize(module.weight.data).dequantize()
    with torch.no_grad():
        want = by_hand(**IDS).logits
        assert torch.equal(prepare(model, recipe(SYMMETRIC))(**IDS).logits, want)


def test_weights_stay_the_parameters_that_they_were():
    model = tiny("llama")
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    prepare(model, recipe(SYMMETRIC))
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(after[name] is p for name, p in before.items())
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear)
    assert isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, FakeLinear)  # quantize leaves the head, so does prepare
    model.load_state_dict(state)
    copy.deepcopy(model)


def test_a_trained_model_is_saved_and_read_back_with_the_same_bits(tmp_path):
    rules = recipe(SYMMETRIC, STATIC)
    model = prepare(tiny("llama"), rules, weight=LSQ(), input=LearnedRange(), batches=[IDS])
    assert not model.training
    assert prepare(tiny("llama").train(), rules, batches=[IDS]).training  # calibration runs in eval mode
    train(model)
    make_saveable(convert(model)).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(fewbit.load(tmp_path)(**IDS).logits, model(**IDS).logits)
    with pytest.raises(InputError, match="no quantized layers"):
        make_saveable(tiny("llama"))


@pytest.mark.parametrize(
    ("fmt", "quant"),
    [
        (int_format(4), LSQ()),
        (AFFINE, LearnedRange()),
        (SYMMETRIC, Straight()),
        (NF4, LearnedRange()),
        (NVFP4, LearnedRange()),
    ],
)
def test_compiled_and_eager_training_take_the_same_step_in_one_graph(fmt, quant):
    torch._dynamo.reset()
    layer = FakeLinear(nn.Linear(64, 32), fmt, quant, activation=Activation(format=int_format(8)))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for run in (layer, compiled):
        run(x).square().sum().backward()
    assert torch.equal(layer(x), compiled(x))
    for (name, a), (_, b) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_gradient_of_an_input_s_step_is_scaled_by_features_not_by_tokens():
    """LSQ, section 2.2: N is the number of features. So twice the tokens give twice the gradient."""
    x, grads = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), []
    how = {"activation": STATIC_SYMMETRIC, "input_quant": LSQ(), "sample": x}
    layer = FakeLinear(nn.Linear(64, 8), SYMMETRIC, LSQ(), **how)
    for tokens in (x, x.repeat(2, 1)):
        grads += torch.autograd.grad(layer(tokens).square().sum(), layer.input_step)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_one_huge_coordinate_loses_its_trust_and_the_others_keep_theirs():
    """Huge in the basis, and masked there: dx = (M * (dy Q(W))) T^-1."""
    basis = Incoherence(output=False)
    layer = FakeLinear(
        nn.Linear(64, 8, bias=False),
        quest_weight(4),
        Straight(surrogate=Trust()),
        activation=quest_input(4),
        input_quant=Straight(surrogate=Trust()),
        basis=basis,
    )
    into, u = basis.input_map(64), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    u[:, 7] = 50.0
    x = into.invert(u).requires_grad_()
    y = layer(x)
    y.sum().backward()
    with torch.no_grad():
        u = into.apply(x)
        q = quest_input(4).format.quantize(u)
        trusted = (q.dequantize() - u).abs() <= q.scale
        w = quest_weight(4).quantize(basis.enter(layer.weight)).dequantize()
        want = into.invert(trusted * (torch.ones_like(y) @ w))
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-5)
    assert (~trusted).nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]


def test_refusals_name_the_remedy_and_leave_the_model_alone():
    model = tiny("llama")
    before = [type(m) for m in model.modules()]
    dynamic = Activation(format=Format(grid=Int(8), block=Channel(), scale=FP32))
    for rules, how, text in (
        (awq(), {}, "transforms"),
        (Recipe(name="none", rules=(Rule(match="*.nothing", weight=SYMMETRIC),)), {}, "no rule of recipe"),
        (recipe(SYMMETRIC, STATIC), {}, "batches"),
        (recipe(SYMMETRIC, dynamic), {"input": LSQ()}, "use static ones"),
        (recipe(AFFINE), {"weight": LSQ()}, "LearnedRange"),
    ):
        with pytest.raises(InputError, match=text):
            prepare(model, rules, **how)
        assert [type(m) for m in model.modules()] == before
    with pytest.raises(InputError, match="Conv1D"):
        prepare(tiny("gpt2"), recipe(SYMMETRIC))
    with pytest.raises(InputError, match="call prepare first"):
        convert(model)
    assert rtn().rules


def test_training_wins_back_what_rounding_to_two_bits_cost():
    """Loss on the training text: rounded after training, against trained with the rounding in the loop."""
    rules = recipe(Format(grid=Int(2), block=Group(32), range=MinMax(), zero=Zero.INTEGER, scale=FP32))
    plain = tiny("llama")
    train(plain, 40, 3e-3)
    rounded = prepare(copy.deepcopy(plain), rules)
    trained = prepare(copy.deepcopy(plain), rules, weight=LearnedRange())
    before = train(rounded, 1, 0.0)[0]
    after = train(trained, 30, 2e-3)[-1]
    assert after < 0.5 * before


@pytest.mark.parametrize("fmt", [AFFINE, SYMMETRIC])
def test_training_begins_at_what_another_method_found(fmt, tmp_path):
    """The outputs before the first update are those of the quantized model, not of rounding to nearest."""
    found = Format(grid=fmt.grid, block=fmt.block, range=Gaussian(), zero=fmt.zero, scale=fmt.scale)
    quantized = convert(prepare(tiny("llama"), recipe(found)))
    model = prepare(tiny("llama"), recipe(fmt), weight=LearnedRange())
    with torch.no_grad():
        nearest = model(**IDS).logits
        start_from(model, quantized)
        assert torch.equal(model(**IDS).logits, quantized(**IDS).logits)
        assert not torch.equal(model(**IDS).logits, nearest)
        assert torch.equal(convert(model)(**IDS).logits, quantized(**IDS).logits)
    with pytest.raises(InputError, match="quantize with the format that is trained"):
        start_from(prepare(tiny("llama"), recipe(NF4), weight=LearnedRange()), quantized)
    with pytest.raises(InputError, match="has no quantized layer"):
        start_from(prepare(tiny("llama"), recipe(fmt)), tiny("llama"))


def test_training_begins_where_scales_were_folded(tmp_path):
    """AWQ divides norm gains and rows of values by its scales; the model that trains gets those as well."""
    plain = save_tiny("llama", tmp_path / "plain")
    with torch.no_grad():  # inputs of unequal size, or there is nothing to fold
        for block in plain.model.layers:
            block.input_layernorm.weight.mul_(torch.logspace(-1, 1, plain.config.hidden_size))
    plain.save_pretrained(tmp_path / "plain")
    few = fewbit.Calibration(samples=8, seqlen=32)
    scaled = awq(bits=4, group_size=32, range="minmax", points=5)
    fewbit.quantize(tmp_path / "plain", scaled, output=tmp_path / "awq", calibration=few)
    quantized = fewbit.load(tmp_path / "awq", dtype=torch.float32)
    model = prepare(plain, Recipe(name="plain", rules=scaled.rules), weight=LearnedRange())
    gains = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        before = gains.clone()
        start_from(model, quantized)
        assert not torch.equal(gains, before)
        assert torch.equal(model(**IDS).logits, quantized(**IDS).logits)


def test_training_begins_in_the_basis_of_the_checkpoint_and_in_no_other(tmp_path):
    """Other maps, none on either side among them, are refused, with the model as it was."""
    rules = [recipe(SYMMETRIC)] + [
        Recipe(name="basis", rules=(Rule(weight=SYMMETRIC, basis=Incoherence(seed=seed)),)) for seed in (0, 1)
    ]
    for theirs in rules:
        quantized = convert(prepare(tiny("llama"), theirs))
        for ours in rules:
            model = prepare(tiny("llama"), ours, weight=LearnedRange())
            before = copy.deepcopy(model.state_dict())
            if ours is theirs:
                start_from(model, quantized)
                with torch.no_grad():
                    want, got = quantized(**IDS).logits, model(**IDS).logits
                assert torch.allclose(got, want, rtol=0, atol=0.05 * want.std().item())
            else:
                with pytest.raises(InputError, match="behind other maps"):
                    start_from(model, quantized)
                assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_training_does_not_begin_where_the_head_has_parted():
    """A rotation gives a tied model a head of its own, which the model that trains has no place for."""
    quantized = convert(prepare(tiny("llama"), recipe(SYMMETRIC)))
    quantized.lm_head.weight = nn.Parameter(quantized.lm_head.weight.clone())
    quantized.model.embed_tokens.weight = nn.Parameter(quantized.model.embed_tokens.weight.clone())
    model = prepare(tiny("llama"), recipe(SYMMETRIC), weight=LearnedRange())
    model.lm_head.weight = model.model.embed_tokens.weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"has lm_head\.weight"):
        start_from(model, quantized)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
