"""PEG as a recipe: outliers of some columns cost the others nothing, and a person reads what was done."""

import pytest
import torch
from tiny import save_tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.recipe import from_yaml, named
from fewbit.stream.data import Calibration

CALIBRATION = Calibration(samples=16, seqlen=64)


def planted(folder):
    """A tiny Llama with two input channels of every block 60 times as large; its function stays."""
    save_tiny("llama", folder)
    model = fewbit.load(folder)
    for block in model.model.layers:
        attention, ffn = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
        ):
            norm.weight.data[[5, 40]] *= 60
            for reader in readers:
                reader.weight.data[:, [5, 40]] /= 60
    model.save_pretrained(folder / "planted")
    for extra in folder.glob("*token*"):
        (folder / "planted" / extra.name).write_bytes(extra.read_bytes())
    return folder / "planted"


def error(folder, recipe, out) -> float:
    result = fewbit.quantize(folder, recipe, output=out, calibration=CALIBRATION)
    assert result.difference == 0
    with torch.no_grad():
        want, got = (fewbit.load(f)(tiny_ids()).logits for f in (folder, out))
    return ((got - want).norm() / want.norm()).item()


def test_groups_give_back_what_outliers_take_from_one_step_per_tensor(tmp_path):
    folder = planted(tmp_path)
    losses = [error(folder, named("peg", {"groups": str(k)}), tmp_path / f"k{k}") for k in (1, 16)]
    assert losses[1] < losses[0] / 2


def test_the_recipe_is_read_back_and_names_its_choices():
    recipe = named("peg", {"groups": "12", "weight": "tensor", "solver": "gptq"})
    assert from_yaml(recipe.to_yaml()) == recipe
    assert recipe.rules[0].input.groups == 12
    assert "12 groups by range" in str(recipe.rules[0].input)
    with pytest.raises(InputError, match="0 groups of columns sorted by range"):
        named("peg", {"groups": "0"})
