"""Export: what a layout holds goes over by value; what it does not is refused by layer, or its cost told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import int_format, linears_of, save_quantized
from safetensors import safe_open
from safetensors.torch import load_file

from fewbit.errors import InputError
from fewbit.format import BF16, FP16, FP32, Block2d, Channel, Flat, Format
from fewbit.grid import by_name
from fewbit.io import compressed_tensors, gptq
from fewbit.io.checkpoint import save_tensors
from fewbit.io.load import load
from fewbit.io.ordered import OrderedTensor
from fewbit.io.source import open_source
from fewbit.stream import client
from fewbit.stream.export import export
from fewbit.stream.layouts import LAYOUTS
from fewbit.stream.shards import size_of

INT4 = int_format(4, scale=BF16)
NF4 = Format(grid=by_name("nf4"), block=Flat(64), scale=FP32)
TILES = Format(grid=by_name("e4m3fn"), block=Block2d(64, 64), scale=FP32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Native checkpoints of a tiny Llama by name, which no test changes."""
    root = tmp_path_factory.mktemp("made")
    for name, fmt in (("int4", INT4), ("nf4", NF4), ("int3", int_format(3, asymmetric=True, scale=FP16))):
        save_quantized("llama", root / name, fmt, dtype=torch.bfloat16)
    mixed = lambda n: INT4 if "mlp" in n else int_format(3, block=Channel(), scale=FP32)  # noqa: E731
    save_quantized("llama", root / "mixed", mixed)
    return root


def values(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return source.read(source.tensors())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("int4", ("compressed-tensors", "gptq", "gptq_v2", "awq", "native")),
        ("int3", ("compressed-tensors", "gptq", "gptq_v2", "native")),
        ("nf4", ("bitsandbytes", "native")),
        ("mixed", ("compressed-tensors", "native")),
    ],
)
def test_a_chain_of_layouts_ends_with_the_codes_and_values_that_it_began_with(made, tmp_path, name, targets):
    start, want = made / name, values(made / name)
    for i, target in enumerate(targets):
        done = export(start, target, tmp_path / str(i), verify=False)
        start = done.output
        assert open_source(start).quantization_config["quant_method"] in (
            target.removesuffix("_v2"),
            "fewbit",
        )
        assert not done.requantized
        got = values(start)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) for n in want)
    first, last = open_source(made / name), open_source(start)
    for module in first.entries:
        a, b = first.read_qtensor(module), last.read_qtensor(module)
        assert torch.equal(a.codes, b.codes)
    assert type(load(start)).__name__ == "LlamaForCausalLM"


def test_fp8_tiles_go_over_and_come_back(tmp_path):
    shapes = lambda n: (128, 64) if "gate" in n or "up" in n else (64, 64)  # noqa: E731
    tiles = lambda n: replace(TILES, block=Block2d(*shapes(n)))  # noqa: E731 - one tile a matrix, but for down's two
    save_quantized(
        "llama",
        tmp_path / "in",
        lambda n: INT4 if n.endswith(("down_proj", "k_proj", "v_proj")) else tiles(n),
    )
    with pytest.raises(InputError, match="k_proj cannot be exported as it is: FP8 files hold E4M3, not int4"):
        export(tmp_path / "in", "fp8", tmp_path / "out", verify=False)
    done = export(tmp_path / "in", "fp8", tmp_path / "out", requantize=True, verify=False)
    assert {x.name.rpartition(".")[2] for x in done.requantized} == {"down_proj", "k_proj", "v_proj"}
    back = export(tmp_path / "out", "native", tmp_path / "back", verify=False)
    got, middle = values(back.output), values(tmp_path / "out")
    assert all(torch.equal(got[n], middle[n]) for n in middle)
    assert torch.equal(
        got["model.layers.0.mlp.up_proj.weight"], values(tmp_path / "in")["model.layers.0.mlp.up_proj.weight"]
    )


