"""Block-wise tuning through the loop: better than rounding, the same file after an interruption."""

from dataclasses import replace

import pytest
import torch
from tiny import save_tiny, tiny_ids

import fewbit
from fewbit.recipe import autoround, from_yaml, omniquant, rtn
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize
from fewbit.transform.rotation import Rotation

SMALL = Calibration(samples=8, seqlen=32)
THREE = {"bits": 3, "group_size": 32, "symmetric": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("model") / "llama"
    save_tiny("llama", path)
    return path


def error(model, folder):
    with torch.no_grad():
        want, got = fewbit.load(folder)(tiny_ids(8, 100)).logits, fewbit.load(model)(tiny_ids(8, 100)).logits
    return ((got - want).norm() / want.norm()).item()


def test_learned_rounding_beats_rounding_to_nearest(folder, tmp_path):
    recipes = {
        "rtn": rtn(**THREE, range="mse"),
        "omniquant": omniquant(**THREE, steps=100),
        "autoround": autoround(**THREE, steps=100),
    }
    calibration = Calibration(samples=64, seqlen=64)
    lost = {}
    for name, recipe in recipes.items():
        assert from_yaml(recipe.to_yaml()) == recipe
        result = quantize(folder, recipe, output=tmp_path / name, calibration=calibration)
        assert result.difference == 0
        lost[name] = error(tmp_path / name, folder)
    assert lost["autoround"] < 0.98 * lost["rtn"]
    assert lost["omniquant"] < 0.99 * lost["rtn"]


CUT = {
    "rounding": autoround(**THREE, steps=10),
    "rotated": replace(autoround(**THREE, steps=10), rotation=Rotation()),
    "scales": omniquant(**THREE, steps=10, let=True, input_bits=8),
}


@pytest.mark.parametrize("recipe", CUT.values(), ids=CUT)
def test_an_interrupted_run_ends_in_the_same_file(folder, ends_in_the_same_file, recipe):
    ends_in_the_same_file(folder, recipe, SMALL)
