"""Windows in chunks: a float cache changes nothing, a quantized one is read, no cache is refused."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.evaluate.perplexity import Protocol, evaluate
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache


def run(model, chunk, kv=None, **keywords):
    cache = None if kv is None else lambda: QuantizedCache(model.config, kv_format(kv))
    ids, protocol = tiny_ids(batch=3, length=48), Protocol(window=48, chunk=chunk)
    return evaluate(model, ids, protocol, cache=cache, **keywords)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_a_float_cache_changes_nothing(arch, chunk):
    model = tiny(arch)
    whole, parts = run(model, None), run(model, chunk)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5)
    assert (whole.cache_bytes, whole.chunk, parts.chunk) == (None, None, chunk)
    assert parts.cache_bytes > 0


def test_one_chunk_never_reads_what_is_stored_and_more_do():
    model = tiny("llama")
    exact = run(model, None, against=model)
    assert run(model, 48, "int2-token", against=model).nll == pytest.approx(exact.nll, rel=1e-6)
    kl = {kv: run(model, 8, kv, against=model).kl for kv in ("int8-token", "int4-token", "int2-token")}
    assert 1e-8 < kl["int8-token"] < kl["int4-token"] < kl["int2-token"]
    # each window has a cache of its own: 2 layers of 2 heads of 16
    held = run(model, 8, "int4-token").cache_bytes
    assert held == 2 * kv_format("int4-token").nbytes(1, 2, 48, 16, torch.float32)


def test_a_cache_that_would_not_be_read_is_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="never reads a cache: give the protocol a chunk"):
        run(model, None, "kivi4")
    with pytest.raises(InputError, match="BertForMaskedLM sees both sides and has no cache"):
        run(tiny("bert"), 8, against=tiny("bert"))
    with pytest.raises(InputError, match="the chunk is 49: expected 1 to 48 tokens"):
        run(model, 49)

    def table(input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 288))

    with pytest.raises(InputError, match="function keeps no cache: leave the chunk out"):
        run(table, 8)
