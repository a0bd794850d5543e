"""Claims: ``load`` of a GGUF runs on its codes, like any checkpoint; dequantized only when that is asked."""

import pytest
import torch
from quantized import save_quantized
from tiny import tiny_ids
from torch import nn

import fewbit
from fewbit.errors import InputError
from fewbit.format import FORMATS
from fewbit.io.gguf_write import write
from fewbit.io.load import load
from fewbit.io.source import open_source
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.linear import QLinear
from fewbit.recipe import Recipe, Rule, named


def logits(model):
    with torch.no_grad():
        return model(tiny_ids(length=16)).logits


def kinds(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_linears_run_on_their_codes(arch, tmp_path):
    save_quantized(arch, tmp_path / "q", FORMATS["q4_0"])
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    model, plain = load(tmp_path / "m.gguf"), load(tmp_path / "m.gguf", dequantize=True)
    assert kinds(model).count(QLinear) == 14
    assert QLinear not in kinds(plain)
    assert torch.equal(logits(model), logits(plain))
    held = sum(b.nbytes for m in model.modules() if isinstance(m, QLinear) for b in m.buffers())
    wide = sum(
        m.weight.nbytes for n, m in plain.named_modules() if isinstance(m, nn.Linear) and "layers" in n
    )
    assert held < 0.3 * wide  # one byte a code where it was four


def test_a_quantized_table_and_the_head_tied_to_it_are_one_weight(folders, tmp_path):
    write(open_source(folders / "llama"), tmp_path / "m.gguf", embeddings="q8_0")
    model, plain = load(tmp_path / "m.gguf"), load(tmp_path / "m.gguf", dequantize=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QEmbedding)
    assert isinstance(head, QLinear)
    assert table.qweight.codes.data_ptr() == head.qweight.codes.data_ptr()
    assert torch.equal(logits(model), logits(plain))


def test_what_is_not_quantized_stays_a_linear(folders, tmp_path):
    recipe = Recipe(name="mlp", rules=(Rule(match="*mlp*", weight=FORMATS["q8_0"]),))
    fewbit.quantize(folders / "llama", recipe, output=tmp_path / "q", read_back=False)
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    assert kinds(model).count(QLinear) == 6
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear


def test_saved_again_it_is_a_native_checkpoint(tmp_path):
    save_quantized("llama", tmp_path / "q", FORMATS["q5_1"])
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    model.save_pretrained(tmp_path / "again")
    back = open_source(tmp_path / "again")
    assert set(back.formats.values()) == {FORMATS["q5_1"]}
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_other_layouts_dequantize_too_unless_they_compute_more(folders, tmp_path):
    save_quantized("llama", tmp_path / "q", FORMATS["nf4"])
    assert QLinear not in kinds(load(tmp_path / "q", dequantize=True))
    assert torch.equal(logits(load(tmp_path / "q", dequantize=True)), logits(load(tmp_path / "q")))
    fewbit.quantize(folders / "llama", named("w8a8", {}), output=tmp_path / "w8a8", read_back=False)
    with pytest.raises(InputError, match="rounds or maps its input at every call"):
        load(tmp_path / "w8a8", dequantize=True)
