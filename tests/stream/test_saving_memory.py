"""Claim: saving and exporting hold a shard, not the model, in real resident memory of a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_tokenizer

SCRIPT = Path(__file__).with_name("saving.py")
LIMIT = 8 * 10**6


def save(folder: Path, layers: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("saving")
    save(root / "small", 1)
    save(root / "model", 56)
    command = [sys.executable, str(SCRIPT), str(root), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["save", "export"])
def test_no_file_is_larger_than_a_shard(found, step):
    sizes = found[f"{step} shards"]
    assert len(sizes) > 15
    assert max(sizes) < LIMIT + found[f"{step} largest"] + 50_000  # names and places stand before the tensors
    assert sum(sizes) > 0.95 * found["weights"]


def test_memory_does_not_grow_by_the_result(found):
    """A byte to each weight. What saving adds (freed memory that is kept for the next block, and a block) is
    the same at a fifth of this depth; a process that held the result would add all of it.
    """
    assert found["save"] < 0.8 * found["weights"]
    assert found["export"] < found["weights"] / 8
