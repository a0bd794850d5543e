"""Weights kept in a basis of their own: the checkpoint is the same function in every reader."""

import pytest
import torch
from tiny import tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe import Recipe, Rule, from_yaml, higgs
from fewbit.solve import Aimed, Ldlq
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize
from fewbit.transform import Incoherence
from fewbit.transform.rotation import Rotation

SMALL = Calibration(samples=4, seqlen=32)
W8 = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
A8 = Activation(format=Format(grid=by_name("int8"), block=Token(), scale=FP32))
BASIS = Incoherence(seed=3)


def logits(model):
    with torch.no_grad():
        return model(tiny_ids()).logits.float()


@pytest.mark.parametrize(
    "arch", ["llama", "gemma3", "gpt2"]
)  # without biases, with norms of heads, with biases
@pytest.mark.parametrize("activation", [None, A8])
def test_the_checkpoint_is_the_same_function(folders, tmp_path, arch, activation):
    import transformers

    recipe = Recipe(name="basis", rules=(Rule(weight=W8, solver=Ldlq(), input=activation, basis=BASIS),))
    assert from_yaml(recipe.to_yaml()) == recipe
    result = quantize(folders / arch, recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.plan.checkpoint == "native"
    assert result.plan.layers[0].text.endswith("hadamard basis of both sides")
    assert result.difference < 1e-4
    mine, plain = logits(fewbit.load(tmp_path / "out")), logits(fewbit.load(folders / arch))
    assert (mine - plain).norm() / plain.norm() < 0.05
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(theirs), mine, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_ends_as_one_that_was_not(folders, whole_and_cut):
    recipe = Recipe(name="basis", rules=(Rule(weight=W8, solver=Ldlq(), input=A8, basis=BASIS),))
    whole, cut = whole_and_cut(folders / "llama", recipe, SMALL)
    assert cut.difference == pytest.approx(whole.difference, abs=1e-5)
    torch.testing.assert_close(
        logits(fewbit.load(cut.output)), logits(fewbit.load(whole.output)), rtol=0, atol=0
    )


def test_higgs_reaches_the_error_of_its_points_on_every_layer(folders, tmp_path):
    """The relative error of a layer is the mean squared error of the grid on N(0, 1) (section 3)."""
    result = quantize(folders / "llama", higgs(bits=4), output=tmp_path / "out", calibration=SMALL)
    assert result.plan.calibration is None
    errors = torch.tensor([row.error for row in result.rows])
    assert abs(errors.mean() / 0.00774 - 1) < 0.1


def test_what_cannot_be_is_refused():
    static = Activation(format=Format(grid=by_name("int8"), scale=FP32), static=True)
    with pytest.raises(InputError, match="static steps for inputs in a basis"):
        Rule(weight=W8, input=static, basis=BASIS)
    with pytest.raises(InputError, match="aims weights"):
        Rule(weight=W8, input=A8, solver=Aimed(), basis=BASIS)
    with pytest.raises(InputError, match="twice at every call"):
        Recipe(name="both", rules=(Rule(weight=W8, basis=BASIS),), rotation=Rotation())
    with pytest.raises(InputError, match="leave 1 points"):
        higgs(bits=0)
