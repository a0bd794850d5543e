"""Predicted seconds: every recipe has them, and they grow with what there is to do."""

import math
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.recipe import RECIPES, Recipe, Rule, aqlm, autoround, awq, gptq, named, qtip
from fewbit.solve import Ldlq
from fewbit.stream import timing
from fewbit.stream.data import Calibration
from fewbit.stream.plan import make_plan
from fewbit.stream.quantize import quantize

SMALL = Calibration(samples=8, seqlen=32)
OF_ENCODERS = {"peg-encoder", "mixed-precision"}
NAMES = [name for f in RECIPES if (name := f.__name__.replace("_", "-")) not in OF_ENCODERS]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_timed_on_its_own_solver(folders, name):
    for settings in ({}, {"group_size": "32"}, {"overhead": "2"}):
        try:
            plan = make_plan(open_source(folders / "llama"), named(name, settings), SMALL)[0]
        except InputError:  # groups of 128 do not divide 64 columns; or the recipe has no such setting
            continue
        assert 0 < plan.seconds < 3600
        return
    raise AssertionError(f"{name} has no plan for a tiny llama")


@pytest.fixture
def steady(monkeypatch):
    """A device of 1e9 operations a second, on which everything that is timed takes a second."""
    monkeypatch.setattr(timing, "timed", lambda run, device, least=0.0: 1.0)
    monkeypatch.setattr(timing, "product_speed", lambda device, dtype: 1e9)
    cached = (timing._pace, timing._tuning_step, timing._measured_chooser)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def predicted(folder, recipe, **settings):
    plan = make_plan(open_source(folder), recipe, replace(SMALL, **settings))[0]
    return plan.seconds


def test_seconds_grow_with_text_steps_and_states(folders, steady, monkeypatch):
    llama = folders / "llama"
    recipe = gptq(group_size=32)
    one, two, three = (predicted(llama, recipe, samples=n) for n in (8, 16, 24))
    assert two - one == pytest.approx(three - two)
    assert two > one
    assert predicted(llama, awq(group_size=32)) > one
    monkeypatch.setattr(timing, "_tuning_step", lambda *args: 1e-6)
    few, many = (predicted(llama, autoround(group_size=32, steps=n)) for n in (10, 110))
    weights = sum(math.prod(x.shape) for x in make_plan(open_source(llama), recipe, SMALL)[0].layers)
    beside = 6 * SMALL.seqlen * (timing.BLOCK - 1) / 1e9
    assert many - few == pytest.approx(100 * (1e-6 + beside) * weights)
    monkeypatch.setattr(timing, "_pace", lambda *args: (0.0, 1e-3))
    at = {n: predicted(llama, qtip(state_bits=n)) for n in (12, 14, 16)}
    assert at[16] - at[12] == pytest.approx(15e-3 * weights)
    assert at[14] - at[12] == pytest.approx(3e-3 * weights)
    short, long = (predicted(llama, aqlm(epochs=n)) for n in (2, 12))
    assert long > short


def test_what_a_pace_says_of_two_sizes(monkeypatch):
    """Seconds of 2 n + 3 n rows come back as a = 2 and b = 3."""
    clock = lambda run, device, least=0.0: 2.0 * run.args[0].shape[1] + 3.0 * run.args[0].numel()  # noqa: E731
    monkeypatch.setattr(timing, "timed", clock)
    assert timing._two_sizes(lambda w, stats: None, "cpu", (16, 32)) == pytest.approx((2.0, 3.0))


def test_bits_count_the_means_that_centred_inputs_take_off(folders, tmp_path):
    w4 = Format(grid=by_name("int4"), block=Channel(), scale=FP32)
    a8 = Format(grid=by_name("int8"), block=Token(), scale=FP32)
    rule = Rule(weight=w4, solver=Ldlq(), input=Activation(format=a8, centred=True))
    recipe = Recipe(name="w4a8", rules=(rule,))
    result = quantize(folders / "llama", recipe, output=tmp_path / "out", calibration=SMALL)
    layer = result.plan.layers[0]
    row = next(row for row in result.rows if row.layer == layer.name)
    bits = 4 * math.prod(layer.shape) + 32 * layer.shape[0] + 16 * layer.shape[1]
    assert row.bits_per_weight == layer.bits_per_weight == pytest.approx(bits / math.prod(layer.shape))
    assert open_source(tmp_path / "out").bits_per_weight == pytest.approx(result.plan.bits_per_weight)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(8 * t.nbytes for n, t in tensors.items() if n.startswith(f"{layer.name}.")) == bits
