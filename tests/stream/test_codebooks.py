"""Models with learned tables: the checkpoint is what was solved, in the bits that were planned."""

import math

import pytest
import torch
from tiny import tiny_ids

import fewbit
from fewbit.recipe import named
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize

SMALL = Calibration(samples=4, seqlen=32)
CASES = {
    "kmeans": {"bits": "3"},
    "kmeans of rows": {"bits": "4", "block": "rows", "overhead": "0.5", "solver": "gptq"},
    "gptvq": {"d": "2", "overhead": "0.5"},
    "gptvq in a basis": {"d": "4", "bits": "1", "basis": "hadamard", "passes": "1"},
    "aqlm": {"entry_bits": "4", "epochs": "1", "iterations": "4"},
}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_tables_is_the_model_that_was_solved(folders, tmp_path, arch, case):
    recipe = named(case.split()[0], CASES[case])
    result = quantize(folders / arch, recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.plan.checkpoint == "native"
    assert result.difference < 1e-4
    model = fewbit.load(tmp_path / "out")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fewbit.nn.linear.QLinear)}
    assert len(layers) == len(result.plan.layers)
    stored = sum(m.qweight.nbytes for m in layers.values()) * 8
    weights = sum(math.prod(m.shape) for m in layers.values())
    assert stored / weights == pytest.approx(result.plan.bits_per_weight)
    with torch.no_grad():
        assert model(tiny_ids()).logits.isfinite().all()
        model.generate(tiny_ids(1, 4), max_new_tokens=3, do_sample=False)
