"""The seam between queries and keys: found without names, folded without a change, pairs and groups tied."""

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP16, Format, Stats, Token, Zero
from fewbit.grid import Int
from fewbit.seams.attention import KeySeam, _layouts, find_keys, fold_keys, fold_keys_checked
from fewbit.seams.rotation import block_calls
from fewbit.seams.trial import change, first
from fewbit.transform import SmoothAttention

IDS = tiny_ids()
PLACES = {"llama": "proj", "qwen2": "proj", "qwen3": "norm", "gemma3": "norm", "opt": "proj"}
HALF = [8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7]


def blocks_of(arch):
    return [(block, call) for _, block, call in block_calls(tiny(arch), IDS)]


def keys_seen(block, call, name):
    """What the named module returns in one run."""
    seen = []
    handle = block.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    call()
    handle.remove()
    return seen[0]


def chosen(block, call, seam, alpha=0.5):
    size = seam.magnitudes(keys_seen(block, call, seam.keys)).flatten(0, -2).amax(0)
    return SmoothAttention(alpha=alpha)((), Stats(low=-size, high=size))


@pytest.mark.parametrize("arch", PLACES)
@torch.no_grad()
def test_every_block_keeps_its_output_and_loses_its_wide_keys(arch):
    for block, call in blocks_of(arch):
        (seam,) = find_keys(block, call)
        assert [n.rpartition(".")[2] for n in (seam.queries, seam.keys)] == [
            f"q_{PLACES[arch]}", f"k_{PLACES[arch]}"
        ]  # fmt: skip
        module = block.get_submodule(seam.keys)
        gain = 1 + module.weight if arch == "gemma3" else module.weight
        module.weight[1].add_(gain[1] * 30)  # a wide channel
        before, keys = first(call()), keys_seen(block, call, seam.keys)
        assert fold_keys_checked(block, call, seam, chosen(block, call, seam), torch.float32) == ""
        assert change(before, first(call())) < 1e-5
        spread = lambda k: (m := k.flatten(0, -2).abs().amax(0)).max() / m.median()  # noqa: E731
        assert spread(keys_seen(block, call, seam.keys)) < 0.5 * spread(keys)


def test_pairs_of_the_rotary_embedding_are_found_and_opt_has_none():
    for arch, own in (("llama", HALF), ("opt", list(range(16)))):
        block, call = blocks_of(arch)[0]
        partner = find_keys(block, call)[0].partner
        heads = partner.view(-1, 16) - torch.arange(0, len(partner), 16)[:, None]
        assert (heads == torch.tensor(own)).all()


@torch.no_grad()
def test_scales_that_are_not_tied_would_change_the_function():
    block, call = blocks_of("llama")[0]
    (seam,) = find_keys(block, call)
    s = torch.ones(len(seam.partner))
    s[3] = 4.0
    before = first(call())
    undo = fold_keys(block, seam, s, None)
    assert change(before, first(call())) > 1e-3
    undo()
    assert torch.equal(before, first(call()))
    assert fold_keys_checked(block, call, seam, s, torch.float32) == ""  # ties them
    assert change(before, first(call())) < 1e-5


@torch.no_grad()
def test_a_wrong_seam_is_not_folded_and_is_named():
    block, call = blocks_of("llama")[0]
    (seam,) = find_keys(block, call)
    wrong = KeySeam(queries=seam.queries, keys="self_attn.v_proj", index=seam.index, partner=seam.partner)
    before = {n: p.clone() for n, p in block.named_parameters()}
    said = fold_keys_checked(block, call, wrong, torch.full((32,), 2.0), torch.float32)
    assert "the smoothing of keys at self_attn.v_proj was not folded: it changed the output" in said
    assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


def test_fused_projections_are_no_seam():
    block, call = blocks_of("phi3")[0]
    assert find_keys(block, call) == []


