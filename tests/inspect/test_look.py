"""A look finds what is there: planted outliers in their channels, and the remedy that undoes their harm."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny

import fewbit
from fewbit.inspect import Remedy, advise, common_channels, look
from fewbit.nn.blocks import find_blocks, linears
from fewbit.recipe import named
from fewbit.stream.data import Calibration

TEXT = Calibration(samples=4, seqlen=48)


@torch.no_grad()
def logits(folder, ids):
    return fewbit.load(folder)(ids).logits


def test_planted_channels_are_found_in_every_block_and_no_others(planted, seen):
    behind = {g.norm: {c.index for c in g.input.channels} for g in seen.groups if g.norm is not None}
    assert behind == planted[1]
    assert all(not g.input.channels for g in seen.groups if g.norm is None)
    common = {c.index: c.inputs for c in common_channels(seen)}
    assert sum(common.values()) == 12
    assert set(common) == set().union(*planted[1].values())


def test_the_advised_recipe_recovers_the_model(planted, seen, tmp_path):
    advice = advise(seen)
    assert advice.remedy is not Remedy.CHANNEL
    assert advice.error < 0.1 * advice.plain
    ids = torch.randint(4, 288, (4, 32), generator=torch.Generator().manual_seed(0))

    y = logits(planted[0], ids)

    def loss(recipe, name):
        fewbit.quantize(planted[0], recipe, output=tmp_path / name, calibration=TEXT)
        return float((logits(tmp_path / name, ids) - y).norm() / y.norm())

    plain = loss(named("w8a8"), "plain")
    assert loss(named(advice.recipe, dict(advice.settings)), "advised") < 0.3 * plain


def test_without_outliers_nothing_is_advised_but_steps_per_channel(folders):
    seen = look(folders / "llama", TEXT)
    assert advise(seen).recipe == "w8a8"
    assert all(not g.input.channels for g in seen.groups)


def test_every_advised_recipe_exists(seen):
    from fewbit.inspect.advice import _RECIPES

    for of_bits in _RECIPES.values():
        for name, settings in of_bits.values():
            named(name, settings)
    assert advise(seen, 4).recipe == "quarot"
    assert advise(seen, 4).command("m") == "fewbit quantize m -r quarot -o OUT"
    assert "--set" in advise(seen, 8).command("m")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_figures_are_those_of_a_plain_forward(folders, arch):
    """Ranges and rms of the inputs of all layers, and of the stream, against hooks on the model in memory."""
    seen = look(folders / arch, TEXT)
    model, want = tiny(arch), {}
    blocks = find_blocks(model)
    for name, block in zip(blocks.names, blocks.modules, strict=True):
        for n, module in linears(block).items():
            hook = lambda m, args, name=f"{name}.{n}": want.__setitem__(name, args[0])  # noqa: E731
            module.register_forward_pre_hook(hook)
        block.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: want.__setitem__(name, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(seen.tokens.ids)
    assert {x.name for x in seen.layers} | set(blocks.names) == set(want)
    for group in seen.groups:
        for layer in group.layers:
            x = want[layer.name]
            assert group.input.largest == pytest.approx(float(x.abs().max()), rel=1e-4)
            assert group.input.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
            assert layer.shape[1] == x.shape[-1]
    for d, name in zip(seen.depths, blocks.names, strict=False):
        assert d.largest == pytest.approx(float(want[name].abs().max()), rel=1e-4)
    assert len(seen.depths) == len(blocks) + 1


def test_norms_are_those_that_hand_on_their_output(seen):
    assert [g.norm.rpartition(".")[2] if g.norm else None for g in seen.groups[:4]] == [
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ]
    assert [len(g.layers) for g in seen.groups[:4]] == [3, 1, 2, 1]
    assert seen.groups[0].name == "model.layers.0.self_attn.q_proj, k_proj, v_proj"


def test_what_cannot_be_rotated_is_not_advised_to_be(folders):
    seen = look(folders / "gemma3", TEXT)
    assert "post_attention_layernorm" in seen.rotation
    assert advise(seen, 8).remedy is not Remedy.ROTATION
    assert advise(seen, 4) is None


def test_pictures_are_those_of_the_inputs_that_lose_most(seen):
    lost = sorted((g.input.bits_lost_token for g in seen.groups), reverse=True)
    assert [p.group.input.bits_lost_token for p in seen.pictures] == lost[:3]
    assert all(p.first.shape == (96, p.group.input.width) for p in seen.pictures)


def test_two_looks_are_one(planted, seen):
    again = look(planted[0], TEXT)
    assert again.groups == seen.groups
    assert again.depths == seen.depths
