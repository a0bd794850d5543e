"""Fixtures of the browser, and a tiny Llama with outliers in known channels."""

import pytest
import torch
from browser import chromium, visit
from tiny import tiny, tiny_tokenizer

from fewbit.inspect import look
from fewbit.stream.data import Calibration

__all__ = ["chromium", "visit"]
TEXT = Calibration(samples=4, seqlen=48)


def plant(model, channels=3, low=30.0, high=100.0):
    """Outliers in what norms hand on; what the model computes stays. Returns the channels by norm."""
    places, draw = {}, torch.Generator().manual_seed(3)
    factor = torch.linspace(low, high, channels)
    for i, block in enumerate(model.model.layers):
        for name, norm, readers in (
            ("input_layernorm", block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", block.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            at = torch.randperm(len(norm.weight), generator=draw)[:channels]
            norm.weight.data[at] *= factor
            for reader in readers:
                linear = getattr(block.self_attn, reader, None) or getattr(block.mlp, reader)
                linear.weight.data[:, at] /= factor
            places[f"model.layers.{i}.{name}"] = set(at.tolist())
    return places


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """(folder, places by norm) of a tiny Llama with planted outliers."""
    folder, model = tmp_path_factory.mktemp("planted") / "llama", tiny("llama")
    places = plant(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, places


@pytest.fixture(scope="session")
def seen(planted):
    """What a look at it finds."""
    return look(planted[0], TEXT)
