"""Quantized inputs and folded maps: from the recipe through the loop to files that readers run alike."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, MinMax, Need, PerTensor, Token, Zero
from fewbit.format.activation import Activation
from fewbit.format.block import Columns
from fewbit.format.split import Split
from fewbit.grid import Int, by_name
from fewbit.io.inputs import bits as stored_bits
from fewbit.nn.blocks import weight_of
from fewbit.nn.linear import QLinear
from fewbit.recipe import Recipe, Rule, from_yaml
from fewbit.solve import Ldlq, Rtn
from fewbit.solve.lwc import Lwc
from fewbit.stream.data import Calibration
from fewbit.stream.inputs import Inputs
from fewbit.stream.quantize import quantize
from fewbit.transform import CHOOSERS

INT8 = by_name("int8")
W8 = Format(grid=INT8, block=Channel(), scale=FP32)
TOKEN = Activation(format=Format(grid=INT8, block=Token(), scale=FP32))
STATIC = Activation(format=Format(grid=INT8, block=PerTensor(), scale=FP32), static=True)
AFFINE = Format(grid=Int(8, signed=False), range=MinMax(), zero=Zero.INTEGER, scale=FP32)
INPUTS = {
    "token": TOKEN,
    "tensor": replace(STATIC, static=False),
    "static": STATIC,
    "momentum": replace(STATIC, momentum=0.9),
    "static with a zero": Activation(format=AFFINE, static=True),
    "groups of columns": Activation(format=replace(AFFINE, block=Columns(32)), static=True),
    "groups by range": Activation(format=replace(AFFINE, block=Columns(1)), static=True, groups=2),
    "outliers left out": replace(TOKEN, outliers=3.0),
    "fp8": Activation(format=Format(grid=by_name("e4m3fn"), block=Token(), scale=FP32)),
}
SMALL = Calibration(samples=4, seqlen=32)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("depth", ["linear", "block"])
def test_a_quantized_input_is_the_same_in_the_run_on_disk_and_in_transformers(
    folders, tmp_path, arch, kind, depth
):
    import transformers

    recipe = Recipe(name=kind, rules=(Rule(weight=W8, input=INPUTS[kind], solver=Ldlq()),))
    assert from_yaml(recipe.to_yaml()) == recipe
    result = quantize(folders / arch, recipe, output=tmp_path / "out", calibration=SMALL, depth=depth)
    assert result.difference == 0
    ids = tiny_ids()
    model = fewbit.load(tmp_path / "out")
    mine = logits(model, ids)
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32"), ids)
    assert torch.equal(mine, theirs)
    plain = logits(fewbit.load(folders / arch), ids)
    error = ((mine - plain).norm() / plain.norm()).item()
    assert 0 < error < 0.1
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    assert layers
    assert all(m.activation == INPUTS[kind] and (m.params is not None) == m.activation.static for m in layers)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("depth", ["linear", "block"])
@pytest.mark.parametrize("input", [None, "outliers left out", "static"], ids=str)
def test_columns_kept_in_float_are_the_same_in_the_run_on_disk_in_transformers_and_resaved(
    folders, tmp_path, arch, depth, input
):
    import transformers

    rule = Rule(weight=W8, input=input and INPUTS[input], solver=Ldlq(), split=Split(threshold=2.0))
    recipe = Recipe(name="split", rules=(rule,))
    assert from_yaml(recipe.to_yaml()) == recipe
    result = quantize(folders / arch, recipe, output=tmp_path / "out", calibration=SMALL, depth=depth)
    assert result.difference == 0
    assert result.plan.checkpoint == "native"
    model, ids = fewbit.load(tmp_path / "out"), tiny_ids()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    theirs.save_pretrained(tmp_path / "again")
    again = fewbit.load(tmp_path / "again")
    assert torch.equal(logits(model, ids), logits(theirs, ids))
    assert torch.equal(logits(model, ids), logits(again, ids))
    rows = {row.layer: row for row in result.rows}
    plain, kept = fewbit.load(folders / arch), 0
    for name, layer in model.named_modules():
        if not isinstance(layer, QLinear):
            continue
        assert rows[name].apart == (0 if layer.apart is None else len(layer.apart_columns))
        if layer.apart is not None:
            kept += 1
            original = weight_of(plain.get_submodule(name))[:, layer.apart_columns]
            assert torch.equal(layer.apart, original.bfloat16())
            assert f"{rows[name].apart} columns apart in float" in repr(layer)
            own = stored_bits(layer.activation, layer.in_features) / layer.qweight.shape.numel()
            assert rows[name].bits_per_weight == pytest.approx(layer.qweight.bits_per_weight + own)
    assert kept
    stored = fewbit.io.source.open_source(tmp_path / "out")
    assert stored.bits_per_weight == pytest.approx(result.plan.bits_per_weight)


def test_a_layer_with_columns_apart_is_the_float_one_on_what_both_parts_mean():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 64, generator=g), torch.randn(3, 5, 64, generator=g)
    x[..., [4, 9]] *= 40
    seen = Inputs(frozenset({Need.SAMPLE}), 1)
    seen.add(x)
    q = Split()(w, seen.stats(), lambda v, s: W8.quantize(v))
    for activation in (None, TOKEN, INPUTS["outliers left out"]):
        read = x if activation is None else activation(x, None, q.columns)
        got = QLinear(q, activation=activation)(x)
        torch.testing.assert_close(got, read @ q.dequantize().T, rtol=1e-4, atol=1e-3)


def test_llm_int8_keeps_outliers_of_the_calibration_and_without_one_needs_no_text():
    from fewbit.recipe import named

    rule = named("llm-int8", {"threshold": "5"}).rules[0]
    assert rule.split == Split(threshold=5.0)
    assert rule.needs == {Need.SAMPLE}
    assert not named("llm-int8", {"calibrate": "false"}).rules[0].needs


def test_a_split_is_refused_where_it_cannot_be_made():
    for wrong in ({"weight": None}, {"solver": Lwc()}, {"input": INPUTS["momentum"]}):
        with pytest.raises(InputError, match="keeps columns apart"):
            Rule(**{"weight": W8, "split": Split(), **wrong})


def test_integer_products_equal_the_decoded_ones():
    from fewbit.kernel.linear import COMPILED, EAGER, IMPLEMENTATIONS
    from fewbit.kernel.linear import INT8 as WHOLE
    from fewbit.kernel.pick import pick

    g = torch.Generator().manual_seed(0)
    w, x = W8.quantize(torch.randn(48, 64, generator=g)), torch.randn(3, 5, 64, generator=g)
    bias = torch.randn(48, generator=g)
    for activation, params in ((TOKEN, None), (INPUTS["tensor"], None), (STATIC, STATIC.format.fit(x))):
        assert pick(IMPLEMENTATIONS, "cpu", w.format, x.dtype, activation) is WHOLE
        fast = WHOLE.run(x, w, bias, activation, params)
        torch.testing.assert_close(fast, EAGER.run(x, w, bias, activation, params), rtol=1e-5, atol=1e-5)
    assert WHOLE.run(x[:0], w, bias, TOKEN, None).shape == (0, 5, 48)
    for kind in ("outliers left out", "fp8", "static with a zero"):
        assert pick(IMPLEMENTATIONS, "cpu", w.format, x.dtype, INPUTS[kind]) is COMPILED


def test_outlier_columns_are_kept_and_do_not_stretch_the_steps():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=g)
    x[:, [3, 77]] *= 40
    kept = replace(TOKEN, outliers=6.0)(x)
    assert torch.equal(kept[:, [3, 77]], x[:, [3, 77]])
    error = lambda y: ((y - x)[:, :3].square().sum() / x[:, :3].square().sum()).item()  # noqa: E731
    assert error(TOKEN(x)) > 25 * error(kept)
    zero = torch.zeros(2, 128)
    assert torch.equal(replace(TOKEN, outliers=6.0)(zero), zero)
    assert torch.isfinite(replace(TOKEN, outliers=1e-9)(x)).all()  # every column an outlier


def test_momentum_follows_the_batches_of_the_calibration():
    from fewbit.format import Need, Stats
    from fewbit.stream.choose import static_params
    from fewbit.stream.inputs import Inputs

    seen = Inputs(frozenset({Need.COLUMNS, Need.SAMPLE}), 2)
    seen.add(torch.tensor([[-1.0, 2.0]]))
    seen.add(torch.tensor([[-3.0, 6.0]]))
    stats = seen.stats()
    assert isinstance(stats, Stats)
    params = static_params(INPUTS["momentum"], stats, "x")
    assert params.scale.item() == pytest.approx((0.9 * 2 + 0.1 * 6) / 127)
    assert static_params(STATIC, stats, "x").scale.item() == pytest.approx(6 / 127)
    with pytest.raises(InputError, match="never reached layer x"):
        static_params(STATIC, Stats(), "x")


@pytest.mark.parametrize("chooser", CHOOSERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3"])
def test_folding_changes_nothing_but_what_is_rounded(folders, tmp_path, chooser, arch):
    """With 8-bit weights the folded model is as near to the original as the plain one."""
    out = {}
    for name, transforms in (("plain", ()), ("folded", (chooser(),))):
        recipe = Recipe(name=name, rules=(Rule(weight=W8, solver=Rtn()),), transforms=transforms)
        assert from_yaml(recipe.to_yaml()) == recipe
        result = quantize(folders / arch, recipe, output=tmp_path / name, calibration=SMALL)
        assert result.difference == 0
        assert not any(row.notes for row in result.rows)
        out[name] = logits(fewbit.load(tmp_path / name), tiny_ids())
    plain = logits(fewbit.load(folders / arch), tiny_ids())
    error = {name: ((y - plain).norm() / plain.norm()).item() for name, y in out.items()}
    assert 0 < error["folded"] < 3 * error["plain"] + 1e-3


def test_impossible_inputs_are_refused():
    with pytest.raises(InputError, match=r"static steps cannot follow tokens"):
        replace(TOKEN, static=True)
    with pytest.raises(InputError, match=r"momentum 0\.9 needs static steps"):
        replace(TOKEN, momentum=0.9)
    with pytest.raises(InputError, match="scalar format with steps"):
        Activation(format=Format(grid=INT8))
    with pytest.raises(InputError, match="give it a weight format"):
        Rule(input=TOKEN)


def test_a_block_that_does_not_tile_the_input_is_refused_by_the_plan(folders, tmp_path):
    odd = Activation(format=replace(AFFINE, block=Columns(48)), static=True)
    recipe = Recipe(name="odd", rules=(Rule(weight=W8, input=odd),))
    with pytest.raises(
        InputError, match=r"groups of 48 columns do not tile the input of layer model\.layers\.0"
    ):
        quantize(folders / "llama", recipe, output=tmp_path / "out", calibration=SMALL)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_choice_of_mofq_never_has_a_larger_error_than_either_format_alone(folders, tmp_path, bits):
    from fewbit.recipe import mofq

    both = mofq(bits=bits, group_size=32)
    rule = both.rules[0]
    assert from_yaml(both.to_yaml()) == both
    rows = {}
    for name, recipe in {
        "both": both,
        "int": Recipe(name="int", rules=(rule.chosen(0),)),
        "fp": Recipe(name="fp", rules=(rule.chosen(1),)),
    }.items():
        result = quantize(folders / "llama", recipe, output=tmp_path / name, calibration=SMALL)
        assert result.difference == 0
        rows[name] = {row.layer: row for row in result.rows}
    if bits == 4:
        for layer, row in rows["both"].items():
            assert row.error == min(rows["int"][layer].error, rows["fp"][layer].error)
    again = quantize(folders / "llama", both, output=tmp_path / "both", calibration=SMALL)
    assert again.finished_before
    model = fewbit.load(tmp_path / "both")
    named = {n: m.format.grid.name for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert named == {n: row.format.split()[0] for n, row in rows["both"].items()}


def test_the_choice_is_the_least_joint_error():
    from fewbit.format import Stats
    from fewbit.recipe import mofq
    from fewbit.stream.choose import choose, joint_error

    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(32, 64, generator=g), torch.randn(256, 64, generator=g)
    w[:, 5] *= 1e-3
    heavy = x.clone()
    heavy[:, 5] *= 300  # of no weight, but INT8 per token loses the small columns beside it; FP8 does not
    rule = mofq(bits=8).rules[0]
    for sample, wanted in ((x, 0), (heavy, 1)):
        stats = Stats(sample=sample, low=sample.amin(0), high=sample.amax(0), tokens=256)
        best, q = choose(w, stats, Rtn(), rule.choices)
        losses = [
            joint_error(w, weight.quantize(w).dequantize(), activation, stats)
            for weight, activation in rule.choices
        ]
        assert best == losses.index(min(losses)) == wanted
        assert q.format == rule.choices[wanted][0]
