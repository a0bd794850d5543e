"""QuaRot through the loop: the rotated checkpoint is the same function, in every reader and after a kill."""

import pytest
import torch
from tiny import tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format
from fewbit.grid import by_name
from fewbit.recipe import Recipe, Rule, from_yaml, quarot
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize
from fewbit.transform.rotation import Rotation

SMALL = Calibration(samples=4, seqlen=32)
W8 = Rule(weight=Format(grid=by_name("int8"), block=Channel(), scale=FP32))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "opt", "gpt_neox"])
@pytest.mark.parametrize("online", [True, False])
def test_the_rotated_checkpoint_is_the_same_function(folders, tmp_path, arch, online):
    import transformers

    error = {}
    for name, rotation in (("plain", None), ("rotated", Rotation(online=online))):
        recipe = Recipe(name=name, rules=(W8,), rotation=rotation)
        assert from_yaml(recipe.to_yaml()) == recipe
        result = quantize(folders / arch, recipe, output=tmp_path / name, calibration=SMALL)
        assert result.difference < 1e-5
        mine = logits(fewbit.load(tmp_path / name), tiny_ids())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32")
        torch.testing.assert_close(logits(theirs, tiny_ids()), mine, rtol=1e-4, atol=1e-4)
        plain = logits(fewbit.load(folders / arch), tiny_ids())
        error[name] = ((mine - plain).norm() / plain.norm()).item()
    assert error["rotated"] < 3 * error["plain"] + 2e-2


def test_four_bits_run_with_inputs_rounded_in_the_rotated_basis(folders, tmp_path):
    recipe = quarot(bits=4, input_bits=8)
    assert from_yaml(recipe.to_yaml()) == recipe
    result = quantize(folders / "llama", recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.difference < 1e-5
    writers = [row for row in result.rows if row.layer.endswith(("o_proj", "down_proj"))]
    assert len(writers) == 4
    assert all(row.online for row in writers)
    assert not any(row.online for row in result.rows if row not in writers)
    assert torch.isfinite(logits(fewbit.load(tmp_path / "out"), tiny_ids())).all()


def test_a_model_that_cannot_be_rotated_is_refused_and_nothing_is_left(folders, tmp_path):
    with pytest.raises(InputError, match="stands in the way of a rotation"):
        quantize(
            folders / "gemma3",
            Recipe(name="r", rules=(W8,), rotation=Rotation()),
            output=tmp_path / "out",
            calibration=SMALL,
        )
    assert not list(tmp_path.iterdir())
