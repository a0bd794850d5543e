"""An encoder without a head goes the same road as a language model: its last hidden state is the witness."""

import pytest
import torch
from tiny import save_tiny

import fewbit
from fewbit.recipe import named
from fewbit.stream.data import Calibration


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BertModel with a tokenizer."""
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("bert")
    save_tiny("llama", root / "llama")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=512, max_position_embeddings=64, **sizes)).save_pretrained(root / "bert")
    for file in (root / "llama").glob("*token*"):
        (root / "bert" / file.name).write_bytes(file.read_bytes())
    return root / "bert"


@pytest.mark.parametrize(
    ("recipe", "settings"), [("peg", {"groups": "4"}), ("w8a8", {}), ("gptq", {"group_size": "32"})]
)
def test_an_encoder_is_quantized_read_back_and_loaded_by_transformers(bert, tmp_path, recipe, settings):
    import transformers

    out = tmp_path / "out"
    text = Calibration(samples=4, seqlen=32)
    result = fewbit.quantize(bert, named(recipe, settings), output=out, calibration=text)
    assert result.difference == 0
    assert len(result.rows) == 12
    ids = torch.arange(32).reshape(2, 16) * 13 % 512
    with torch.no_grad():
        float_state, mine = (fewbit.load(f)(ids)[0] for f in (bert, out))
        theirs = transformers.AutoModel.from_pretrained(out, dtype="float32")(ids)[0]
    assert 0 < ((mine - float_state).norm() / float_state.norm()).item() < 0.2
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-3)
