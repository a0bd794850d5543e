"""An order of hidden channels: folded into all that produces them, and what it is good for."""

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.format import Stats
from fewbit.format.named import progressive
from fewbit.seams.order import OrderSeam, find_orders, fold_order, fold_order_checked
from fewbit.seams.rotation import block_calls
from fewbit.seams.trial import change, first
from fewbit.transform import Permute

GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
FOUND = {
    "llama": GATED, "qwen2": GATED, "qwen3": GATED, "gemma3": GATED, "opt": (("fc1",), "fc2"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
}  # fmt: skip


def first_block(arch):
    _, block, call = next(iter(block_calls(tiny(arch), tiny_ids())))
    return block, call


@pytest.mark.parametrize("arch", FOUND)
@torch.no_grad()
def test_an_order_is_folded_and_the_output_stays(arch):
    block, call = first_block(arch)
    (seam,) = find_orders(block, call)
    assert (seam.producers, seam.reader) == FOUND[arch]
    seen = []
    see = block.get_submodule(seam.reader).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    before = first(call())
    size = seen[-1].flatten(0, -2).abs().amax(0)
    order = Permute()((), Stats(low=-size, high=size))
    assert fold_order_checked(block, call, seam, order, torch.float32) == ""
    assert change(before, first(call())) < 1e-5
    see.remove()
    moved = seen[-1].flatten(0, -2).abs().amax(0)
    assert (moved.diff() <= 1e-6).all()  # sorted
    assert not (size.diff() <= 1e-6).all()


@torch.no_grad()
def test_a_fold_is_undone_exactly_and_a_wrong_one_named():
    block, call = first_block("qwen2")
    before = {n: p.clone() for n, p in block.named_parameters()}
    wrong = OrderSeam(producers=("mlp.up_proj",), reader="mlp.down_proj")
    order = torch.arange(128).flip(0)
    said = fold_order_checked(block, call, wrong, order, torch.float32)
    assert "the order of the inputs of mlp.down_proj was not folded: it changed the output" in said
    attention = OrderSeam(producers=("self_attn.q_proj",), reader="self_attn.o_proj")
    undo = fold_order(block, attention, torch.arange(64).flip(0))
    assert not torch.equal(before["self_attn.q_proj.bias"], block.self_attn.q_proj.bias)
    undo()
    assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


def test_salient_columns_that_share_groups_lower_the_error_of_the_output():
    """Columns with large inputs hold small weights, as smoothing leaves them: wide neighbours cost them."""
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 1, 256)[torch.randperm(256, generator=g)]
    w, x = torch.randn(64, 256, generator=g) / size, torch.randn(512, 256, generator=g) * size
    order = Permute()((), Stats(low=-size, high=size))
    fmt = progressive(group=32)

    def error(w, x):
        return float(((fmt.quantize(w).dequantize() - w) @ x.t()).square().sum())

    assert error(w[:, order], x[:, order]) < 0.5 * error(w, x)
