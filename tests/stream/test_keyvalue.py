"""Fixed steps of keys and values: those of the quantized model, in every file, used by whoever loads it."""

import json
from dataclasses import replace

import pytest
import torch
from quantized import copy_with_config
from safetensors.torch import load_file
from tiny import save_tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.io.checkpoint import save_tensors
from fewbit.io.gguf_write import write
from fewbit.io.load import load
from fewbit.io.source import open_source
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache
from fewbit.nn.kvsteps import calibrate, kept
from fewbit.recipe import from_yaml, named
from fewbit.stream.data import Calibration, sample_tokens
from fewbit.stream.export import export
from fewbit.stream.plan import make_plan
from fewbit.stream.quantize import quantize

FEW = Calibration(samples=4, seqlen=32)
GROUPS = {"group_size": "32"}


def run(root, kv: str, recipe: str = "rtn", settings: dict = GROUPS, arch: str = "llama", **how):
    save_tiny(arch, root / "model")
    asked = replace(named(recipe, settings), kv=kv_format(kv))
    quantize(root / "model", asked, output=root / "out", calibration=FEW, read_back=False, **how)
    return root / "out"


def values(steps) -> torch.Tensor:
    return torch.cat([s.flatten() for s in (*steps.key, *steps.value) if s is not None])


@pytest.mark.parametrize("depth", ["linear", "block"])
@pytest.mark.parametrize(
    ("recipe", "settings", "kv", "layout"),
    [
        ("rtn", GROUPS, "fp8-tensor", "compressed-tensors"),
        ("gptq", GROUPS, "fp8-head", "compressed-tensors"),
        ("nf4", {}, "int8-head", "fewbit"),
    ],
)
def test_steps_are_the_largest_that_the_quantized_model_shows(tmp_path, recipe, settings, kv, layout, depth):
    out = run(tmp_path, kv, recipe, settings, depth=depth)
    source = open_source(out)
    assert source.quantization_config["quant_method"] == layout
    assert source.kv == kv_format(kv)
    assert not any("scale" in name for name in source.tensors())
    model = load(out)
    tokens = sample_tokens(FEW, open_source(tmp_path / "model").tokenizer())
    want = calibrate(model, tokens, kv_format(kv))
    found = kept(model)
    assert found[0] == kv_format(kv)
    torch.testing.assert_close(values(found[1]), values(want), rtol=1e-5, atol=0)
    assert from_yaml((out / "fewbit_recipe.yaml").read_text()).kv == kv_format(kv)
    with torch.no_grad():
        cached = model(tiny_ids(), past_key_values=QuantizedCache(model.config, *found)).logits
        assert torch.equal(cached, model(tiny_ids()).logits)  # a prompt in one call loses nothing


def test_steps_go_from_layout_to_layout_and_through_save_pretrained(tmp_path):
    start = run(tmp_path, "fp8-head")
    want = open_source(start).read_kv()
    export(start, "native", tmp_path / "native", verify=False)
    load(tmp_path / "native").save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", "compressed-tensors", tmp_path / "again", verify=False)
    for folder in ("native", "saved", "again"):
        source = open_source(tmp_path / folder)
        got = source.read_kv()
        assert source.kv == kv_format("fp8-head")
        assert {n: [s.tolist() for s in pair] for n, pair in got.items()} == {
            n: [s.tolist() for s in pair] for n, pair in want.items()
        }
    scheme = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert scheme["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "attn_head",
        "dynamic": False,
    }
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert stored["model.layers.0.self_attn.k_scale"].shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("target", "recipe", "settings"),
    [
        ("gptq", "rtn", GROUPS),
        ("gptq_v2", "rtn", GROUPS),
        ("awq", "rtn", GROUPS),
        ("bitsandbytes", "nf4", {}),
        ("fp8", "rtn", {"grid": "e4m3fn", "group_size": "-1"}),
        ("gguf", "rtn", {"format": "q8_0"}),
    ],
)
def test_a_layout_that_holds_no_steps_says_that_they_stay_behind(tmp_path, target, recipe, settings):
    start = run(tmp_path, "fp8-head", recipe, settings)
    if target == "gguf":
        done, again = write(open_source(start), tmp_path / "x.gguf"), tmp_path / "x.gguf"
    else:
        again = tmp_path / "x"
        done = export(start, target, again, requantize=True, verify=False)
    assert any("steps of keys and values stay behind" in text for text in done.caveats)
    assert open_source(again).tensors().keys() >= open_source(start).tensors().keys()


