"""A suspended forward computes what a plain one does, bit for bit, and its groups are the ones that share
an input.
"""

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from fewbit.errors import InputError
from fewbit.stream.blocks import find_blocks, linears, set_weight, watch, weight_of
from fewbit.stream.suspend import Flow, advance, wait


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_suspending_at_every_block_and_linear_changes_no_bit(arch):
    model = tiny(arch)
    ids = [torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    plain = [model(i, use_cache=False).logits for i in ids]
    blocks = find_blocks(model)
    hooked = [*blocks.modules, *(m for b in blocks.modules for m in linears(b).values())]
    handles = [m.register_forward_pre_hook(wait, with_kwargs=True) for m in hooked]
    flows = [Flow(lambda i=i: model(i, use_cache=False).logits) for i in ids]
    stops = 0
    while not all(f.dead for f in flows):  # all flows take one step in turn: their stacks interleave
        for flow in flows:
            if not flow.dead:
                stops += flow.resume() is not None
    for h in handles:
        h.remove()
    assert stops == len(ids) * len(hooked)
    assert all(torch.equal(f.result, p) for f, p in zip(flows, plain, strict=True))


GROUPS = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bert": ["query key value", "dense", "dense", "dense"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@pytest.mark.parametrize("arch", GROUPS)
@torch.no_grad()
def test_groups_are_the_linears_that_share_an_input(arch):
    model = tiny(arch)
    block = find_blocks(model).modules[0]
    ids = torch.arange(8)[None]
    groups = watch(block, lambda: model(ids, use_cache=False))
    assert [" ".join(n.split(".")[-1] for n in g) for g in groups] == GROUPS[arch]


def test_conv1d_weights_are_seen_as_out_by_in():
    conv = next(m for n, m in linears(tiny("gpt2")).items() if n.endswith("c_fc"))
    w = weight_of(conv).detach().clone()
    assert w.shape == (128, 64)
    set_weight(conv, w + 1)
    torch.testing.assert_close(conv.weight.t(), w + 1)


def test_exceptions_of_a_forward_surface_and_abandoning_frees_it():
    def broken():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        Flow(broken).resume()
    model = tiny("llama")
    block = find_blocks(model).modules[1]
    handle = block.register_forward_pre_hook(wait, with_kwargs=True)
    flow = Flow(lambda: model(torch.arange(4)[None]).logits)
    assert flow.resume().module is block
    flow.abandon()
    assert flow.dead
    handle.remove()
    model(torch.arange(4)[None])  # hooks do nothing outside a flow


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="no repeated blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_a_forward_that_never_reaches_the_module_is_an_error():
    model = tiny("llama")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="not called in their order"):
        advance([Flow(lambda: model(torch.arange(4)[None]).logits)], other)