def test_everything_of_the_source_is_in_the_result_or_listed(made, tmp_path):
    done = export(made / "int4", "gptq", tmp_path / "out", verify=False)
    before, after = tensors_of(made / "int4"), tensors_of(tmp_path / "out")
    model = save_quantized("llama", tmp_path / "again", INT4, dtype=torch.bfloat16)
    assert {layer.name for layer in done.layers} == set(linears_of(model))
    assert set(done.copied) == {n for n in before if not n.endswith((".codes", ".scale"))}
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in done.copied)
    assert dict(done.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["bits"] == 4


def test_a_stored_tensor_that_no_layer_uses_goes_along(made, tmp_path):
    save_quantized("llama", tmp_path / "in", INT4)
    file = tmp_path / "in" / "model.safetensors"
    save_tensors(file, load_file(file) | {"mtp.head.weight": torch.ones(3, 5, dtype=torch.float16)})
    done = export(tmp_path / "in", "awq", tmp_path / "out", verify=False)
    assert done.unused == ("mtp.head.weight",)
    kept = tensors_of(tmp_path / "out")["mtp.head.weight"]
    assert kept.dtype == torch.float16
    assert torch.equal(kept, torch.ones(3, 5).half())


def test_shards_are_bounded_and_indexed(made, tmp_path):
    done = export(made / "int4", "gptq", tmp_path / "out", verify=False, shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert done.shards == len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    largest = tensors_of(tmp_path / "out")["model.embed_tokens.weight"].nbytes
    for file in files:
        with safe_open(file, "pt") as f:
            held = set(f.keys())
        assert held == {n for n, where in index["weight_map"].items() if where == file.name}
        assert file.stat().st_size < max(30_000, largest) + 3000  # and its header
    assert (
        index["metadata"]["total_size"]
        == done.nbytes
        == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    )
    got, want = values(tmp_path / "out"), values(made / "int4")
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_steps_that_change_their_dtype_are_measured(tmp_path):
    save_quantized("llama", tmp_path / "in", int_format(4, scale=FP32))
    source = tmp_path / "in"
    for target in ("gptq", "awq"):
        done = export(source, target, tmp_path / target, verify=False)
        assert not done.requantized
        got, want = open_source(tmp_path / target), open_source(source)
        for module in want.entries:
            a, b = want.read_qtensor(module), got.read_qtensor(module)
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale.half(), b.scale)


def test_what_a_layout_cannot_hold_is_refused_by_layer_and_leaves_nothing(made, tmp_path):
    for name, target, words in (
        ("int4", "bitsandbytes", "q_proj cannot be exported as it is: bitsandbytes holds nf4"),
        ("nf4", "gptq", "not nf4; choose another layout, or allow a second rounding with --requantize"),
        ("int3", "awq", "integers of 4 bits, not int3"),
        ("mixed", "gptq", "one width, group size and symmetry for all modules"),
        ("nf4", "compressed-tensors", "not nf4"),
    ):
        with pytest.raises(InputError, match=words):
            export(made / name, target, tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [t for t in LAYOUTS if t != "native"])
@pytest.mark.parametrize("name", ["nf4", "mixed"])
def test_rounding_again_is_allowed_on_request_and_says_what_it_costs(made, tmp_path, name, target):
    if (name, target) == ("nf4", "bitsandbytes"):
        name = "int4"
    done = export(made / name, target, tmp_path / "out", requantize=True, verify=False)
    got, want = values(tmp_path / "out"), values(made / name)
    assert done.requantized or (name, target) == ("mixed", "compressed-tensors")
    for layer in done.layers:
        w, v = want[f"{layer.name}.weight"], got[f"{layer.name}.weight"]
        error = float((v - w).square().sum() / w.square().sum())
        assert error == pytest.approx(layer.error, rel=1e-2, abs=1e-6)
        assert bool(layer.why) == (layer in done.requantized)
        assert error < 0.15


def test_act_order_goes_to_gptq_compressed_tensors_and_native_files_and_is_refused_elsewhere(tmp_path):
    save_quantized("llama", tmp_path / "in", INT4)
    export(tmp_path / "in", "gptq", tmp_path / "plain", verify=False)
    tensors, order = (
        tensors_of(tmp_path / "plain"),
        torch.randperm(64, generator=torch.Generator().manual_seed(0)),
    )
    module = "model.layers.0.self_attn.q_proj"
    rest = gptq.V1.from_dict(module, tensors, *open_source(tmp_path / "plain").entries[module].stored)
    tensors |= gptq.V1.to_dict(module, OrderedTensor(rest=rest, order=order))
    save_tensors(tmp_path / "plain" / "model.safetensors", tensors)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))

    source = open_source(tmp_path / "plain")
    assert isinstance(source.read_qtensor(module), OrderedTensor)
    want = source.read([f"{module}.weight"])[f"{module}.weight"]
    assert torch.equal(want[:, order], rest.dequantize())
    x = torch.randn(3, 64)
    layer = load(tmp_path / "plain").get_submodule(module)
    torch.testing.assert_close(layer(x), x @ want.T)
    before = tmp_path / "plain"
    for i, target in enumerate(("gptq_v2", "native", "compressed-tensors", "gptq")):
        done = export(before, target, tmp_path / str(i), verify=target == "compressed-tensors")
        before = done.output
        if target == "compressed-tensors":
            assert "gave up columns in another order" in done.seen.why
        again = open_source(done.output)
        assert torch.equal(again.read([f"{module}.weight"])[f"{module}.weight"], want)
    model = load(tmp_path / "1")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(open_source(tmp_path / "saved").read([f"{module}.weight"])[f"{module}.weight"], want)
    with pytest.raises(InputError, match="q_proj cannot be exported as it is: its columns are grouped"):
        export(tmp_path / "plain", "awq", tmp_path / "awq", verify=False)
    done = export(tmp_path / "plain", "awq", tmp_path / "awq", requantize=True, verify=False)
    assert [x.name for x in done.requantized] == [module]


