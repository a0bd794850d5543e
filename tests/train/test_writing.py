"""A model writes text of its own as the paper says, whatever its architecture and attention."""

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.train import sample_text
from fewbit.train.writing import shared_heads


def test_text_begins_at_random_goes_on_by_the_largest_probability_and_then_by_chance():
    model = tiny("llama")
    seeded = lambda s: torch.Generator().manual_seed(s)  # noqa: E731
    ids = sample_text(model, 6, 24, generator=seeded(0))
    assert ids.shape == (6, 24)
    assert torch.equal(ids, sample_text(model, 6, 24, generator=seeded(0)))
    assert len(ids[:, 0].unique()) > 3
    with torch.no_grad():
        best = model(input_ids=ids).logits.argmax(-1)
    likeliest = best[:, :-1] == ids[:, 1:]
    assert likeliest[:, :3].all()  # the cache gives what a forward over the whole row gives
    assert likeliest[:, 5:].float().mean() < 0.5
    other = sample_text(model, 6, 24, generator=seeded(1), greedy=(23, 23))
    with torch.no_grad():
        assert torch.equal(model(input_ids=other).logits.argmax(-1)[:, :-1], other[:, 1:])


def test_prompts_are_gone_on_from_and_a_new_text_follows_an_end():
    model, prompts = tiny("llama"), torch.arange(12).view(3, 4)
    ids = sample_text(model, 3, 9, prompts=prompts, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, :4], prompts)
    vocabulary = tuple(range(model.config.vocab_size))
    every = sample_text(model, 64, 4, generator=torch.Generator().manual_seed(0), ends=vocabulary)
    assert len(every[:, 2].unique()) > 20  # each token ends a text: all are drawn from the vocabulary
    with pytest.raises(InputError, match="nothing to write"):
        sample_text(model, 3, 4, prompts=prompts)


def test_a_sharp_temperature_is_greedy():
    ids = [
        sample_text(tiny("llama"), 2, 12, generator=torch.Generator().manual_seed(3), **how)
        for how in ({"temperature": 1e-6}, {"greedy": (11, 11)})
    ]
    assert torch.equal(*ids)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "falcon", "mixtral", "deepseek_v3"])
def test_greedy_text_is_that_of_generate(arch):
    model = tiny(arch)
    prompts = tiny_ids()[:, :5]
    ids = sample_text(model, len(prompts), 20, prompts=prompts, temperature=1e-6)
    want = model.generate(prompts, max_new_tokens=15, do_sample=False, eos_token_id=None)
    assert torch.equal(ids, want)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral", "gpt2"])
def test_query_heads_that_share_a_key_attend_as_ever(arch):
    """Logits of a first pass, of a next token and of fixed shapes; the model's attention comes back after."""
    from transformers import DynamicCache, StaticCache

    model, ids = tiny(arch), tiny_ids()
    found = []
    for _ in range(2):
        with torch.no_grad(), shared_heads(model) if found else torch.no_grad():
            assert (model.config._attn_implementation == "sdpa") == (not found)
            part = [model(input_ids=ids).logits]
            for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=40)):
                part.append(model(input_ids=ids[:, :7], past_key_values=cache).logits)
                part.append(model(input_ids=ids[:, 7:8], past_key_values=cache).logits)
        found.append(part)
    assert model.config._attn_implementation == "sdpa"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_writes_what_plain_steps_write():
    model, prompts = tiny("llama").cuda(), tiny_ids()[:, :5]
    ids = sample_text(model, len(prompts), 40, prompts=prompts.cuda(), temperature=1e-6)
    want = model.generate(prompts.cuda(), max_new_tokens=35, do_sample=False, eos_token_id=None)
    assert torch.equal(ids, want)
    drawn = sample_text(model, 64, 40, generator=torch.Generator("cuda").manual_seed(0))
    assert len(drawn[:, -1].unique()) > 20  # every replay draws anew
    assert torch.equal(drawn, sample_text(model, 64, 40, generator=torch.Generator("cuda").manual_seed(0)))
