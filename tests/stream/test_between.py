"""Tuning between groups: never worse on held-out windows, nothing to do where nothing was lost."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import BF16, FP32, Channel, Format, Group, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule, autoround, from_yaml, gptq, higgs, named, qtip
from fewbit.solve import Ldlq
from fewbit.solve.blocktune import BlockTuning
from fewbit.stream.data import Calibration
from fewbit.stream.plan import make_plan
from fewbit.stream.quantize import quantize
from fewbit.transform.rotation import Rotation

SMALL = Calibration(samples=8, seqlen=32)
TUNING = BlockTuning(steps=8, batch=2, looks=2)
TWO = {"bits": 2, "group_size": 32, "symmetric": False}


def logits(model):
    with torch.no_grad():
        return fewbit.load(model)(tiny_ids(8, 100)).logits.float()


def gain(folder):
    return load_file(folder / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]


def test_tuning_beats_none_on_text_it_has_not_seen(folders, tmp_path):
    calibration = Calibration(samples=64, seqlen=64)
    lost, want = {}, logits(folders / "llama")
    for name, steps in (("none", 0), ("tuned", 60)):
        recipe = gptq(**TWO, tune=steps)
        assert from_yaml(recipe.to_yaml()) == recipe
        result = quantize(folders / "llama", recipe, output=tmp_path / name, calibration=calibration)
        assert result.difference == 0
        lost[name] = ((logits(tmp_path / name) - want).norm() / want.norm()).item()
    rows = result.rows
    assert all(0 < row.tuned_error <= row.block_error for row in rows)
    assert any(row.tuned_error < 0.95 * row.block_error for row in rows)
    assert lost["tuned"] < 0.97 * lost["none"]
    assert gain(tmp_path / "none").equal(gain(folders / "llama"))
    assert not gain(tmp_path / "tuned").equal(gain(folders / "llama"))


@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
def test_norms_and_biases_of_any_block_are_saved_as_they_were_tuned(folders, tmp_path, arch):
    """With inputs that are rounded, too: gradients go straight through them."""
    a8 = Activation(format=Format(grid=by_name("int8"), block=Token(), scale=FP32))
    fmt = Format(grid=by_name("int3"), block=Group(32), scale=BF16)
    rule = Rule(weight=fmt, solver=Ldlq(), input=a8)
    recipe = Recipe(name="w3a8", rules=(rule,), tuning=TUNING)
    result = quantize(folders / arch, recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.difference < 1e-5
    assert any(row.tuned_error < row.block_error for row in result.rows)


@pytest.mark.parametrize("rotation", [None, Rotation()])
def test_an_interrupted_run_ends_in_the_same_file(folders, ends_in_the_same_file, rotation):
    recipe = Recipe(name="tuned", rules=gptq(**TWO).rules, rotation=rotation, tuning=TUNING)
    ends_in_the_same_file(folders / "llama", recipe, SMALL)


def test_where_nothing_is_lost_nothing_is_learned(tmp_path):
    """Weights that lie on the grid come back as they are, and so do the norms."""
    model = save_tiny("llama", tmp_path / "plain")
    fmt = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                whole = (module.weight * 64).round().clamp(-126, 126)
                whole[:, 0] = 127
                module.weight.copy_(whole / 64)
    model.save_pretrained(tmp_path / "plain")
    recipe = Recipe(name="lossless", rules=(Rule(weight=fmt),), tuning=TUNING)
    result = quantize(tmp_path / "plain", recipe, output=tmp_path / "out", calibration=SMALL)
    assert {row.tuned_error for row in result.rows} == {0.0}
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "plain"), rtol=0, atol=0)


def test_the_plan_says_what_tuning_costs(folders):
    source, recipes = open_source(folders / "llama"), (higgs(bits=2), higgs(bits=2, tune=50))
    plain, tuned = (make_plan(source, recipe, SMALL)[0] for recipe in recipes)
    assert plain.calibration is None
    assert tuned.calibration == SMALL
    assert tuned.depth == "block"
    assert tuned.peak_bytes > plain.peak_bytes
    assert tuned.seconds > plain.seconds
    assert any("50 updates of 128 tokens" in said for said in tuned.caveats)
    with pytest.raises(InputError, match="leave the depth at auto"):
        make_plan(source, recipes[1], SMALL, depth="linear")
    with pytest.raises(InputError, match="use --samples 8 or more"):
        make_plan(source, recipes[1], Calibration(samples=7, seqlen=32))


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"SignRound of rule .* learns from the whole block"):
        Recipe(name="both", rules=autoround().rules, tuning=TUNING)
    static = Activation(format=Format(grid=by_name("int8"), scale=FP32), static=True)
    fmt = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
    with pytest.raises(InputError, match="has fitted static steps"):
        Recipe(name="both", rules=(Rule(weight=fmt, input=static),), tuning=TUNING)
    for wrong in ({"steps": 0}, {"batch": 0}, {"looks": 9, "steps": 8}, {"lr": 0.0}, {"held": 1.0}):
        with pytest.raises(InputError, match="impossible"):
            BlockTuning(**wrong)
    with pytest.raises(InputError, match="impossible"):
        named("qtip", {"tune": "-1"})


def test_no_steps_are_no_tuning():
    assert qtip().tuning is None
    assert named("qtip", {"tune": "0"}) == qtip()
    assert named("quip-sharp", {"tune": "30"}).tuning.steps == 30
