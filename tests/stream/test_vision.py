"""Models that see as well: the text is quantized, from text alone, and all else is kept byte for byte."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import LAYERS, VISION, save_tiny, tiny, tiny_ids, tiny_tokenizer

import fewbit
from fewbit.recipe import awq, gptq
from fewbit.stream.data import Calibration

FEW = Calibration(samples=6, seqlen=48)


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("arch", VISION)
def test_the_text_is_quantized_and_the_rest_kept_byte_for_byte(arch, tmp_path):
    model = save_tiny(arch, tmp_path / "model")
    result = fewbit.quantize(
        tmp_path / "model", gptq(bits=8, group_size=32), output=tmp_path / "out", calibration=FEW
    )
    assert result.difference == 0
    assert len(result.rows) == 7 * LAYERS
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    coded = {f"{row.layer}.weight" for row in result.rows}
    assert coded <= set(before)
    assert not any("vis" in name for name in coded)
    for name in set(before) - coded:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    made = {f"{row.layer}.{part}" for row in result.rows for part in ("weight_packed", "weight_scale")}
    assert made <= set(after)
    loaded = fewbit.load(tmp_path / "out")
    with torch.no_grad():
        want, got = model(tiny_ids()).logits, loaded(tiny_ids()).logits
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("arch", VISION)
def test_transformers_loads_it_without_touching_the_tower(arch, tmp_path):
    save_tiny(arch, tmp_path / "model")
    fewbit.quantize(tmp_path / "model", gptq(group_size=32), output=tmp_path / "out", calibration=FEW)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    loaded = type(tiny(arch)).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    modules = dict(loaded.named_modules())
    assert any(n in modules and ".vis" in f".{n}" for n in ignored)  # by the names it has there
    with torch.no_grad():
        got, want = loaded(tiny_ids()).logits, fewbit.load(tmp_path / "out")(tiny_ids()).logits
    assert (got - want).norm() < 1e-3 * want.norm()


def test_a_tower_in_another_precision_keeps_it_and_image_settings_come_along(tmp_path):
    model = tiny("llava").bfloat16()
    model.model.vision_tower.float()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 16}')
    fewbit.quantize(
        tmp_path / "model",
        awq(group_size=32, range="minmax", points=3),
        output=tmp_path / "out",
        calibration=FEW,
    )
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    tower = [n for n in before if "vision_tower" in n]
    assert {before[n].dtype for n in tower} == {torch.float32}
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == torch.float32 for n in tower)
    assert after["language_model.lm_head.weight"].dtype == torch.bfloat16
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 16}'