def test_conv1d_and_maps_are_refused_for_good(tmp_path):
    save_quantized("gpt2", tmp_path / "in", INT4)
    for allowed in (False, True):
        with pytest.raises(InputError, match=r"Conv1D.*choose another layout$"):
            export(tmp_path / "in", "gptq", tmp_path / "out", requantize=allowed, verify=False)
    export(tmp_path / "in", "native", tmp_path / "out", verify=False)


def test_bad_arguments_are_refused(made, tmp_path):
    from tiny import save_tiny

    save_tiny("llama", tmp_path / "plain")
    with pytest.raises(InputError, match="holds no quantized weights"):
        export(tmp_path / "plain", "gptq", tmp_path / "out")
    with pytest.raises(InputError, match=r"no layout 'exl2'.*gguf"):
        export(made / "int4", "exl2", tmp_path / "out")
    with pytest.raises(InputError, match="holds something already"):
        export(made / "int4", "gptq", tmp_path / "plain")
    for text in ("five", "0GB", "5TB!", "-1GB", "900"):
        with pytest.raises(InputError, match="is no size"):
            size_of(text)
    assert [size_of(t) for t in ("5GB", "1.5GiB", "2 mb")] == [5 * 10**9, 3 * 2**29, 2 * 10**6]


def test_damaged_steps_are_refused(made, tmp_path):
    save_quantized("llama", tmp_path / "in", INT4)
    file, name = tmp_path / "in" / "model.safetensors", "model.layers.0.mlp.up_proj.scale"
    tensors = load_file(file)
    tensors[name][3, 1] = float("nan")
    save_tensors(file, tensors)
    with pytest.raises(InputError, match=r"1 steps of model.layers.0.mlp.up_proj are NaN"):
        export(tmp_path / "in", "gptq", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    tensors[name][3, 1] = 0
    save_tensors(file, tensors)
    done = export(tmp_path / "in", "gptq", tmp_path / "out", verify=False)
    assert any("1 steps are 0" in text for text in done.caveats)


def test_a_fresh_process_with_transformers_alone_gives_our_logits(tmp_path):
    save_quantized("llama", tmp_path / "in", INT4)
    done = export(tmp_path / "in", "compressed-tensors", tmp_path / "ct")
    assert done.seen.difference < 1e-5
    assert max(layer.change for layer in done.layers) == 0


def test_only_a_missing_package_excuses_a_client(tmp_path, monkeypatch):
    save_quantized("llama", tmp_path / "in", INT4)
    for script, words in (
        ("raise ImportError('Loading a GPTQ model requires optimum')", None),
        ("raise ValueError('no such key')", r"cannot load the exported checkpoint \(ValueError: no such key"),
        ("import sys, torch; torch.save(torch.randn(1, 24, 288), sys.argv[3])", "gives other logits"),
        ("import sys, torch; torch.save(torch.full((1, 24, 288), torch.nan), sys.argv[3])", "other logits"),
    ):
        monkeypatch.setattr(client, "SCRIPT", script)
        if words is None:
            seen = client.look(tmp_path / "in", "gptq")
            assert (seen.difference, seen.why) == (None, "Loading a GPTQ model requires optimum")
        else:
            with pytest.raises(InputError, match=words):
                client.look(tmp_path / "in", "gptq")


def test_other_logits_than_ours_stop_an_export(tmp_path, monkeypatch):
    """A defect of packing is found before anything is published."""
    save_quantized("llama", tmp_path / "in", INT4)

    def swapped(module, q, activation=None):
        return true(module, replace(q, codes=q.codes.flip(1)))

    true = compressed_tensors.to_dict
    monkeypatch.setattr(compressed_tensors, "to_dict", swapped)
    with pytest.raises(InputError, match="q_proj does not read back as it was"):
        export(tmp_path / "in", "compressed-tensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
