"""Export of layers whose inputs are quantized: transformers, without fewbit, rounds them as well."""

import json

import pytest
import torch
from quantized import int_format
from safetensors.torch import load_file
from tiny import save_tiny

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Token, format_by_name
from fewbit.format.activation import Activation
from fewbit.grid import Int
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule
from fewbit.stream.data import Calibration
from fewbit.stream.export import export
from fewbit.stream.quantize import quantize

FEW = Calibration(samples=4, seqlen=32)
TOKEN = Activation(format=Format(grid=Int(8), block=Token(), scale=FP32))


def run(root, weight: Format, input: Activation):
    """A tiny Llama, rounded to nearest with quantized inputs."""
    save_tiny("llama", root / "model")
    recipe = Recipe(name="both", rules=(Rule(weight=weight, input=input),))
    quantize(root / "model", recipe, output=root / "in", calibration=FEW, read_back=False)
    return root / "in"


def same(a, b) -> bool:
    """Codes of every module, and how its input is quantized."""
    one, two = open_source(a), open_source(b)
    return one.entries.keys() == two.entries.keys() and all(
        torch.equal(one.read_qtensor(m).codes, two.read_qtensor(m).codes)
        and one.entries[m].activation == two.entries[m].activation
        for m in one.entries
    )


def test_w4a8_is_simulated_by_transformers_and_comes_back(tmp_path):
    start = run(tmp_path, int_format(4), TOKEN)
    done = export(start, "compressed-tensors", tmp_path / "ct")
    assert done.seen.difference < 0.02  # steps of inputs are max / 127.5 there, max / 127 here
    assert any("a byte each" in text for text in done.caveats)
    group = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["weights"]["num_bits"] == 4
    assert group["group_0"]["input_activations"]["num_bits"] == 8
    back = export(tmp_path / "ct", "native", tmp_path / "back", verify=False)
    assert same(start, back.output)


def test_nvfp4_inputs_with_a_stored_step_are_simulated_by_transformers_and_come_back(tmp_path):
    nvfp4 = format_by_name("nvfp4")
    start = run(tmp_path, nvfp4, Activation(format=nvfp4, static=True))
    done = export(start, "compressed-tensors", tmp_path / "ct")
    assert (
        done.seen.difference < 0.3
    )  # transformers computes in bfloat16, which gives some inputs other codes
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    step = open_source(start).read_input(name).scale
    assert 1 / stored[f"{name}.input_global_scale"] == step
    back = export(tmp_path / "ct", "native", tmp_path / "back", verify=False)
    assert same(start, tmp_path / "ct")
    assert same(start, back.output)
    assert open_source(back.output).read_input(name).scale == step


def test_nvfp4_inputs_without_a_stored_step_are_refused(tmp_path):
    nvfp4 = format_by_name("nvfp4")
    start = run(tmp_path, nvfp4, Activation(format=nvfp4))
    with pytest.raises(InputError, match="NVFP4 inputs have one stored step per tensor there"):
        export(start, "compressed-tensors", tmp_path / "ct", verify=False)
    assert not (tmp_path / "ct").exists()


def test_affine_w4a8_rows_come_back_as_well(tmp_path):
    start = run(tmp_path, int_format(4, block=Channel(), asymmetric=True), TOKEN)
    done = export(start, "compressed-tensors", tmp_path / "ct", verify=False)
    assert any("symmetric weights of 4 or 8 bits" in text for text in done.caveats)
    assert same(start, tmp_path / "ct")
