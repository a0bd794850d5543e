"""Claims: K-quants are no worse than llama.cpp's; where their blocks do not fit, its types are taken.

``REFERENCE`` are mean squared errors that llama.cpp's own code (``ggml_quantize_chunk``, release of
llama-cpp-python 0.3.36) makes of the same numbers, without importances and with them: printed by
``python benchmarks/k_quants.py``, which calls that library.
"""

import dataclasses

import pytest
import torch
from quantized import save_quantized
from tiny import save_tiny

from fewbit.format import FORMATS, FP16, MSE, Format, Group, LeastSquares
from fewbit.grid import Int
from fewbit.io.gguf_fallback import INSTEAD, fitting
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule, named
from fewbit.solve import Ldlq
from fewbit.stream.data import Calibration
from fewbit.stream.plan import make_plan
from fewbit.stream.quantize import quantize

REFERENCE = {
    "q2_k": (0.088653, 0.097800),
    "q3_k": (0.0227924, 0.0317804),
    "q4_k": (0.00512545, 0.00731437),
    "q5_k": (0.00130608, 0.00189037),
    "q6_k": (0.000314956, 0.000461231),
}


def numbers():
    """The numbers and importances of the reference."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(256, 1024, generator=g), torch.randn(1024, generator=g).exp()


@pytest.mark.parametrize("name", REFERENCE)
def test_no_more_error_than_llama_cpps_search(name):
    (x, h), (plain, weighted) = numbers(), REFERENCE[name]
    ours = (FORMATS[name].quantize(x).dequantize() - x).square().mean()
    assert ours < 1.005 * plain
    with_h = dataclasses.replace(FORMATS[name], range=LeastSquares())
    assert ((with_h.quantize(x, h).dequantize() - x).square() * h).mean() < 1.02 * weighted


def test_what_is_taken_where_blocks_of_256_do_not_fit():
    for kind, other in INSTEAD.items():
        wanted = FORMATS[kind.lower()]
        assert fitting(wanted, 512) == wanted
        assert fitting(wanted, 576) == FORMATS[other]
        assert fitting(wanted, 48) == wanted  # nothing fits; refused by the format itself
        searched = dataclasses.replace(wanted, range=MSE())
        assert fitting(searched, 576) == dataclasses.replace(FORMATS[other], range=MSE())
        assert FORMATS[other].bits_per_weight((4, 576)) >= wanted.bits_per_weight((4, 512))
    for other in (FORMATS["q4_0"], Format(grid=Int(4), block=Group(128), scale=FP16)):
        assert fitting(other, 576) == other


@pytest.mark.parametrize("recipe", [named("rtn", {"format": "q4_k"}), named("gptq", {"format": "q6_k"})])
def test_a_run_takes_them_and_says_so(recipe, folders, tmp_path, capsys):
    source = open_source(folders / "llama")  # 64 and 128 inputs
    plan = make_plan(source, recipe, Calibration(samples=2, seqlen=16))[0]
    wanted, got = ("q4_k", "q5_0") if recipe.name == "rtn" else ("q6_k", "q8_0")
    said = f"14 layers get {got} in the place of {wanted}, whose blocks of 256 cut their rows: first model."
    assert len(plan.fallbacks) == 1
    assert plan.fallbacks[0].startswith(said)
    assert plan.fallbacks[0] in plan.caveats
    assert plan.recipe == recipe
    quantize(folders / "llama", recipe, output=tmp_path / "q", calibration=Calibration(samples=2, seqlen=16))
    written = write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    assert f"14 tensors {got.upper()}" in str(written)


def test_layers_that_fit_keep_theirs(tmp_path):
    """One rule, layers of both kinds: down_proj of 256 inputs keeps Q4_K."""
    model = save_tiny("llama", tmp_path / "m")
    config = model.config
    config.intermediate_size = 256
    type(model)(config).save_pretrained(tmp_path / "m")
    recipe = Recipe(name="r", rules=(Rule(weight=FORMATS["q4_k"], solver=Ldlq()),))
    plan = make_plan(open_source(tmp_path / "m"), recipe, Calibration(samples=2, seqlen=16))[0]
    kept = {layer.module.rpartition(".")[2] for layer in plan.layers if layer.format == FORMATS["q4_k"]}
    assert kept == {"down_proj"}
    assert plan.fallbacks[0].startswith("12 layers get q5_0")


def test_a_searched_weight_goes_out_as_its_type(tmp_path):
    save_quantized("llama", tmp_path / "q", dataclasses.replace(FORMATS["q5_0"], range=LeastSquares()))
    assert "14 tensors Q5_0" in str(write(open_source(tmp_path / "q"), tmp_path / "m.gguf"))