class Toy(nn.Module):
    """Causal attention under odd names; ``pairs`` [r] is the partner of each rotating channel of a head."""

    def __init__(self, pairs, heads=4, shared=2, d=16):
        super().__init__()
        self.head_dim, self.pairs = d, pairs
        self.b, self.a = nn.Linear(32, heads * d), nn.Linear(32, shared * d)
        self.c, self.out = nn.Linear(32, shared * d), nn.Linear(heads * d, 32, bias=False)

    def rotate(self, x):
        r = len(self.pairs)
        first_of = torch.minimum(self.pairs, torch.arange(r))
        slow = 10000 ** (-2 * first_of.unique(return_inverse=True)[1] / max(r, 1))
        angle = torch.arange(x.shape[-2])[:, None] * slow
        sign = torch.where(self.pairs > torch.arange(r), -1, 1)
        turned = x[..., :r] * angle.cos() + x[..., :r][..., self.pairs] * sign * angle.sin()
        return torch.cat([turned, x[..., r:]], -1)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.b, self.a, self.c))
        y = nn.functional.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("kind", "r"), [("none", 0), ("half", 16), ("half", 6), ("next", 16), ("next", 4)])
@torch.no_grad()
def test_any_rotary_embedding_is_found_without_names(kind, r, heads):
    own = torch.arange(r)
    pairs = own.view(-1, 2).flip(1).flatten() if kind == "next" else own.roll(r // 2)
    torch.manual_seed(0)
    toy, x = Toy(pairs, heads=heads), torch.randn(2, 24, 32)
    (seam,) = find_keys(toy, lambda: toy(x))
    assert (seam.queries, seam.keys) == ("b", "a")
    expected = torch.cat([pairs, torch.arange(r, 16)])
    if kind == "next":  # neighbours that do not rotate are tied, too: a scale less free, as safe
        expected = torch.arange(16).view(-1, 2).flip(1).flatten()
    assert torch.equal(seam.partner.view(2, 16)[1] - 16, expected)
    assert fold_keys_checked(toy, lambda: toy(x), seam, torch.rand(32) + 0.5, torch.float32) == ""
    x[:] = x[:, :1]  # the same token over and over
    assert torch.equal(find_keys(toy, lambda: toy(x))[0].partner, seam.partner)


@pytest.mark.parametrize("partial", [False, True])
def test_the_statistic_bounds_keys_at_every_position_and_is_reached(partial):
    g = torch.Generator().manual_seed(0)
    k, d, r = torch.randn(7, 16, generator=g), 16, 8 if partial else 16
    partner = torch.cat([torch.arange(r).roll(r // 2), torch.arange(r, d)])
    seam = KeySeam(queries="q", keys="k", index=torch.arange(d), partner=partner)
    bound, top = seam.magnitudes(k), torch.zeros(7, d)
    for angle in torch.linspace(0, 6.2832, 721):  # turn every pair by every angle
        a, b = k[:, : r // 2], k[:, r // 2 : r]
        turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)
        top = top.maximum(torch.cat([turned, k[:, r:]], 1).abs())
    assert (top <= bound * (1 + 1e-6)).all()
    assert (top >= bound * 0.9999).all()


def test_layouts_are_permutations_that_are_their_own_inverse():
    layouts = list(_layouts(12))
    assert len(layouts) == 1 + 2 * 6
    for layout in layouts:
        assert torch.equal(layout[layout], torch.arange(12))


@torch.no_grad()
def test_keys_in_four_bits_a_token_gain_much_where_a_channel_is_wide():
    """Error of the products with queries, keys in int4 with and without the smoothing."""
    g = torch.Generator().manual_seed(0)
    k, q = torch.randn(256, 64, generator=g), torch.randn(256, 64, generator=g)
    k[:, [5, 37]] *= 12
    kv4 = Format(grid=Int(4, signed=False), block=Token(), zero=Zero.OFFSET, scale=FP16)
    size = k.abs().amax(0)
    lam = SmoothAttention()((), Stats(low=-size, high=size))

    def error(k, q):
        return float(((kv4.quantize(k).dequantize() - k) @ q.t()).square().sum())

    assert error(k / lam, q * lam) < 0.5 * error(k, q)
    flat = k / SmoothAttention(alpha=1.0)((), Stats(low=-size, high=size))
    torch.testing.assert_close(flat.abs().amax(0), torch.ones(64))


def test_dead_keys_keep_a_finite_positive_scale():
    for size in (torch.zeros(4), torch.tensor([1.0, 0, 0, 2])):
        s = SmoothAttention()((), Stats(low=-size, high=size))
        assert torch.isfinite(s).all()
        assert (s > 0).all()


def test_impossible_exponents_are_refused():
    with pytest.raises(InputError, match=r"alpha=1.5 is outside \[0, 1\]"):
        SmoothAttention(alpha=1.5)
