"""Encoders, with and without quantizers at sums and outputs: written, read back, and the paper's order."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, save_tiny, tiny, tiny_ids, tiny_tokenizer

import fewbit
from fewbit.errors import InputError
from fewbit.evaluate.encoder import drift, embed
from fewbit.format import Channel
from fewbit.io.source import open_source
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.sites import At, Site, fit
from fewbit.recipe import Recipe, Role, Rule, SiteRule, from_yaml, mixed_precision, named, peg_encoder
from fewbit.recipe.encoder import activation, table, weight
from fewbit.recipe.sites import RESIDUAL, places
from fewbit.solve import Ldlq
from fewbit.stream.data import Calibration

SENTENCES = (
    "the cat sat on the mat", "a dog", "rain is on the way to the town and the fields", "he sings",
    "an old man at the window reads", "the", "they are in the house, and it is warm", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Eight sentences, one twice, and a blank line."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join([*SENTENCES, "", SENTENCES[0]]) + "\n")
    return Calibration(source=path, samples=8)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A tiny BERT with the paper's outliers: two dimensions of every FFN output 100 times wider, which the
    norm that reads them brings down again.
    """
    from transformers import BertModel

    folder, source = tmp_path_factory.mktemp("bert") / "wild", tiny("bert")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = BertModel(source.config).eval()  # the tiny one has no pooler
        encoder.load_state_dict(source.bert.state_dict(), strict=False)
        for layer in encoder.encoder.layer:
            layer.output.dense.weight[[3, 41]] *= 100
            layer.output.LayerNorm.weight *= 10
            layer.output.LayerNorm.weight[[3, 41]] /= 200
    encoder.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(wild, text, tmp_path_factory):
    """``made(recipe) -> folder``: a checkpoint of the wild encoder, each once."""
    kept = {}

    def make(recipe):
        if recipe not in kept:
            kept[recipe] = tmp_path_factory.mktemp("made") / "out"
            assert fewbit.quantize(wild, recipe, output=kept[recipe], calibration=text).difference == 0
        return kept[recipe]

    return make


@pytest.mark.parametrize(
    ("recipe", "settings"), [("peg", {"groups": "4"}), ("w8a8", {}), ("gptq", {"group_size": "32"})]
)
def test_an_encoder_is_quantized_read_back_and_loaded_by_transformers(wild, tmp_path, recipe, settings):
    import transformers

    out = tmp_path / "out"
    windows = Calibration(samples=4, seqlen=32)
    result = fewbit.quantize(wild, named(recipe, settings), output=out, calibration=windows)
    assert result.difference == 0
    assert len(result.rows) == 12
    ids = tiny_ids()
    with torch.no_grad():
        float_state, mine = (fewbit.load(f)(ids)[0] for f in (wild, out))
        theirs = transformers.AutoModel.from_pretrained(out, dtype="float32")(ids)[0]
    assert 0 < ((mine - float_state).norm() / float_state.norm()).item() < 0.5
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-3)


# -- quantizers at sites


@pytest.mark.parametrize(
    "recipe",
    [
        mixed_precision(),
        mixed_precision(weight_bits=4, embedding_bits=3, per_row=True),
        peg_encoder(groups=4, momentum=0.9),
        mixed_precision(weight_bits=None),
    ],
    ids=["mixed", "low", "peg", "float weights"],
)
def test_what_is_loaded_is_what_was_calibrated_in_fewbit_and_in_transformers(made, recipe, tmp_path):
    import transformers

    out, ids = made(recipe), tiny_ids()
    mine = fewbit.load(out)
    theirs = transformers.AutoModel.from_pretrained(out, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        state = mine(ids)[0]
        assert torch.equal(theirs(ids)[0], state)
        assert torch.equal(fewbit.load(tmp_path / "again")(ids)[0], state)
    sites = open_source(out).sites
    assert {s.site for s in sites} == {p.site for p in places(mine)}
    stored = load_file(out / "model.safetensors")
    for s in sites:
        one, other = mine.get_submodule(s.name), theirs.get_submodule(s.name)
        assert one.activation == other.activation == s.activation
        for name, (shape, dtype) in s.layout().items():
            assert stored[f"{s.name}.{name}"].dtype == dtype
            assert stored[f"{s.name}.{name}"].shape == shape
            assert torch.equal(getattr(one, name), stored[f"{s.name}.{name}"])
            assert torch.equal(getattr(other, name), stored[f"{s.name}.{name}"])


def test_a_checkpoint_is_what_the_same_steps_give_by_hand(made, wild):
    """Weights and table rounded, sites rounded one by one, in the float model: the loaded one equals it."""
    recipe = mixed_precision(weight_bits=6, embedding_bits=5)
    out, model = made(recipe), fewbit.load(wild)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n]
    with torch.no_grad():
        for module, fmt in [
            (model.embeddings.word_embeddings, weight(5)),
            *((m, weight(6)) for m in linears),
        ]:
            module.weight.copy_(fmt.quantize(module.weight).dequantize())
        loaded = fewbit.load(out)
        for name, module in model.named_modules():
            site = dict(loaded.named_modules()).get(f"{name}.input_site")
            if site is not None:
                module.register_forward_pre_hook(lambda m, args, q=site: (q(args[0]), *args[1:]))
            site = dict(loaded.named_modules()).get(f"{name}.output_site")
            if site is not None:
                module.register_forward_hook(lambda m, args, out, q=site: q(out))
        torch.testing.assert_close(model(tiny_ids())[0], loaded(tiny_ids())[0], rtol=0, atol=1e-5)
    h = loaded.encoder.layer[0].output.dense.output_site
    assert h.activation.format.grid.bits == 16
    assert h.scale.numel() == 1


