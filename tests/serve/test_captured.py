"""A CUDA graph can hold what an engine calls: it reads no value, and nothing comes from the host.

Tensors without values (device meta) stand in for those of a GPU: to read one raises, any other tensor came
from the host.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewbit.io import inputs, native
from fewbit.io.native import Entry
from fewbit.recipe import named
from fewbit.serve.experts import PackedExpert, PackedExperts
from fewbit.serve.packed import PackedLinear, PlainLinear

SIDE = 256
RECIPES = {
    "int4 with offsets": ("rtn", {"group_size": "16", "symmetric": "false"}),
    "nf4 with steps in two levels": ("nf4", {}),
    "points in a random basis": ("higgs", {"bits": "3"}),
    "a trellis": ("qtip", {"state_bits": "8"}),
    "a lattice": ("quip-sharp", {}),
    "learned tables": ("kmeans", {}),
    "int8 inputs": ("w8a8", {}),
    "static int8 inputs": ("w8a8", {"input": "tensor", "static": "true"}),
    "int4 weights in two levels, int8 inputs": ("qoq", {}),
    "inputs whose outliers are left out": ("llm-int8", {}),
}


class OnlyThere(TorchDispatchMode):
    """Every tensor that an operator sees is on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert seen <= {"meta"}, f"{func} saw tensors on {seen}"
        return out


@pytest.fixture
def capturing(monkeypatch):
    """A stream is being captured, and tensors without values are on a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.is_meta))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def packed(recipe, settings):
    rule = named(recipe, settings).rules[0]
    weight, basis, maps = torch.randn(SIDE, SIDE), rule.basis, {}
    if basis is not None:
        maps = {"online": basis.input_map(SIDE), "output": basis.output_map(SIDE)}
        weight = basis.enter(weight)
    entry = Entry(format=rule.weight, shape=(SIDE, SIDE), activation=rule.input, **maps)
    stored = native.to_dict("", rule.weight.quantize(weight))
    if rule.input is not None and rule.input.static:
        stored |= inputs.to_dict("", rule.input.format.fit(torch.randn(9, SIDE)))
    return PackedLinear(entry, {name.removeprefix("."): t for name, t in stored.items()})


@pytest.mark.parametrize("name", RECIPES)
def test_a_captured_call_waits_for_nothing(name, capturing):
    torch.manual_seed(0)
    layer = packed(*RECIPES[name]).to("meta")
    x = torch.empty(5, SIDE, dtype=torch.float16, device="meta")
    layer(x)  # tables of the grids arrive, as they do when an engine warms up
    with OnlyThere():
        assert layer(x).shape == x.shape


def test_outside_a_graph_inputs_that_are_not_finite_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer = packed("w8a8", {})
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer(torch.full((2, SIDE), torch.nan))


def experts(count, hidden=32, inside=48):
    torch.manual_seed(0)
    plain = lambda m, n: PlainLinear(torch.randn(m, n) / n**0.5)  # noqa: E731
    silu = torch.nn.functional.silu
    return PackedExperts(
        [
            PackedExpert(plain(inside, hidden), plain(inside, hidden), plain(hidden, inside), silu)
            for _ in range(count)
        ]
    )


def test_captured_experts_are_all_asked_and_give_what_the_routed_ones_give(capturing):
    layer, x = experts(6), torch.randn(9, 32)
    ids = torch.rand(9, 6).argsort(1)[:, :2]
    weights = torch.rand(9, 2)
    want = layer(x, ids, weights)
    torch.testing.assert_close(layer.all_of_them(x, ids, weights), want, rtol=1e-5, atol=1e-6)
    there = [t.to("meta") for t in (x, ids, weights)]
    ran = []
    for expert in layer.to("meta").children():
        expert.register_forward_hook(lambda *_: ran.append(1))
    with OnlyThere():
        assert layer(*there).shape == x.shape
    assert len(ran) == 6
