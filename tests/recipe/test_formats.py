"""Any format with any solver, through the whole loop: what settings name is solved, written and read back."""

import json

import pytest
import torch
from quantized import linears_of
from tiny import save_tiny

import fewbit
from fewbit.io.source import open_source
from fewbit.recipe import named
from fewbit.stream.data import Calibration, sample_tokens

FEW = Calibration(samples=6, seqlen=48)
NESTED = ("nvfp4", "mx6", "nf4-dq", "qoq-g64")
VECTORS = {"grid": "higgs-p2-n256", "range": "gaussian", "group_size": "64"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama; its linears with the Gram matrices of their inputs: name -> (weight, H)."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    model = save_tiny("llama", folder)
    grams, linears = {}, linears_of(model)

    def keep(name):
        def hook(module, inputs):
            x = inputs[0].detach().flatten(0, -2).double()
            grams[name] = x.t() @ x / len(x)

        return hook

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in linears.items()]
    with torch.no_grad():
        model(input_ids=sample_tokens(FEW, open_source(folder).tokenizer()))
    for handle in handles:
        handle.remove()
    return folder, {n: (m.weight.detach().double(), grams[n]) for n, m in linears.items()}


def output_errors(path, layers):
    """Relative squared error of each layer's output on the inputs that the float model has, from the file."""
    quantized = dict(fewbit.load(path).named_modules())
    found = {}
    for name, (w, h) in layers.items():
        e = quantized[name].qweight.dequantize().double() - w
        found[name] = (((e @ h) * e).sum() / ((w @ h) * w).sum()).item()
    return found


SETTINGS = (*({"format": name} for name in NESTED), VECTORS)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s.values())))
def test_gptq_beats_rounding_in_every_layer_of_the_checkpoint(llama, tmp_path, settings):
    folder, layers = llama
    errors = {}
    for recipe in ("rtn", "gptq"):
        out = tmp_path / recipe
        result = fewbit.quantize(folder, named(recipe, settings), output=out, calibration=FEW)
        assert result.difference == 0
        manifest = json.loads((out / "fewbit_manifest.json").read_text())
        held = settings == {"format": "nvfp4"}
        assert manifest["checkpoint"] == ("compressed-tensors" if held else "native")
        errors[recipe] = output_errors(out, layers)
    assert errors["rtn"].keys() == errors["gptq"].keys() == layers.keys()
    for name, error in errors["gptq"].items():
        assert error < 0.9 * errors["rtn"][name], name
