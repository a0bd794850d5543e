"""QuEST against plain straight-through training on a tiny Llama that learns 576 random tokens by heart."""

from dataclasses import replace

import pytest
import torch

import fewbit
from fewbit.format import AbsMax
from fewbit.io.attached import make_saveable
from fewbit.recipe import Recipe, Rule
from fewbit.train import Clipped, Straight, Trust, convert, fake, midrise, prepare, quest_input, quest_weight
from fewbit.transform import Incoherence

VOCAB, STEPS = 64, 25


def llama(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, **heads)
        ).train()


def learn(model) -> float:
    """Mean loss of the last five of 25 steps of AdamW."""
    ids = torch.randint(0, VOCAB, (24, 24), generator=torch.Generator().manual_seed(5))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def quest(bits: int) -> float:
    trust = Straight(surrogate=Trust(outer=1.3 if bits == 1 else 1.0))
    rule = Rule(weight=quest_weight(bits), input=quest_input(bits), basis=Incoherence(output=False))
    return learn(prepare(llama(), Recipe(name="quest", rules=(rule,)), weight=trust, input=trust))


def plain(bits: int) -> float:
    """The same points between the extremes of each row, in the model's own basis."""
    weight, input = quest_weight(bits), quest_input(bits)
    input = replace(input, format=replace(input.format, range=AbsMax()))
    rule = Rule(weight=replace(weight, range=AbsMax()), input=input)
    return learn(prepare(llama(), Recipe(name="ste", rules=(rule,))))


def test_quest_is_ordered_by_bits_and_ahead_of_plain_straight_through_training():
    by_bits = [quest(bits) for bits in (4, 2, 1)]
    assert by_bits[0] < 0.6 * by_bits[1]
    assert by_bits[1] < 0.7 * by_bits[2]
    for bits, loss, share in zip((4, 2, 1), by_bits, (1.0, 0.6, 0.6), strict=True):
        assert loss < share * plain(bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_on_even_points_the_trust_mask_is_the_clipped_one(bits):
    """Half a step from the nearest point is half a step beyond the ends."""
    fmt, x = quest_weight(bits), torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    grads = []
    for surrogate in (Trust(), Clipped()):
        at = x.clone().requires_grad_()
        fake(at, fmt, surrogate=surrogate).sum().backward()
        grads.append(at.grad)
    assert torch.equal(*grads)
    assert len(midrise(bits).codes()) == 2**bits


def test_a_model_on_its_grids_is_saved_and_read_back(tmp_path):
    rule = Rule(weight=quest_weight(2), input=quest_input(4), basis=Incoherence(output=False))
    model = convert(prepare(llama().eval(), Recipe(name="quest", rules=(rule,))))
    make_saveable(model).save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(fewbit.load(tmp_path)(ids).logits, model(ids).logits)
