"""Keys and values in training are those that the cache gives back."""

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.nn.kvcache import KVFormat, kv_format
from fewbit.nn.kvlayer import QuantizedCache, QuantizedLayer, Steps
from fewbit.nn.kvsteps import calibrate
from fewbit.nn.kvstore import empty
from fewbit.train.kv import FakeKVLayer, fake_cache

IDS = tiny_ids()


@pytest.mark.parametrize(
    "name", ["int4-token", "int2-token", "fp8", "mxfp8", "int4-token-s4", "int8-tensor", "fp8-head"]
)
def test_training_reads_what_the_stores_give_back(name):
    kv = kv_format(name)
    model = tiny("llama")
    steps = calibrate(model, IDS, kv) if kv.static else Steps(key=(None,), value=(None,))
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 9, 64 if name == "mxfp8" else 16, generator=g) for _ in range(2))
    found = FakeKVLayer(kv, steps.key[0], steps.value[0]).update(k, v)
    for x, part, own, got in zip((k, v), kv.parts(), (steps.key[0], steps.value[0]), found, strict=True):
        assert torch.equal(got, empty(part, x, own).append(x).read())
        assert not torch.equal(got, x)


class ReadBack(QuantizedLayer):
    """A layer of the cache from which a token reads its own key as it is stored, too."""

    def update(self, key_states, value_states, *args, **keywords):
        super().update(key_states, value_states)
        return tuple(store.read() for store in self.stores)


def test_one_forward_gives_what_decoding_from_the_cache_gives_and_gradients_pass():
    model, kv = tiny("llama"), kv_format("int2-token")
    cache = QuantizedCache(model.config, kv)
    cache.layers = [ReadBack(kv) for _ in cache.layers]
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        decoded = torch.cat(
            [model(input_ids=t, past_key_values=cache, use_cache=True).logits for t in IDS.split(1, 1)], 1
        )
    undo = fake_cache(model, kv)
    got = model(input_ids=IDS).logits
    torch.testing.assert_close(got.detach(), decoded, rtol=1e-3, atol=1e-4)
    assert (plain - decoded).norm() > 1
    got.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    undo()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)


def test_training_under_it_makes_up_for_a_two_bit_cache():
    """Against the float model's own words, on the text that is learned."""
    model, kv = tiny("llama"), kv_format("int2-token")
    with torch.no_grad():
        target = model(input_ids=IDS).logits.log_softmax(-1)
    fake_cache(model, kv)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(15):
        q = model(input_ids=IDS).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(q, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_refusals_name_the_remedy():
    with pytest.raises(InputError, match="without a residual"):
        fake_cache(tiny("llama"), kv_format("kivi2"))
    with pytest.raises(InputError, match="find them with"):
        fake_cache(tiny("llama"), kv_format("fp8-tensor"))
    model = tiny("llama")
    fake_cache(model, KVFormat(key=kv_format("fp8").key, value=None))
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing"):
        model.train()(input_ids=IDS)
