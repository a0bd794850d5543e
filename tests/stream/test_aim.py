"""Weights aimed at rounded inputs, through the loop: what is gathered, what is refused, what it brings."""

from dataclasses import replace

import pytest
import torch
from tiny import save_tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Need, Params, PerTensor, Token
from fewbit.format.activation import Activation
from fewbit.format.format import Format
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, from_yaml, named, quarot, spinquant
from fewbit.recipe.quarot import SOLVERS
from fewbit.solve import Lwc
from fewbit.stream.data import Calibration, sample_tokens
from fewbit.stream.inputs import Inputs
from fewbit.stream.progress import Progress
from fewbit.stream.quantize import quantize

SMALL = Calibration(samples=8, seqlen=64)
BOTH = frozenset({Need.GRAM, Need.CROSS})
INT4 = Activation(format=Format(grid=by_name("int4"), block=Token(), scale=FP32))
INT8 = Activation(format=Format(grid=by_name("int8"), block=Token(), scale=FP32))
STATIC = Activation(format=Format(grid=by_name("int8"), block=PerTensor(), scale=FP32), static=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


def test_both_products_are_those_of_the_rounded_inputs():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    seen = Inputs(BOTH, 3, [INT4, INT4])
    for batch in x:
        seen.add(batch)
    got, x, r = seen.stats(), x.flatten(0, 1), INT4(x).flatten(0, 1)
    torch.testing.assert_close(got.gram, r.T @ r / 120)
    torch.testing.assert_close(got.cross, (x - r).T @ r / 120)
    s = torch.rand(16) + 0.5
    torch.testing.assert_close(got.divided(s).cross, (x / s - r / s).T @ (r / s) / 120)


def test_inputs_that_stay_float_have_no_cross_products():
    seen = Inputs(BOTH, 1, [None])
    x = torch.randn(40, 16)
    seen.add(x)
    got = seen.stats()
    assert got.cross is None
    torch.testing.assert_close(got.gram, x.T @ x / 40)


@pytest.mark.parametrize("ways", [[INT4, INT8], [INT4, None], [STATIC]])
def test_layers_that_do_not_round_one_input_alike_cannot_be_aimed(ways):
    with pytest.raises(InputError, match="round alike"):
        Inputs(BOTH, 1, ways)


def test_a_group_that_rounds_its_input_in_two_ways_is_refused_and_leaves_nothing(llama, tmp_path):
    rule = quarot().rules[0]
    rules = (replace(rule, match="*q_proj", input=INT8), rule)
    with pytest.raises(InputError, match="round alike"):
        quantize(llama, Recipe(name="r", rules=rules), output=tmp_path / "out", calibration=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", ["linear", "block"])
def test_aimed_weights_bring_the_logits_nearer_to_float_on_text_never_seen(llama, tmp_path, depth):
    text = Calibration(samples=40, seqlen=64)
    ids, error = sample_tokens(replace(text, samples=8, seed=5), open_source(llama).tokenizer()), {}
    plain = fewbit.load(llama)(ids).logits
    for solver in ("gptq", "aimed"):
        recipe = quarot(solver=solver)
        assert from_yaml(recipe.to_yaml()) == recipe
        out = tmp_path / solver
        result = quantize(llama, recipe, output=out, calibration=text, depth=depth)
        assert result.difference < 1e-5
        with torch.no_grad():
            error[solver] = float((fewbit.load(out)(ids).logits - plain).norm() / plain.norm())
    assert error["aimed"] < 0.92 * error["gptq"]


def test_without_rounded_inputs_aiming_is_gptq_to_the_bit(llama, tmp_path):
    codes = {}
    for solver in ("gptq", "aimed"):
        quantize(llama, quarot(input_bits=16, solver=solver), output=tmp_path / solver, calibration=SMALL)
        codes[solver] = (tmp_path / solver / "model.safetensors").read_bytes()
    assert codes["gptq"] == codes["aimed"]


def test_the_cross_products_of_centred_inputs_are_those_of_what_layers_read():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)) + 3
    own = replace(INT4, centred=True)
    seen = Inputs(BOTH | {Need.MEAN}, 2, [own])
    for batch in x:
        seen.add(batch)
    got = seen.stats()
    assert torch.equal(got.mean, x[0].mean(0).bfloat16())
    r, x = own(x, Params(scale=None, zero=got.mean)).flatten(0, 1), x.flatten(0, 1)
    torch.testing.assert_close(got.cross, (x - r).T @ r / 80, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("depth", ["linear", "block"])
def test_means_are_stored_and_every_reader_takes_them_off(llama, tmp_path, depth):
    import transformers

    recipe, out = quarot(solver="rtn"), tmp_path / "out"
    assert recipe.rules[0].input.centred
    result = quantize(llama, recipe, output=out, calibration=SMALL, depth=depth)
    assert result.difference < 1e-5
    mine = fewbit.load(out)
    ids = tiny_ids()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    with torch.no_grad():
        before = mine(ids).logits
        torch.testing.assert_close(theirs(ids).logits, before, rtol=1e-3, atol=1e-3)
        layer = mine.model.layers[1].mlp.down_proj
        assert layer.input_zero.dtype == torch.bfloat16
        assert layer.input_zero.shape == (128,)
        layer.input_zero += 1
        assert not torch.allclose(mine(ids).logits, before, atol=1e-3)


class Stops(Progress):
    """A person who interrupts after the first block."""

    def block(self, done, total, resumed):
        if done == 1 and not resumed:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_means(llama, tmp_path):
    quantize(llama, quarot(), output=tmp_path / "whole", calibration=SMALL)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, quarot(), output=tmp_path / "out", calibration=SMALL, progress=Stops())
    assert quantize(llama, quarot(), output=tmp_path / "out", calibration=SMALL).resumed_blocks == 1
    both = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out")]
    assert both[0] == both[1]


