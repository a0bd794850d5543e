"""QoQ from a source to a checkpoint: every fold keeps the function, every code stays in int8."""

import pytest
import torch
from tiny import tiny, tiny_ids, tiny_tokenizer

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format
from fewbit.grid import by_name
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache
from fewbit.nn.linear import QLinear
from fewbit.recipe import Recipe, Rule, from_yaml, named, qoq
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize
from fewbit.transform import Permute, Smooth, SmoothAttention

SMALL = Calibration(samples=4, seqlen=32)
W8 = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
FOLDS = (Permute(), Smooth(alpha=0.3, linear=True, norms=False), SmoothAttention())


def logits(model, ids=None, **more):
    with torch.no_grad():
        return model(tiny_ids() if ids is None else ids, **more).logits.float()


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "opt"])
def test_the_folds_leave_the_function_through_the_loop(folders, tmp_path, arch):
    plain, error = logits(fewbit.load(folders / arch)), {}
    for name, transforms in (("plain", ()), ("folded", FOLDS)):
        recipe = Recipe(name=name, rules=(Rule(weight=W8),), transforms=transforms)
        assert from_yaml(recipe.to_yaml()) == recipe
        result = quantize(folders / arch, recipe, output=tmp_path / name, calibration=SMALL)
        assert result.difference < 1e-5
        assert not any(row.notes for row in result.rows)
        error[name] = difference(logits(fewbit.load(tmp_path / name)), plain)
    assert 0 < error["folded"] < 3 * error["plain"] + 1e-3
    weights = [fewbit.load(tmp_path / n).get_submodule(result.rows[-1].layer) for n in ("plain", "folded")]
    assert difference(*(w.qweight.dequantize() for w in weights)) > 0.1  # something was folded


def test_layers_that_stay_float_are_written_as_they_ran(folders, tmp_path):
    """Keys, queries and down are folded, but not quantized: they are rounded to the file's dtype at once."""
    tiny("llama").bfloat16().save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    rules = tuple(Rule(match=f"*{name}_proj", weight=W8) for name in "vo")
    recipe = Recipe(name="some", rules=rules, transforms=(Smooth(linear=True), SmoothAttention()))
    result = quantize(tmp_path / "half", recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.difference == 0


@pytest.mark.parametrize("group_size", [32, -1])
def test_qoq_runs_from_a_source_to_a_checkpoint_and_with_its_cache(folders, tmp_path, group_size):
    recipe = qoq(group_size=group_size)
    assert from_yaml(recipe.to_yaml()) == recipe
    result = quantize(folders / "llama", recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.difference < 1e-5
    assert not any(row.notes for row in result.rows)
    model, plain = fewbit.load(tmp_path / "out"), logits(fewbit.load(folders / "llama"))
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    assert len(layers) == len(result.rows) == 14
    assert all(str(m.activation.format).startswith("int8 token") for m in layers)
    if group_size > 0:
        for m in layers:
            q = m.qweight
            codes, steps = q.codes.int().unflatten(1, (-1, 32)), q.scale.codes.int()[..., None]
            assert ((codes - q.zero.int()[..., None]) * steps).abs().max() <= 127
    four = logits(model)
    assert difference(four, plain) < 0.5
    cache = QuantizedCache(model.config, kv_format("int4-token"))
    ids = tiny_ids()
    logits(model, ids[:, :12], past_key_values=cache)
    last = logits(model, ids[:, 12:], past_key_values=cache)
    assert difference(last, four[:, 12:]) < 0.3


def test_settings_choose_the_parts():
    kinds = lambda recipe: [type(t) for t in recipe.transforms]  # noqa: E731
    assert kinds(qoq()) == [Permute, Smooth, SmoothAttention]
    assert qoq().transforms[1] == Smooth(alpha=0.3, linear=True, norms=False)
    assert qoq().rotation.values
    assert not qoq().rotation.online
    per_row = named("qoq", {"group_size": "-1", "smooth_attention": "false", "rotate": "false"})
    assert kinds(per_row) == [Smooth]
    assert per_row.transforms[0].alpha == 0.1
    assert per_row.rotation is None
    assert kinds(qoq(reorder=False, smooth=False)) == [SmoothAttention]
    with pytest.raises(InputError, match="solver='x' is unknown"):
        qoq(solver="x")
    with pytest.raises(InputError, match="group size 0"):
        qoq(group_size=0)


def test_what_cannot_be_folded_is_said(folders, tmp_path):
    """Phi-3 fuses q, k, v and gate, up: no seam."""
    recipe = Recipe(name="r", rules=(Rule(weight=W8),), transforms=(SmoothAttention(), Permute()))
    result = quantize(folders / "phi3", recipe, output=tmp_path / "out", calibration=SMALL)
    notes = [note for row in result.rows for note in row.notes]
    assert len(notes) == 2 * 2
    assert notes[0].startswith("nothing for SmoothAttention(alpha=0.5) in this block: no seam of its kind")
