"""Recipes: every named one is data that survives YAML, and wrong names and settings are answered in words."""

import inspect
from dataclasses import replace

import pytest

from fewbit.errors import InputError
from fewbit.format import BF16, FORMATS, MSE, Channel, Format, Group, PerTensor, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe import RECIPES, Recipe, Rule, from_yaml, gptq, named, nf4, rtn
from fewbit.solve import Ldlq, Need, Rtn


@pytest.mark.parametrize("function", RECIPES, ids=lambda f: f.__name__)
def test_every_recipe_round_trips_through_yaml(function):
    recipe = function()
    assert isinstance(recipe, Recipe)
    assert from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("function", RECIPES, ids=lambda f: f.__name__)
def test_every_recipe_is_short_and_named_as_its_function(function):
    assert len(inspect.getsource(function).splitlines()) < 40
    assert function().name == function.__name__


def test_settings_as_text_equal_settings_in_python():
    text = {"bits": "3", "group_size": "-1", "symmetric": "false", "damp": "0.05", "act-order": "no"}
    wanted = gptq(bits=3, group_size=-1, symmetric=False, damp=0.05, act_order=False)
    assert named("gptq", text) == wanted
    assert isinstance(wanted.rules[0].weight.block, Channel)
    assert wanted.rules[0].weight.zero is Zero.INTEGER
    assert named("rtn", {"grid": "none"}) == rtn()


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("gtpq", {}, "unknown recipe 'gtpq'; did you mean 'gptq'"),
        ("zzz", {}, "known are rtn, gptq"),
        ("gptq", {"bitz": "4"}, "no setting 'bitz'; its settings are bits"),
        ("gptq", {"bits": "four"}, "bits='four' of recipe 'gptq' is not int"),
        ("gptq", {"bits": "9"}, "int9"),
        ("gptq", {"symmetric": "maybe"}, "is not bool"),
        ("gptq", {"range": "best"}, "range='best' is unknown; choose one of absmax"),
        ("gptq", {"grid": "nf4", "symmetric": "false"}, "integer zero point needs an integer grid"),
        ("gptq", {"static_groups": "false"}, "g_idx"),
        ("rtn", {"grid": "uint4"}, "one sign only, from 0 to 15"),
        ("gptq", {"bits": "1"}, "one sign only, from -1 to 0"),
        ("rtn", {"grid": "higgs-p2-n16", "range": "aciq"}, "ACIQ asks where points lie on a line"),
        ("rtn", {"grid": "higgs-p3-n64", "group_size": "64"}, "blocks of 64 cut some of them in two"),
        ("rtn", {"format": "zzz"}, "`fewbit formats` lists them"),
        ("rtn", {"format": "mxfp5"}, "no block format named 'mxfp5'; did you mean mxfp"),
        ("rtn", {"format": "mxfp4", "bits": "3"}, "format=mxfp4 settles bits, which is set to 3"),
        ("gptq", {"static_groups": "false", "act_order": "false", "scale": "e4m3"}, "static_groups=true"),
    ],
)
def test_wrong_words_are_answered(name, settings, says):
    with pytest.raises(InputError, match=says):
        named(name, settings)


def test_inputs_have_names_that_engines_know():
    """W4A8, NVFP4 with a stored step and the rest of the presets are one setting of rtn and gptq."""
    nvfp4 = named("rtn", {"format": "nvfp4", "input": "nvfp4"}).rules[0]
    assert nvfp4.input == Activation(format=nvfp4.weight, static=True)
    assert nvfp4.input.local
    four = named("gptq", {"input": "int8"}).rules[0]
    assert (four.weight.grid.bits, four.input.format.grid.bits, four.input.static) == (4, 8, False)
    assert four.input.format.block == Token()
    static = named("rtn", {"input": "fp8-static"}).rules[0]
    assert (static.input.format.block, static.input.format.grid.name) == (PerTensor(), "e4m3fn")
    assert static.input.static
    assert named("rtn", {"input": "none"}) == rtn()
    with pytest.raises(InputError, match=r"input='int9' is unknown; choose one of int8, int8-static, fp8"):
        named("gptq", {"input": "int9"})


def test_the_first_matching_rule_decides():
    int8 = Format(grid=by_name("int8"), block=Channel(), scale=BF16)
    recipe = Recipe(
        name="r", rules=(Rule(match="*.down_proj", weight=int8), Rule(match="*.0.*"), Rule(weight=int8))
    )
    assert recipe.rule_for("model.layers.0.mlp.down_proj") is recipe.rules[0]
    assert recipe.rule_for("model.layers.0.mlp.up_proj") is recipe.rules[1]
    assert recipe.rule_for("model.layers.1.mlp.up_proj") is recipe.rules[2]


def test_a_named_format_is_complete_and_takes_another_range():
    assert rtn(format="mxfp4").rules[0].weight == FORMATS["mxfp4"]
    searched = gptq(format="nvfp4", range="mse").rules[0].weight
    assert searched == replace(FORMATS["nvfp4"], range=MSE())


def test_a_rule_asks_only_for_what_its_solver_and_range_need():
    assert rtn().rules[0].needs == frozenset()
    assert nf4().rules[0].needs == frozenset()
    assert rtn(range="mse-plain").rules[0].needs == frozenset()
    assert rtn(range="mse").rules[0].needs == {Need.GRAM}
    assert gptq(range="minmax").rules[0].needs == {Need.GRAM}
    assert Rule(match="*", weight=None, solver=Ldlq()).needs == frozenset()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "holds no recipe"),
        ("{unclosed", "not valid YAML"),
        ("type: Rtn", "holds a Rtn, expected a Recipe"),
        ("{type: Recipe, name: r, rules: []}", "has no rules"),
        ("{type: Recipe, name: r, rules: [{type: Rule, weigth: null}]}", "no field 'weigth'"),
        ("{type: Recipe, name: r}", "cannot be rebuilt"),
    ],
)
def test_a_file_that_is_no_recipe_is_answered(text, says):
    with pytest.raises(InputError, match=says):
        from_yaml(text)


def test_impossible_groups_and_damping_are_refused_when_built():
    with pytest.raises(InputError, match="group size -5"):
        gptq(group_size=-5)
    with pytest.raises(InputError, match="damp"):
        Ldlq(damp=-1)
    assert Rule(weight=Format(grid=by_name("int4"), block=Group(32), scale=BF16)).solver == Rtn()


def test_scaling_composes_with_solvers():
    scaled, plain = named("awq", {"solver": "gptq"}), named("gptq", {"symmetric": "false"})
    assert scaled.transforms == named("awq").transforms
    assert scaled.rules[0].solver == plain.rules[0].solver
    assert scaled.rules[0].weight.range == plain.rules[0].weight.range
    assert named("smoothquant", {"solver": "gptq"}).rules[0].solver == Ldlq()
    with pytest.raises(InputError, match="solver='trellis'"):
        named("awq", {"solver": "trellis"})