def test_centred_inputs_cannot_be_tuned_by_the_block():
    with pytest.raises(InputError, match="tuned by the block"):
        replace(quarot().rules[0], solver=Lwc())


def test_inputs_of_four_bits_are_clipped_and_centred_and_may_have_a_zero():
    fmt = lambda **settings: quarot(**settings).rules[0].input.format  # noqa: E731
    centred = lambda **settings: quarot(**settings).rules[0].input.centred  # noqa: E731
    assert (centred(), centred(input_bits=8), centred(input_zero="none")) == (True, False, False)
    assert centred(input_bits=8, input_zero="mean")
    for name in ("quarot", "spinquant"):  # as text, too, where "none" could be taken for "not given"
        assert not named(name, {"input_zero": "none"}).rules[0].input.centred
    assert (fmt().range.clip, fmt(input_bits=8).range.clip) == (0.75, 1.0)
    assert fmt(input_grid="e2m1").range.clip == 1.0
    assert fmt(input_clip=0.9).range.clip == 0.9
    assert (fmt(input_zero="integer").zero, fmt(input_zero="integer").grid) == ("integer", by_name("uint4"))
    assert (
        spinquant(input_zero="integer", input_clip=0.8).rules
        == quarot(input_zero="integer", input_clip=0.8).rules
    )
    for bad in ({"input_clip": 0.0}, {"input_clip": 1.5}):
        with pytest.raises(InputError, match="share of"):
            quarot(**bad)
    with pytest.raises(InputError, match="choose one of auto, none, integer, mean"):
        quarot(input_zero="float")
    assert {"gptq", "rtn", "aimed"} <= set(SOLVERS)


def test_clipping_a_normal_token_at_three_quarters_of_its_range_loses_a_quarter_less():
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(0))
    read = lambda c: quarot(input_clip=c, input_zero="none").rules[0].input(x)  # noqa: E731
    lost = {c: (read(c) - x).square().mean() for c in (0.5, 0.75, 1.0)}
    assert lost[0.75] < 0.75 * lost[1.0]
    assert lost[0.75] < 0.5 * lost[0.5]