def test_the_file_has_the_size_that_the_plan_said(made, wild):
    small, large = (made(mixed_precision(weight_bits=b, embedding_bits=b)) for b in (2, 8))
    weights = sum(e.shape[0] * e.shape[1] for e in open_source(small).entries.values())
    sizes = [(out / "model.safetensors").stat().st_size for out in (small, large)]
    assert sizes[1] - sizes[0] == pytest.approx(weights * 6 / 8, rel=0.01)
    assert "embeddings.word_embeddings.weight" not in load_file(small / "model.safetensors")
    assert isinstance(fewbit.load(small).get_input_embeddings(), QEmbedding)


def test_peg_and_16_bit_sums_recover_what_one_step_per_tensor_loses(made, wild):
    """Section 4 of the paper, with outliers like those it found: float weights, to see activations alone."""
    tokenizer = tiny_tokenizer()
    original = embed(fewbit.load(wild), tokenizer, SENTENCES)
    apart = {"weight_bits": None}

    def change(recipe):
        return drift(embed(fewbit.load(made(recipe)), tokenizer, SENTENCES), original)

    four = peg_encoder(groups=4, **apart)
    whole = change(mixed_precision(residual_bits=8, **apart))
    natural, sorted_ = change(peg_encoder(groups=4, permute=False, **apart)), change(four)
    sums, three = change(mixed_precision(residual="y", **apart)), change(mixed_precision(**apart))
    wide = SiteRule(roles=(Role.Y,), activation=activation(16))
    both = change(replace(four, sites=(wide, *four.sites)))
    assert whole > 2 * sorted_
    assert whole > natural > sorted_
    assert whole > sums > three
    assert whole > 5 * three
    assert sorted_ > both


def test_mixed_gives_16_bits_to_the_named_tensors_alone(made, wild):
    model = fewbit.load(wild)
    bits = {s.site: s.activation.format.grid.bits for s in open_source(made(mixed_precision())).sites}
    assert {p.role for p in places(model) if bits[p.site] == 16} == set(RESIDUAL)
    assert set(bits.values()) == {8, 16}


def test_x_h_and_y_of_a_layer_share_the_groups_of_h(made):
    model = fewbit.load(made(peg_encoder(groups=4)))
    for layer in model.encoder.layer:
        sites = (
            layer.attention.output.LayerNorm.output_site,
            layer.output.dense.output_site,
            layer.output.LayerNorm.input_site,
        )
        groups = [q.scale.unique(return_inverse=True)[1] for q in sites]
        pairs = [g[:, None] == g[None] for g in groups]
        assert all(torch.equal(p, pairs[0]) for p in pairs)
        assert pairs[0].sum() == HIDDEN * HIDDEN // 4
        assert pairs[1][3, 41]


def test_16_bits_err_a_thousand_times_less_than_8():
    from fewbit.nn.sites import Seen

    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 30 + 5
    seen = Seen(low=x.amin(0)[None], high=x.amax(0)[None], rows=x, tokens=len(x))
    coarse, fine = (fit(activation(bits), seen)(x).sub(x).square().sum() for bits in (8, 16))
    assert coarse > 1e4 * fine > 0


def test_more_bits_and_a_step_per_row_lose_less_of_the_token_table():
    tokens = tiny("bert").bert.get_input_embeddings().weight.detach() * torch.logspace(-1, 0, 288)[:, None]

    def loss(fmt):
        return (fmt.quantize(tokens).dequantize() - tokens).square().sum().item()

    per_tensor, per_row = ([loss(weight(b, per_row=row)) for b in (2, 3, 4)] for row in (False, True))
    assert per_tensor[0] > per_tensor[1] > per_tensor[2]
    assert all(row < whole for row, whole in zip(per_row, per_tensor, strict=True))
    assert all(loss(table(b)) < row for b, row in zip((2, 3, 4), per_row, strict=True))


@pytest.mark.parametrize("fmt", [weight(5), weight(3, per_row=True), table(2)], ids=str)
def test_a_table_gives_the_rows_that_it_decodes_to(fmt):
    w = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    q, ids = fmt.quantize(w), torch.tensor([[3, 3, 0], [39, 7, 1]])
    module = QEmbedding(q)
    assert torch.equal(module(ids), q.dequantize()[ids])
    assert torch.equal(module.bfloat16()(ids), q.dequantize()[ids].bfloat16())
    assert isinstance(fmt.block, Channel) is bool(module.scale.ndim)


