"""A GPU runs blocks in bfloat16: what is found and folded there is what float32 finds and folds."""

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.seams import find_seams, fold_checked
from fewbit.seams.order import find_orders, fold_order_checked
from fewbit.seams.rotation import block_calls
from fewbit.seams.shift import takes_shift
from fewbit.seams.trial import change, first

DTYPES = torch.float32, torch.bfloat16


def block_of(arch, dtype):
    _, block, call = next(iter(block_calls(tiny(arch).to(dtype), tiny_ids())))
    return block, call


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gemma3"])
@torch.no_grad()
def test_scales_and_orders_are_folded_in_half_precision(arch):
    """The choice is float32, and no power of 2, so the block's output moves by its rounding."""
    found = [[(s.kind, s.producer, s.readers) for s in find_seams(*block_of(arch, t))] for t in DTYPES]
    assert found[0] == found[1] != []
    block, call = block_of(arch, torch.bfloat16)
    before = first(call())
    for seam in find_seams(block, call):
        width = len(block.get_submodule(seam.producer).weight) if seam.index is None else 64
        s = 1 + torch.rand(width, generator=torch.Generator().manual_seed(0))
        assert (
            fold_checked(block, call, seam, s if seam.index is None else s[seam.index], torch.bfloat16) == ""
        )
    assert 0 < change(before, first(call())) < 0.05
    orders = find_orders(block, call)
    assert orders == find_orders(*block_of(arch, torch.float32)) != []
    for seam in orders:
        order = torch.arange(128).flip(0)
        assert fold_order_checked(block, call, seam, order, torch.bfloat16) == ""


@torch.no_grad()
def test_a_wrong_fold_is_refused_in_half_precision_as_well():
    block, call = block_of("llama", torch.bfloat16)
    seam = next(s for s in find_seams(block, call) if "input_layernorm" in s.producer)
    wrong = type(seam)(kind=seam.kind, producer=seam.producer, readers=seam.readers[:1])
    s = 1 + torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert "was not folded: it changed the output" in fold_checked(block, call, wrong, s, torch.bfloat16)


@torch.no_grad()
def test_shifts_are_found_in_half_precision():
    blocks = [block_of("opt", dtype) for dtype in DTYPES]
    found = [[takes_shift(*own, s) for s in find_seams(*own)] for own in blocks]
    assert found[0] == found[1]
    assert sum(found[0]) == 3