def test_models_whose_cache_is_not_all_quantized_stay_native(tmp_path):
    out = run(tmp_path, "fp8-tensor", arch="gemma3")
    source = open_source(out)
    assert source.quantization_config["quant_method"] == "fewbit"
    assert list(source.read_kv()) == ["model.layers.1.self_attn"]
    plan = make_plan(
        open_source(tmp_path / "model"), replace(named("rtn", GROUPS), kv=kv_format("fp8-tensor")), FEW
    )[0]
    assert "2 layers (sliding windows) stay float" in plan.checkpoint_reason


def test_what_readers_do_otherwise_is_said(tmp_path):
    """Of int8 by vLLM, and of zeros by transformers; E4M3 beside symmetric weights is read by both."""
    start = run(tmp_path, "int8-tensor", settings=GROUPS | {"symmetric": "false"})
    said = " ".join(export(start, "compressed-tensors", tmp_path / "ct", verify=False).caveats)
    assert "vLLM reads keys and values in E4M3" in said
    assert "leaves keys and values in float" in said
    source = open_source(tmp_path / "model")
    for kv, want in (("int8-tensor", True), ("fp8-head", False)):
        plan = make_plan(source, replace(named("rtn", GROUPS), kv=kv_format(kv)), FEW)[0]
        assert any("keys and values" in text for text in plan.caveats) == want


@pytest.mark.parametrize(
    ("recipe", "kv", "words"),
    [
        ("rtn", "kivi4", "a checkpoint has nothing to store; give fp8-tensor"),
        ("rtn", "fp8", "finds its steps as they come"),
        ("mixed-precision", "fp8-tensor", "of an encoder, which keeps no keys and values"),
    ],
)
def test_formats_without_fixed_steps_are_refused_in_words(recipe, kv, words):
    with pytest.raises(InputError, match=words):
        replace(named(recipe), kv=kv_format(kv))


def test_damaged_steps_are_refused_in_words(tmp_path):
    out = run(tmp_path, "fp8-tensor")
    file, name = out / "model.safetensors", "model.layers.1.self_attn.v_scale"
    good = load_file(file)
    for change, words in (
        ({name: torch.zeros(1)}, "v_scale holds steps of 0 or less"),
        ({name: torch.full((1,), torch.nan)}, "v_scale holds steps of 0 or less"),
        ({name: torch.ones(3)}, r"v_scale is torch.float32 of shape \[3\]"),
        ({"model.layers.1.self_attn.k_zero_point": torch.ones(1)}, "k_zero_point is not 0"),
        ({name: None}, "v_scale is missing"),
    ):
        save_tensors(file, {n: t for n, t in (good | change).items() if t is not None})
        with pytest.raises(InputError, match=words):
            load(out)
    save_tensors(file, {n: t for n, t in good.items() if "_scale" not in n or "weight" in n})
    with pytest.raises(InputError, match="has no k_scale and v_scale"):
        load(out)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"num_bits": 4, "type": "float"}, "a kv_cache_scheme of 4-bit float"),
        ({"num_bits": 8, "type": "float", "symmetric": False}, "symmetric False"),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, "per token"),
        ([8], "no object"),
    ],
)
def test_schemes_that_are_not_read_are_refused_in_words(tmp_path, scheme, words):
    out = run(tmp_path, "fp8-tensor")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    folder = copy_with_config(
        out, tmp_path / "other", quantization_config=config | {"kv_cache_scheme": scheme}
    )
    with pytest.raises(InputError, match=words):
        open_source(folder)
