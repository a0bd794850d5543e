"""A checkpoint is a Source of the original names, loads as a model, and is written whole or not at all."""

import json
import resource
from itertools import cycle

import pytest
import torch
from quantized import FORMATS, copy_with_config, int_format, linears_of, save_quantized
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ARCHITECTURES, save_tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.format import BF16, DOUBLE_QUANT, FP16, Channel, Format, Group
from fewbit.grid import by_name
from fewbit.io import compressed_tensors, native
from fewbit.io.checkpoint import Checkpoint, save_tensors
from fewbit.io.load import load
from fewbit.io.source import SafetensorsSource, open_source
from fewbit.nn import QLinear

NESTED = Format(grid=by_name("nf4"), block=Group(32), scale=DOUBLE_QUANT)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


# -- as a source --


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("layout", [native, compressed_tensors], ids=["native", "compressed-tensors"])
def test_a_checkpoint_presents_the_original_names_shapes_and_dequantized_values(arch, layout, tmp_path):
    if arch == "gpt2" and layout is compressed_tensors:
        arch = "opt"  # Conv1D is refused there
    fmt = int_format(3, asymmetric=True, block=Channel(), scale=FP16)
    model = save_quantized(arch, tmp_path / "q", fmt, layout)
    save_tiny(arch, tmp_path / "plain")
    source, plain = open_source(tmp_path / "q"), open_source(tmp_path / "plain")
    assert isinstance(source, Checkpoint)
    assert type(plain) is SafetensorsSource
    assert {n: i.shape for n, i in source.tensors().items()} == {
        n: i.shape for n, i in plain.tensors().items()
    }
    read, state = source.read(source.tensors()), model.state_dict()
    for name, info in source.tensors().items():
        assert (tuple(read[name].shape), read[name].dtype, read[name].nbytes) == (
            info.shape,
            info.dtype,
            info.nbytes,
        )
        assert torch.equal(read[name], state[name])
    assert set(source.formats) == set(linears_of(model))
    assert not hasattr(source.config(), "quantization_config")
    assert source.dtype == torch.float32


def test_codes_are_read_as_they_were_written(tmp_path):
    kinds = cycle(FORMATS)
    formats = {}
    model = save_quantized("llama", tmp_path, lambda name: formats.setdefault(name, next(kinds)))
    source = open_source(tmp_path)
    assert source.formats == formats
    for name, module in linears_of(model).items():
        q = source.read_qtensor(name)
        assert q.format == formats[name]
        assert torch.equal(q.dequantize(), module.weight)
    with pytest.raises(KeyError):
        source.read_qtensor("lm_head")


def test_the_mean_bits_are_those_of_the_tensors(tmp_path):
    save_quantized("llama", tmp_path, lambda n: NESTED if "mlp" in n else int_format(3, scale=BF16))
    source = open_source(tmp_path)
    tensors = [source.read_qtensor(m) for m in source.formats]
    want = 8 * sum(q.nbytes for q in tensors) / sum(q.codes.numel() for q in tensors)
    assert source.bits_per_weight == pytest.approx(want, rel=1e-12)


def test_a_requantized_checkpoint_starts_from_its_own_values(tmp_path):
    """What consumes a Source consumes a checkpoint: its companions come along, the quantization does not."""
    save_quantized("llama", tmp_path / "q", int_format(4, scale=FP16))
    (tmp_path / "out").mkdir()
    source = open_source(tmp_path / "q")
    assert "config.json" in source.companions(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert source.tokenizer().vocab_size > 0


def test_other_quantization_methods_are_refused_by_name(tmp_path):
    save_quantized("llama", tmp_path / "q", int_format(4))
    other = copy_with_config(tmp_path / "q", tmp_path / "aqlm", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(InputError, match=r"quantized with 'aqlm', which is not read.*fewbit, compressed-t"):
        open_source(other)


def test_configurations_that_are_no_configuration_are_refused_in_words(tmp_path):
    save_quantized("llama", tmp_path / "q", int_format(4), compressed_tensors)
    group = {"targets": None, "weights": {"num_bits": 4}}
    for i, config in enumerate(
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": group}},
            {"quant_method": "compressed-tensors", "config_groups": {"a": group | {"targets": ["re:("]}}},
            {"quant_method": "compressed-tensors", "config_groups": [1]},
            {"quant_method": "fewbit", "version": 1, "formats": 3, "modules": []},
            {"quant_method": ["gptq"]},
        )
    ):
        folder = copy_with_config(tmp_path / "q", tmp_path / str(i), quantization_config=config)
        with pytest.raises(InputError, match=r"broken|is not read"):
            open_source(folder)


@pytest.mark.parametrize("layout", [native, compressed_tensors], ids=["native", "compressed-tensors"])
def test_a_missing_tensor_is_named(layout, tmp_path):
    save_quantized("llama", tmp_path, int_format(4, asymmetric=True), layout)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(n for n in tensors if n.endswith((".zero", ".weight_packed")))
    save_tensors(tmp_path / "model.safetensors", {n: t for n, t in tensors.items() if n != gone})
    with pytest.raises(InputError, match=f"no tensor {gone}"):
        open_source(tmp_path)


# -- as a model --


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_with_the_logits_of_its_dequantized_self(arch, tmp_path):
    model = save_quantized(arch, tmp_path, int_format(4, asymmetric=True, scale=FP16))
    loaded = load(tmp_path)
    assert not loaded.training
    assert {n for n, m in loaded.named_modules() if isinstance(m, QLinear)} == set(linears_of(model))
    assert torch.equal(logits(loaded), logits(model))


def test_every_layout_and_nesting_loads(tmp_path):
    for i, (fmt, layout) in enumerate(
        [(int_format(5, scale=BF16), compressed_tensors), (NESTED, native), (FORMATS[-1], native)]
    ):
        model = save_quantized("llama", tmp_path / str(i), fmt, layout)
        assert torch.equal(logits(load(tmp_path / str(i))), logits(model))


def test_plain_models_load_too(tmp_path):
    model = save_tiny("llama", tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_dtype_ties_and_generation_settings_are_kept(tmp_path):
    save_quantized("llama", tmp_path, int_format(4, scale=FP16))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True}))
    model = load(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.7
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.float16


def test_a_loaded_model_generates_what_its_dequantized_self_does(tmp_path):
    model = save_quantized("llama", tmp_path, int_format(4))
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        load(tmp_path).generate(tiny_ids(1), **settings), model.generate(tiny_ids(1), **settings)
    )


def test_a_loaded_model_saves_a_native_checkpoint_again(tmp_path):
    for i, (arch, fmt, layout) in enumerate(
        [("gpt2", NESTED, native), ("llama", int_format(3, asymmetric=True), compressed_tensors)]
    ):
        save_quantized(arch, tmp_path / f"a{i}", fmt, layout)
        loaded = load(tmp_path / f"a{i}")
        loaded.save_pretrained(tmp_path / f"b{i}")
        assert open_source(tmp_path / f"b{i}").quantization_config["quant_method"] == "fewbit"
        assert torch.equal(logits(load(tmp_path / f"b{i}")), logits(loaded))


# -- writing --


def test_saved_tensors_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6).view(2, 3).T, "y": torch.zeros(2, dtype=torch.bfloat16)}
    save_tensors(path, tensors, {"rows": "7"})
    back = load_file(path)
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "rows": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the write fails after 4 KiB
    try:
        with pytest.raises(InputError, match=r"a\.safetensors cannot be written .* free disk space"):
            save_tensors(path, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        save_tensors(tmp_path / "nowhere" / "a.safetensors", {"x": torch.ones(2)})
