"""Sentence embeddings and their rank correlation; and that PEG and 16 bits recover what 8 bits lose."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_tokenizer
from torch import nn

from fewbit.errors import InputError
from fewbit.evaluate.encoder import Pairs, batches, drift, embed, read_pairs, similarity
from fewbit.format import Channel
from fewbit.nn.sites import At, Site
from fewbit.recipe.encoder import (
    RESIDUAL,
    EncoderRecipe,
    Role,
    SiteRule,
    activation,
    mixed,
    peg,
    places,
    quantize_encoder,
    table,
    w8a8,
    weight,
)

SENTENCES = (
    "the cat sat on the mat", "a dog", "rain is on the way to the town and the fields", "he sings",
    "an old man at the window reads", "the", "they are in the house, and it is warm", "no",
)  # fmt: skip
PAIRS = Pairs("eight", SENTENCES, SENTENCES[1:] + SENTENCES[:1], (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 3.5))


@pytest.fixture
def encoder():
    return tiny("bert").bert


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def wild(encoder):
    """The tiny encoder with the paper's outliers: two dimensions of every FFN output 100 times wider, which
    the norm that reads them brings down again.
    """
    with torch.no_grad():
        for layer in encoder.encoder.layer:
            layer.output.dense.weight[[3, 41]] *= 100
            layer.output.LayerNorm.weight *= 10
            layer.output.LayerNorm.weight[[3, 41]] /= 200
    return encoder


def write(path, rows, head="index\tsentence1\tsentence2\tscore"):
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_pairs_are_read_with_quotes_as_plain_characters(tmp_path):
    path = write(tmp_path / "dev.tsv", ['0\t"Yes, he said.\tHe said "yes".\t4.5', "1\ta\tb\t0.000"])
    pairs = read_pairs(path)
    assert pairs.first == ('"Yes, he said.', "a")
    assert pairs.second == ('He said "yes".', "b")
    assert pairs.score == (4.5, 0.0)


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        (["0\ta\tb\t1.0", "1\ta\tb"], "index\tsentence1\tsentence2\tscore", "line 3 .* 3 cells"),
        (["0\ta\tb\tgood"], "index\tsentence1\tsentence2\tscore", "line 2 "),
        (["0\ta\t1.0"], "index\tsentence1\tscore", "expected rows with sentence1, sentence2, score"),
        ([], "sentence1\tsentence2\tscore", "has 0 rows"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, rows, head, says):
    with pytest.raises(InputError, match=says):
        read_pairs(write(tmp_path / "dev.tsv", rows, head))
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "none.tsv")


def test_an_embedding_is_the_mean_over_tokens_whatever_the_batch(encoder, tokenizer):
    together = embed(encoder, tokenizer, SENTENCES, size=8)
    with torch.no_grad():
        for sentence, got in zip(SENTENCES, together, strict=True):
            state = encoder(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            expected = nn.functional.normalize(state.mean(0), dim=-1)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    twice = embed(encoder, tokenizer, ("no", "a dog", "no"))
    assert torch.equal(twice[0], twice[2])
    torch.testing.assert_close(twice[:2], together[[7, 1]], rtol=0, atol=1e-5)


def test_spearman_asks_for_the_order_alone(encoder, tokenizer):
    """Scores in the order of the model's own cosines correlate perfectly, under any monotone map."""
    e = embed(encoder, tokenizer, PAIRS.first + PAIRS.second)
    cosine = (e[:8] * e[8:]).sum(-1)
    ranks = cosine.argsort().argsort()
    pairs = replace(PAIRS, score=tuple((ranks.double() ** 3).tolist()))
    got = similarity(encoder, tokenizer, pairs)
    assert got.spearman == pytest.approx(1.0)
    assert got.pearson < 0.999
    assert got.pairs == 8
    assert torch.equal(got.embeddings, e)
    upside_down = replace(PAIRS, score=tuple((-ranks.double()).tolist()))
    assert similarity(encoder, tokenizer, upside_down).spearman == pytest.approx(-1.0)


def test_a_model_that_cannot_embed_is_refused(encoder, tokenizer):
    with pytest.raises(InputError, match="no last_hidden_state"):
        embed(tiny("bert"), tokenizer, SENTENCES)
    with pytest.raises(InputError, match="training mode"):
        embed(encoder.train(), tokenizer, SENTENCES)
    with pytest.raises(InputError, match="at least three"):
        similarity(encoder.eval(), tokenizer, Pairs("two", ("a", "b"), ("c", "d"), (1.0, 2.0)))


# -- the recipes, by what they do to embeddings


def lost(build, recipe, tokenizer, original):
    """Relative squared change of the embeddings under a recipe."""
    model = build()
    quantize_encoder(model, recipe, batches(tokenizer, SENTENCES, size=4))
    return drift(embed(model, tokenizer, SENTENCES), original)


