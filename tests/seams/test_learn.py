"""SpinQuant: what is learned from is the rotated, quantized model, and learning pays."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32, AbsMax, Format, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.nn.blocks import find_blocks, linears, weight_of
from fewbit.nn.linear import transform_input
from fewbit.seams.learn import learn_rotation, simulated
from fewbit.seams.residual import check_map
from fewbit.seams.rotation import find_outside, rotate_model, rotate_stream, stream_map
from fewbit.transform.cayley import drift
from fewbit.transform.rotation import Rotation

INT4 = Activation(format=Format(grid=by_name("int4"), block=Token(), range=AbsMax(), scale=FP32))
CHANNELS = [3, 17, 40]
ROTATION = Rotation(steps=50, batch=8, lr=0.3)


def bend(x):
    """Stands for rounding where two runs are compared: it depends on the basis, and has no steps."""
    return x + 0.5 * torch.sin(3 * x)


bend.centred = False


def inputs_of(model, activation):
    """The same activation for every linear in the blocks, by full name."""
    blocks = find_blocks(model)
    pairs = zip(blocks.names, blocks.modules, strict=True)
    return {f"{b}.{n}": activation for b, block in pairs for n in linears(block)}


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def cross_entropy(model, ids):
    return float(nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:]))


def with_outliers():
    """Mistral, sure of its next token, with three channels of the stream 20 times as large as the rest."""
    model = tiny("mistral")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
        model.get_input_embeddings().weight[:, CHANNELS] *= 20
        for block in find_blocks(model).modules:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                weight_of(block.get_submodule(name))[CHANNELS] *= 20
    return model


def written_by(model, windows, length):
    """Text drawn from the model itself, so that it predicts it well: [windows, length] int64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 200, (windows, 1), generator=generator)
    while ids.shape[1] < length:
        p = (2 * logits(model, ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return ids


@pytest.fixture(scope="module")
def learned():
    """The model, text it wrote, and what three seeds learned from the first 128 windows (16 held out)."""
    model = with_outliers()
    ids = written_by(model, 192, 48)
    acts = inputs_of(model, INT4)
    made = [learn_rotation(model, ids[:128], acts, replace(ROTATION, seed=seed)) for seed in range(3)]
    return model, ids, made


def losses_of(model, ids, maps):
    """Mean loss on windows ``ids`` of the quantized model, rotated by each of ``maps``."""
    with simulated(model, ids[:1], inputs_of(model, INT4), ROTATION) as loss, torch.no_grad():
        return [sum(float(loss(w[None], q.apply(torch.eye(64)))) for w in ids) / len(ids) for q in maps]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "opt", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("rotation", [Rotation(seed=3), Rotation(seed=3, values=False, online=False)])
def test_the_loss_is_that_of_the_rotated_and_quantized_model(arch, rotation):
    ids, rotated, model = tiny_ids(1, 40), tiny(arch), tiny(arch)
    (rotate_model if rotation.values else rotate_stream)(rotated, seed=3)
    for name in inputs_of(rotated, bend):
        transform_input(rotated.get_submodule(name), bend)
    outside = find_outside(model)
    r = stream_map(outside, 3).apply(torch.eye(outside.size))
    plain = cross_entropy(model, ids)
    with simulated(model, ids[:, :16], inputs_of(model, bend), rotation) as loss, torch.no_grad():
        got, unrotated = float(loss(ids, r)), float(loss(ids, torch.eye(outside.size)))
    assert got == pytest.approx(cross_entropy(rotated, ids), abs=2e-5)
    assert abs(got - plain) > 5e-4
    assert abs(got - unrotated) > 5e-4
    assert cross_entropy(model, ids) == pytest.approx(plain, abs=1e-5)  # hooks are gone


def test_fifty_steps_stay_orthogonal_and_lower_the_loss_on_text_never_seen(learned):
    model, ids, made = learned
    start = [stream_map(find_outside(model), seed) for seed in range(3)]
    for got in made:
        assert drift(got.map.matrix) < 1e-4
        assert [step for step, _ in got.losses] == [0, 10, 20, 30, 40, 50]
        assert got.best < got.start - 0.01
    before, after = (sum(losses_of(model, ids[128:], maps)) / 3 for maps in (start, [g.map for g in made]))
    assert after < before - 0.01


def test_the_map_that_comes_back_has_the_best_loss_seen(learned):
    model, ids, made = learned
    assert losses_of(model, ids[112:128], [made[0].map])[0] == pytest.approx(made[0].best, abs=5e-3)


def test_steps_that_do_harm_leave_the_hadamard_map():
    model, ids = tiny("llama"), tiny_ids(4, 16)
    rotation = Rotation(steps=5, batch=1, lr=100.0)
    got = learn_rotation(model, ids, inputs_of(model, INT4), rotation)
    assert got.best <= got.start
    if got.best == got.start:
        wanted = stream_map(find_outside(model), 0).apply(torch.eye(64))
        torch.testing.assert_close(got.map.matrix, wanted, rtol=0, atol=1e-6)


def test_one_seed_learns_one_matrix():
    ids, made = tiny_ids(4, 16), []
    for seed in (1, 1, 2):
        model = tiny("llama")
        made.append(learn_rotation(model, ids, inputs_of(model, INT4), Rotation(steps=3, batch=2, seed=seed)))
    assert torch.equal(made[0].map.matrix, made[1].map.matrix)
    assert not torch.equal(made[0].map.matrix, made[2].map.matrix)


@pytest.mark.parametrize("arch", ["opt", "gpt_neox"])
def test_under_a_layer_norm_the_learned_map_keeps_the_mean(arch):
    model = tiny(arch)
    got = learn_rotation(model, tiny_ids(4, 16), inputs_of(model, INT4), Rotation(steps=5, batch=2))
    check_map(got.map, 64, True)
    ones = torch.ones(64)
    torch.testing.assert_close(got.map.apply(ones), ones, rtol=0, atol=1e-5)


def test_weights_and_flags_are_left_as_they_were_but_for_folded_gains():
    model = tiny("llama")
    model.requires_grad_(True)
    learn_rotation(model, tiny_ids(4, 16), inputs_of(model, INT4), Rotation(steps=2, batch=1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    fresh = tiny("llama")
    torch.testing.assert_close(logits(model, tiny_ids()), logits(fresh, tiny_ids()), rtol=1e-4, atol=1e-4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        one, other = (find_blocks(m).modules[0].get_submodule(name).weight for m in (model, fresh))
        assert torch.equal(one, other)


def test_what_cannot_be_learned_from_is_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="two windows"):
        learn_rotation(model, tiny_ids(1, 16), inputs_of(model, INT4), Rotation(steps=2))
    with pytest.raises(InputError, match="no input is quantized"):
        learn_rotation(model, tiny_ids(4, 16), {}, Rotation(steps=2))
    gemma = tiny("gemma3")
    with pytest.raises(InputError, match="rotation"):
        learn_rotation(gemma, tiny_ids(4, 16), inputs_of(gemma, INT4), Rotation(steps=2))
    for bad in ({"steps": -1}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(InputError, match="impossible"):
            Rotation(**bad)
