"""Claims: the skeleton with its weights is the model of from_pretrained; without them it holds nothing."""

import json

import pytest
import torch
from tiny import ARCHITECTURES, LAYERS, save_tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.io.skeleton import build_skeleton, dematerialize, materialize, parameter_map
from fewbit.io.source import open_source


def logits(model):
    with torch.no_grad():
        out = model(tiny_ids())
    return out.logits if "logits" in out else out.last_hidden_state


def filled(folder):
    """The skeleton of a folder with everything materialized, and its map."""
    source = open_source(folder)
    model = build_skeleton(source)
    mapping, unused = parameter_map(source, model)
    materialize(model, mapping, source, mapping, "cpu", torch.float32)
    return model, mapping, unused


def rewrite(folder, rename, keep=lambda name: True):
    """Save the weights of a one-file checkpoint again under other names."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({rename(n): t for n, t in tensors.items() if keep(n)}, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_filled_skeleton_is_the_pretrained_model(arch, shard, tmp_path):
    saved = save_tiny(arch, tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    reference = type(saved).from_pretrained(tmp_path).eval()
    model, mapping, unused = filled(tmp_path)
    assert type(model) is type(saved)
    assert not model.training
    assert unused == ()
    assert set(mapping) == set(model.state_dict())
    assert torch.equal(logits(model), logits(reference))
    assert torch.equal(logits(model), logits(saved))
    buffers = dict(reference.named_buffers())
    assert set(dict(model.named_buffers())) == set(buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_skeleton_holds_no_weight_and_all_buffers(arch, tmp_path):
    save_tiny(arch, tmp_path)
    state = torch.get_rng_state()
    model = build_skeleton(open_source(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.nn.Linear(2, 2).weight.is_meta  # the constructor's hook is gone


@pytest.mark.parametrize(("arch", "base"), [("gpt2", "transformer"), ("llama", "model")])
def test_base_model_file_without_prefix(arch, base, tmp_path):
    """Hub GPT-2 is such a file: saved from the base model, with a config that names the full one."""
    saved = save_tiny(arch, tmp_path)
    getattr(saved, base).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[type(saved).__name__])
    model, mapping, _ = filled(tmp_path)
    assert type(model) is type(saved)
    assert not any(stored.startswith(base + ".") for stored in mapping.values())
    assert torch.equal(logits(model), logits(saved))


def test_bert_file_without_prefix(tmp_path):
    saved = save_tiny("bert", tmp_path)
    rewrite(tmp_path, lambda n: n.removeprefix("bert."))
    model, mapping, _ = filled(tmp_path)
    assert mapping["bert.encoder.layer.0.output.dense.weight"] == "encoder.layer.0.output.dense.weight"
    assert torch.equal(logits(model), logits(saved))


def test_file_with_a_prefix_that_the_base_model_lacks(tmp_path):
    from transformers import BertModel

    saved = save_tiny("bert", tmp_path)
    edit_config(tmp_path, architectures=["BertModel"])
    rewrite(tmp_path, lambda n: n, keep=lambda n: "bert." in n)
    with pytest.raises(InputError, match=r"pooler\.dense"):  # masked LM files have no pooler
        filled(tmp_path)
    base = BertModel(saved.config).eval()
    base.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda n: "bert." + n)
    model, mapping, unused = filled(tmp_path)
    assert mapping["pooler.dense.weight"] == "bert.pooler.dense.weight"
    assert unused == ()
    assert torch.equal(logits(model), logits(base))


def test_legacy_norm_names(tmp_path):
    saved = save_tiny("bert", tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name):
        for new, legacy in old.items():
            name = name.replace(new, legacy)
        return name

    rewrite(tmp_path, rename)
    model, mapping, _ = filled(tmp_path)
    assert mapping["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert torch.equal(logits(model), logits(saved))


def test_tensors_that_nothing_uses_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "stray.weight": torch.ones(2)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    _, mapping, unused = filled(tmp_path)
    assert sorted(unused) == sorted(extra)
    assert not set(extra) & set(mapping.values())


def test_missing_and_misshapen_parameters_are_named(tmp_path):
    save_tiny("llama", tmp_path)
    rewrite(tmp_path, lambda n: n, keep=lambda n: "layers.1.mlp.up_proj" not in n)
    with pytest.raises(InputError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        filled(tmp_path)
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, intermediate_size=96)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight with shape \[64, 128\].* \[64, 96\]"):
        filled(tmp_path)


def test_tied_parameters_stored_twice(tmp_path):
    """The same values twice are one tensor; different values are refused."""
    from safetensors.torch import load_file, save_file

    saved = save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    model, mapping, unused = filled(tmp_path)
    assert mapping["lm_head.weight"] == mapping["model.embed_tokens.weight"]
    assert len(unused) == 1
    assert torch.equal(logits(model), logits(saved))
    save_file(tensors | {"lm_head.weight": head + 1}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="tie_word_embeddings"):
        filled(tmp_path)


def test_tied_parameters_come_and_go_together(tmp_path):
    save_tiny("llama", tmp_path)
    source = open_source(tmp_path)
    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    materialize(model, ["lm_head.weight"], source, mapping, "cpu", torch.float32)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert not model.lm_head.weight.is_meta
    dematerialize(model.model.embed_tokens)
    assert model.lm_head.weight.is_meta
    # also after somebody replaced one of the two by a parameter of its own
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
    materialize(model, ["model.embed_tokens.weight"], source, mapping, "cpu", torch.float32)
    assert model.model.embed_tokens.weight is model.lm_head.weight


def test_block_in_and_out_touches_that_block_alone_and_reads_once(tmp_path):
    saved = save_tiny("qwen3", tmp_path)
    source = open_source(tmp_path)
    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    calls = []
    read = source.read
    source.read = lambda names: calls.append(list(names)) or read(calls[-1])
    block = [n for n in mapping if n.startswith("model.layers.1.")]
    materialize(model, block, source, mapping, "cpu", torch.bfloat16)
    assert len(calls) == 1
    here = {n for n, p in model.named_parameters() if not p.is_meta}
    assert here == set(block)
    for name in block:
        assert torch.equal(model.get_parameter(name), saved.get_parameter(name).bfloat16())
    dematerialize(model.model.layers[LAYERS - 1])
    assert all(p.is_meta for p in model.parameters())
    materialize(model, mapping, source, mapping, "cpu", torch.float32)
    assert torch.equal(logits(model), logits(saved))


def test_persistent_buffers_are_read_in_their_own_kind(tmp_path):
    """A persistent integer buffer is read and keeps its dtype; a float one is cast."""
    save_tiny("llama", tmp_path)
    source = open_source(tmp_path)
    model = build_skeleton(source)
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("gain", torch.zeros(3))
    model.register_buffer("own", torch.full((3,), 7.0))
    from safetensors.torch import load_file, save_file

    extra = {"steps": torch.tensor([1, 2, 3]), "gain": torch.tensor([0.5, 1.5, 2.5])}
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    source = open_source(tmp_path)
    mapping, unused = parameter_map(source, model)
    assert unused == ()
    materialize(model, ["steps", "gain"], source, mapping, "cpu", torch.bfloat16)
    assert torch.equal(model.steps, extra["steps"])
    assert torch.equal(model.gain, extra["gain"].bfloat16())
    assert torch.equal(model.own, torch.full((3,), 7.0))


def test_custom_class_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    edit_config(
        tmp_path, architectures=["OddForCausalLM"], auto_map={"AutoModelForCausalLM": "odd.OddForCausalLM"}
    )
    with pytest.raises(InputError, match=r"custom code.*OddForCausalLM"):
        build_skeleton(open_source(tmp_path))
    edit_config(tmp_path, architectures=None, auto_map=None)
    assert type(build_skeleton(open_source(tmp_path))).__name__ == "LlamaForCausalLM"