def test_sites_are_found_in_a_model_with_or_without_a_head():
    found = places(tiny("bert").bert)
    assert len(found) == 2 + 2 * 11
    assert {p.role for p in found} == set(Role)
    y = next(p for p in found if p.role is Role.Y and p.layer == 1)
    assert y.site == Site("encoder.layer.1.output.LayerNorm", At.INPUT)
    assert [p.site.module for p in places(tiny("bert"))] == ["bert." + p.site.module for p in found]


def test_a_head_goes_along_and_a_table_tied_to_it_is_refused(tmp_path, text):
    import transformers

    save_tiny("bert", tmp_path / "headed")
    with pytest.raises(InputError, match=r"also cls.predictions.decoder.weight of its head"):
        fewbit.quantize(tmp_path / "headed", mixed_precision(), output=tmp_path / "no", calibration=text)
    recipe, out = mixed_precision(embedding_bits=None), tmp_path / "out"
    assert fewbit.quantize(tmp_path / "headed", recipe, output=out, calibration=text).difference == 0
    with torch.no_grad():
        state = fewbit.load(out).bert(tiny_ids())[0]
        theirs = transformers.AutoModel.from_pretrained(out, dtype=torch.float32)(tiny_ids())[0]
    torch.testing.assert_close(theirs, state, rtol=0, atol=1e-5)


def test_a_recipe_of_sites_is_text_and_back():
    for recipe in (mixed_precision(residual="y,h"), peg_encoder(groups=3, per_row=True)):
        assert from_yaml(recipe.to_yaml()) == recipe


def test_the_same_run_again_has_nothing_to_do_and_other_sentences_are_another_run(wild, text, tmp_path):
    out = tmp_path / "out"
    recipe = mixed_precision(weight_bits=None)
    fewbit.quantize(wild, recipe, output=out, calibration=text)
    assert fewbit.quantize(wild, recipe, output=out, calibration=text).finished_before
    with pytest.raises(InputError, match="holds something else"):
        fewbit.quantize(wild, recipe, output=out, calibration=replace(text, samples=7))


def test_what_cannot_be_is_refused_in_a_sentence(wild, text, tmp_path):
    def run(recipe, model=wild, calibration=text, **others):
        fewbit.quantize(model, recipe, output=tmp_path / "out", calibration=calibration, **others)

    save_tiny("llama", tmp_path / "llama")
    for recipe, said, keys in (
        (mixed_precision(), "LlamaForCausalLM is no encoder built like BERT", {"model": tmp_path / "llama"}),
        (mixed_precision(), "finds its steps on sentences", {"calibration": Calibration()}),
        (
            mixed_precision(),
            "8 different sentences .* 9 are asked",
            {"calibration": replace(text, samples=9)},
        ),
        (mixed_precision(), "depth 'linear' is for models", {"depth": "linear"}),
        (peg_encoder(groups=5), "5 groups do not divide 64", {}),
    ):
        with pytest.raises(InputError, match=said):
            run(recipe, **keys)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputError, match="sorts embedding by h"):
        run(peg_encoder(groups=4, residual="x,h,y,embedding"))
    with pytest.raises(InputError, match="needs no calibration"):
        replace(mixed_precision(), rules=(Rule(weight=weight(), solver=Ldlq()),))
    with pytest.raises(InputError, match="need groups to go to"):
        SiteRule(activation=activation(), sorted_by=Role.H)
    with pytest.raises(InputError, match="'sum' is no tensor of an encoder layer"):
        mixed_precision(residual="x,sum")
    for settings in (
        {"weight_bits": 1},
        {"embedding_bits": 9},
        {"residual_bits": 32},
        {"activation_bits": 2},
    ):
        with pytest.raises(InputError, match=f"{next(iter(settings))}=.* is out of range"):
            mixed_precision(**settings)
    with pytest.raises(InputError, match="has no rules"):
        Recipe(name="nothing", rules=())


def test_a_damaged_file_is_refused_with_the_name_of_the_tensor(made, tmp_path):
    source = made(mixed_precision())
    for name, change, said in (
        ("embeddings.LayerNorm.input_site.scale", lambda t: None, "no tensor embeddings"),
        ("embeddings.LayerNorm.input_site.zero", lambda t: t.float(), "expected torch.uint8"),
    ):
        out = tmp_path / name
        out.mkdir()
        for file in source.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        tensors = load_file(source / "model.safetensors")
        changed = change(tensors.pop(name))
        save_file(tensors | ({} if changed is None else {name: changed}), out / "model.safetensors")
        with pytest.raises(InputError, match=said):
            fewbit.load(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["sites"][0]["activation"] = 99
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantization_config of this checkpoint is broken"):
        fewbit.load(out)
