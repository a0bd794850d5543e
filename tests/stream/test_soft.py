"""Tables of solved layers go on learning while their block is tuned."""

import pytest
import torch
from tiny import save_tiny

import fewbit
from fewbit.format import FP16, Channel, Clusters, Codebook, Format, value_of
from fewbit.grid import Learned
from fewbit.recipe import Recipe, Rule, named
from fewbit.solve.blocktune import BlockTuning, Soft
from fewbit.stream.data import Calibration
from fewbit.stream.quantize import quantize

FMT = Format(grid=Learned(2, 2), range=Clusters(), codebook=Codebook(block=Channel(), store=FP16))
CASES = (
    ("gptvq", "llama", "model.layers.1.self_attn.q_proj"),
    ("aqlm", "gpt2", "transformer.h.1.attn.c_attn"),
)
SETTINGS = {
    "gptvq": {"bits": "1", "overhead": "0.5", "basis": "hadamard"},
    "aqlm": {"entry_bits": "4", "epochs": "1", "iterations": "4"},
}


def test_a_weight_through_its_tables_has_their_gradient():
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    soft = Soft(q=FMT.quantize(w), place=lambda value: value)
    assert torch.equal(soft.weight(soft.tables), soft.q.dequantize())
    tables = soft.tables.requires_grad_()
    soft.weight(tables).sum().backward()
    count = torch.stack([(soft.q.codes == k).sum(1) for k in range(4)], 1)
    assert torch.equal(tables.grad, count.repeat_interleave(2, 1).float())
    moved = soft.moved(soft.tables + 0.25)
    assert torch.equal(moved.codes, soft.q.codes)
    torch.testing.assert_close(moved.dequantize(), soft.q.dequantize() + 0.25, rtol=1e-3, atol=1e-3)


def layer_of(folder, name):
    return fewbit.load(folder).get_submodule(name).qweight


@pytest.mark.parametrize(("name", "arch", "first"), CASES)
def test_tuned_tables_are_what_is_stored(tmp_path, name, arch, first):
    """The first group is solved as without tuning; then its tables move and its codes stay."""
    save_tiny(arch, tmp_path / "model")
    rules, calibration = named(name, SETTINGS[name]).rules, Calibration(samples=16, seqlen=32)
    rules = (Rule(weight=None, match="*.0.*"), *rules)
    tuning = BlockTuning(steps=24, batch=2, looks=4, lr=1e-3, lr_rest=2e-3)
    done = {}
    for folder, how in (("plain", None), ("tuned", tuning)):
        recipe = Recipe(name=name, rules=rules, tuning=how)
        done[folder] = quantize(tmp_path / "model", recipe, output=tmp_path / folder, calibration=calibration)
        assert done[folder].difference < 1e-4
    assert done["plain"].plan.bits_per_weight == done["tuned"].plan.bits_per_weight
    row = next(row for row in done["tuned"].rows if row.layer.endswith(first.rpartition(".")[2]))
    assert row.tuned_error < row.block_error
    plain, tuned = (layer_of(tmp_path / folder, first) for folder in done)
    assert (plain.codes == tuned.codes).float().mean() > 0.99
    assert not torch.equal(value_of(plain.table), value_of(tuned.table))
