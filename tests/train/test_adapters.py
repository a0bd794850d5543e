"""Adapters of peft on codes: only they learn, and merged they compute the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import tiny, tiny_ids
from torch import nn

import fewbit
from fewbit.errors import InputError
from fewbit.format import DOUBLE_QUANT, Format, Group
from fewbit.grid import by_name
from fewbit.io.attached import make_saveable
from fewbit.nn import QLinear
from fewbit.recipe import Recipe, Rule, higgs, rtn
from fewbit.train import add_adapters, convert, merge_adapters, prepare

NF4 = Recipe(
    name="nf4", rules=(Rule(weight=Format(grid=by_name("nf4"), block=Group(64), scale=DOUBLE_QUANT)),)
)
IDS = {"input_ids": tiny_ids()}
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def quantized(rules=None):
    return convert(prepare(tiny("llama"), rules or NF4))


def learn(model, steps: int = 8) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_learn_on_nf4_and_nothing_else_moves():
    model = quantized()
    codes = {n: m.codes.clone() for n, m in model.named_modules() if isinstance(m, QLinear)}
    with torch.no_grad():
        before = model(**IDS).logits
    peft = add_adapters(model, LoraConfig(**CONFIG))
    assert all("lora_" in name for name, p in peft.named_parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.equal(peft(**IDS).logits, before)  # B begins at 0
    losses = learn(peft.train())
    assert losses[-1] < losses[0] - 0.3
    kept = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert all(torch.equal(kept[name].codes, c) for name, c in codes.items())


def test_merged_they_compute_what_they_did_beside_the_codes():
    peft = add_adapters(quantized(), LoraConfig(**CONFIG))
    learn(peft.train())
    with torch.no_grad():
        want = peft.eval()(**IDS).logits
        merged = merge_adapters(peft)
        torch.testing.assert_close(merged(**IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(merged.model.layers[0].self_attn.k_proj, QLinear)


def test_adapters_are_saved_beside_the_quantized_checkpoint_and_read_back(tmp_path):
    model = quantized()
    make_saveable(model).save_pretrained(tmp_path / "base")
    peft = add_adapters(model, LoraConfig(**CONFIG))
    learn(peft.train(), 3)
    peft.save_pretrained(tmp_path / "adapter")
    again = add_adapters(fewbit.load(tmp_path / "base"), LoraConfig(**CONFIG))
    again.load_adapter(tmp_path / "adapter", "default")
    with torch.no_grad():
        assert torch.equal(again.eval()(**IDS).logits, peft.eval()(**IDS).logits)
    assert isinstance(again, PeftModel)


@pytest.mark.parametrize(
    "rules", [NF4, higgs(bits=4), fewbit.recipes.w8a8(), rtn(bits=4, group_size=32)], ids=lambda r: r.name
)
def test_gradients_pass_a_quantized_layer_as_they_pass_its_decoded_weight(rules):
    """Bases and quantized inputs as well: those straight through."""
    layer = quantized(rules).model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x.detach()))
        whole = layer(torch.eye(64)) if layer.activation is None else layer.qweight.dequantize().t()
    dy = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ whole.t(), rtol=1e-4, atol=1e-4)


def test_merging_in_place_is_refused_with_the_way_that_works():
    peft = add_adapters(quantized(), LoraConfig(**CONFIG))
    with pytest.raises(InputError, match="merge_adapters"):
        peft.merge_adapter()
    spread = add_adapters(quantized(higgs(bits=4)), LoraConfig(**CONFIG))
    with pytest.raises(InputError, match="keep its adapters"):
        merge_adapters(spread)
