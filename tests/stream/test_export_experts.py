"""Claim: asymmetric experts are exported, and that transformers cannot load them is said with its reason."""

from quantized import int_format

import fewbit
from fewbit.format import FP16
from fewbit.recipe import Recipe, Rule
from fewbit.stream.client import EXPERTS
from fewbit.stream.export import export


def test_experts_with_zero_points(folders, tmp_path):
    recipe = Recipe(name="zeros", rules=(Rule(weight=int_format(4, asymmetric=True, scale=FP16)),))
    fewbit.quantize(folders / "mixtral", recipe, output=tmp_path / "q", read_back=False)
    seen = export(tmp_path / "q", "compressed-tensors", tmp_path / "out").seen
    assert seen.difference is None
    assert seen.why == EXPERTS
    assert (tmp_path / "out" / "config.json").is_file()