def test_sites_are_found_in_a_model_with_or_without_a_head(encoder):
    found = places(encoder)
    assert len(found) == 2 + 2 * 11
    assert {p.role for p in found} == set(Role)
    y = next(p for p in found if p.role is Role.Y and p.layer == 1)
    assert y.site == Site("encoder.layer.1.output.LayerNorm", At.INPUT)
    headed = [p.site.module for p in places(tiny("bert"))]
    assert headed == ["bert." + p.site.module for p in found]
    with pytest.raises(InputError, match="no layers named as in BERT"):
        places(tiny("llama"))


def test_peg_and_16_bit_sums_recover_what_one_step_per_tensor_loses(wild, tokenizer):
    """Section 4 of the paper, with outliers like those it found: activations alone, to see them alone."""
    four = {"hidden": 64, "groups": 4}
    original = embed(wild, tokenizer, SENTENCES)

    def change(recipe):
        recipe = replace(recipe, weight=None, embedding=None)
        return lost(lambda: copy.deepcopy(wild), recipe, tokenizer, original)

    whole, natural, sorted_ = map(change, (w8a8(), peg(**four, permute=False), peg(**four)))
    sums, three = change(mixed(roles=(Role.Y,))), change(mixed())
    both = change(mixed(roles=(Role.Y,), base=peg(**four)))
    assert whole > 2 * sorted_
    assert whole > natural > sorted_
    assert whole > sums > three
    assert whole > 5 * three
    assert sorted_ > both


def test_mixed_gives_16_bits_to_the_named_tensors_alone(encoder, tokenizer):
    calibration = batches(tokenizer, SENTENCES)
    placed = quantize_encoder(encoder, mixed(), calibration)
    wide = {p.role for p in places(encoder) if placed.quantizers[p.site].activation.format.grid.bits == 16}
    assert wide == set(RESIDUAL)
    assert len(placed.quantizers) == len(places(encoder))


def test_16_bits_err_a_thousand_times_less_than_8():
    from fewbit.nn.sites import Seen, fit

    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 30 + 5
    seen = Seen(low=x.amin(0)[None], high=x.amax(0)[None], rows=x, tokens=len(x))
    coarse, fine = (fit(activation(bits), seen)(x).sub(x).square().sum() for bits in (8, 16))
    assert coarse > 1e4 * fine > 0


def test_x_h_and_y_of_a_layer_share_the_order_of_h(wild, tokenizer):
    placed = quantize_encoder(wild, peg(hidden=64, groups=4), batches(tokenizer, SENTENCES))
    for layer in (0, 1):
        sites = [p.site for p in places(wild) if p.role in RESIDUAL and p.layer == layer]
        orders = [placed.quantizers[site].order for site in sites]
        assert len(orders) == 3
        assert all(torch.equal(o.order, orders[0].order) for o in orders)
        assert set(orders[0].order[-2:].tolist()) == {3, 41}


def test_weights_and_the_token_table_get_few_values_and_removal_restores_activations(encoder, tokenizer):
    recipe = EncoderRecipe(
        name="low", weight=weight(4), embedding=weight(2, per_row=True), rules=w8a8().rules
    )
    placed = quantize_encoder(encoder, recipe, batches(tokenizer, SENTENCES))
    assert len(encoder.encoder.layer[0].attention.self.query.weight.unique()) <= 16
    rows = encoder.get_input_embeddings().weight
    assert max(len(row.unique()) for row in rows) <= 4
    assert isinstance(recipe.embedding.block, Channel)
    rounded = embed(encoder, tokenizer, SENTENCES)
    placed.remove()
    assert drift(rounded, embed(encoder, tokenizer, SENTENCES)) > 0
    again = embed(encoder, tokenizer, SENTENCES)
    assert torch.equal(again, embed(encoder, tokenizer, SENTENCES))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_more_bits_and_a_step_per_row_lose_less_of_the_token_table(encoder):
    tokens = encoder.get_input_embeddings().weight.detach() * torch.logspace(-1, 0, 288)[:, None]

    def loss(fmt):
        return (fmt.quantize(tokens).dequantize() - tokens).square().sum().item()

    per_tensor, per_row = ([loss(weight(b, per_row=row)) for b in (2, 3, 4)] for row in (False, True))
    assert per_tensor[0] > per_tensor[1] > per_tensor[2]
    assert all(row < whole for row, whole in zip(per_row, per_tensor, strict=True))
    assert all(loss(table(b)) < row for b, row in zip((2, 3, 4), per_row, strict=True))


def test_impossible_recipes_are_refused():
    with pytest.raises(InputError, match=r"5 groups do not divide 64 .* choose from \[2, 4, 8, 16, 32\]"):
        peg(hidden=64, groups=5)
    with pytest.raises(InputError, match="need groups of columns"):
        SiteRule(activation=activation(), sorted_by=Role.H)
