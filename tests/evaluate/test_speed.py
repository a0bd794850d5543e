"""Speed counts what it ran; size counts each weight once."""

import json

import pytest
import torch
from tiny import save_tiny, tiny, tiny_tokenizer

from fewbit.errors import InputError
from fewbit.evaluate.speed import INDEX, size_bytes, tokens_per_second


class Watched(torch.nn.Module):
    """Passes everything on and keeps the lengths of what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lengths = model, []

    def forward(self, input_ids, **keywords):
        self.lengths.append((input_ids.shape[1], "past_key_values" in keywords))
        return self.model(input_ids=input_ids, **keywords)


def test_the_prompt_is_read_once_and_each_new_token_goes_through_the_cache():
    model, tokenizer = Watched(tiny("llama")), tiny_tokenizer()
    n = len(tokenizer("the cat sat")["input_ids"])
    speed = tokens_per_second(model, tokenizer, "the cat sat", new_tokens=3)
    # The first forward warms up and is not timed.
    assert model.lengths == [(n, False), (n, False), (1, True), (1, True), (1, True)]
    assert (speed.prompt_tokens, speed.new_tokens) == (n, 3)
    assert speed.prefill > 0
    assert speed.decode > 0


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(InputError, match="new_tokens is 0"):
        tokens_per_second(tiny("llama"), tiny_tokenizer(), "a", new_tokens=0)
    with pytest.raises(InputError, match="the prompt '' has no tokens"):
        tokens_per_second(tiny("llama"), tiny_tokenizer(), "")
    with pytest.raises(InputError, match="BertForMaskedLM keeps no key/value cache"):
        tokens_per_second(tiny("bert"), tiny_tokenizer(), "abc", new_tokens=1)


def test_size_is_that_of_the_weights_whether_in_one_file_or_in_shards(tmp_path):
    model = save_tiny("llama", tmp_path / "one")
    save_tiny("llama", tmp_path / "many", max_shard_size="50KB")
    assert (tmp_path / "many" / INDEX).exists()
    weights = sum(weight.nbytes for weight in model.parameters())
    for name in ("one", "many"):
        # Each file adds a header of names and shapes, and nothing else.
        assert weights < size_bytes(tmp_path / name) < weights + 8_000


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path):
    save_tiny("llama", tmp_path, max_shard_size="50KB")
    size = size_bytes(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "model.gguf").write_bytes(b"x" * 100)
    assert size_bytes(tmp_path) == size
    assert size_bytes(tmp_path / "model.gguf") == size_bytes(str(tmp_path / "model.gguf")) == 100


def test_weights_without_an_index_are_found(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"x" * 10)
    assert size_bytes(tmp_path) == 10
    (tmp_path / "a.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 30)
    assert size_bytes(tmp_path) == 50


def test_a_folder_without_its_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no weight files"):
        size_bytes(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"lacks gone\.safetensors"):
        size_bytes(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": ')
    with pytest.raises(InputError, match="is no index of shards"):
        size_bytes(tmp_path)
