"""Mixtures of experts: each is solved from its own tokens, saved by name, read back, and told of."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import EXPERTS, MIXTURES, Folders, save_tiny, tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import Stats
from fewbit.io.load import load
from fewbit.io.source import open_source
from fewbit.nn.blocks import find_blocks
from fewbit.recipe import Recipe, Rule, awq, gptq, nf4, quarot, rtn
from fewbit.seams.diagonal import Seam, _holds, find_seams
from fewbit.solve import Need
from fewbit.stream.coverage import THIN, coverage
from fewbit.stream.data import Calibration
from fewbit.stream.job import MANIFEST
from fewbit.stream.mixture import mixed, solve_experts
from fewbit.stream.plan import assign, make_plan
from fewbit.transform.chooser import Kind

INT8 = rtn(bits=8, group_size=32).rules[0].weight
FEW = Calibration(samples=6, seqlen=48)
TOKENS = 6 * 48


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("depth", ["linear", "block"])
@pytest.mark.parametrize("arch", MIXTURES)
def test_every_mixture_quantizes_saves_by_name_and_reloads(arch, depth, models, tmp_path):
    out = tmp_path / "out"
    result = fewbit.quantize(
        models / arch, gptq(bits=8, group_size=32), output=out, calibration=FEW, depth=depth
    )
    assert result.difference == 0
    assert max(row.error for row in result.rows) < 1e-3
    plain = load(models / arch)
    with torch.no_grad():
        want, got = plain(tiny_ids()).logits, load(out)(tiny_ids()).logits
    assert (got - want).norm() < 0.05 * want.norm()
    mixed = [row for row in result.rows if row.routed is not None]
    assert {".experts." in row.layer for row in mixed} == {True}
    assert len(mixed) == 3 * EXPERTS * (1 if arch == "deepseek_v3" else 2)
    names = set(tensors_of(out))
    assert all(f"{row.layer}.weight_packed" in names for row in mixed)
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) < 1.05 * result.plan.size_bytes + 20_000
    # two experts a token, whatever the layer
    by_layer = {}
    for row in mixed:
        if row.layer.rpartition(".")[2] in ("down_proj", "w2"):
            key = row.layer.partition(".experts.")[0]
            by_layer[key] = by_layer.get(key, 0) + row.routed
    assert set(by_layer.values()) == {2 * TOKENS}


def test_names_of_mixtral_and_routers_that_stay_float(models, tmp_path):
    result = fewbit.quantize(models / "mixtral", rtn(group_size=32), output=tmp_path / "out")
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in {row.layer for row in result.rows}
    gate = "model.layers.0.block_sparse_moe.gate"
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {gate, "model.layers.0.mlp.gate", "lm_head"} <= set(ignore)  # for engines, and for transformers
    kept, before = tensors_of(tmp_path / "out"), tensors_of(models / "mixtral")
    assert torch.equal(kept[f"{gate}.weight"], before[f"{gate}.weight"])


class Recorder:
    """In the place of a solver: notes what it was given for each layer."""

    def __init__(self):
        self.given = {}

    def __call__(self, group, stats, notes, routed):
        for layer in group:
            self.given[layer.module] = (stats, notes, routed)


@pytest.fixture
def one_mixture(models):
    """A layer of experts with weights, its planned layers, its name."""
    source = open_source(models / "qwen3_moe")
    plan = make_plan(source, gptq(bits=4, group_size=32), FEW)[0]
    name = "model.layers.0.mlp.experts"
    layers = {x.module: x for x in plan.layers if x.module.startswith(name)}
    return load(models / "qwen3_moe").get_submodule(name), layers, name


def calls_of(index):
    """Two batches whose tokens go where ``index`` says, one expert a token."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(len(index), 64, generator=g)
    parts = zip(x.split(len(index) // 2), index[:, None].split(len(index) // 2), strict=True)
    return x, [((h, i, torch.ones(i.shape)), {}) for h, i in parts]


@torch.no_grad()
def test_an_expert_is_solved_from_its_own_tokens_and_a_prior_of_all(one_mixture):
    """H = (n own + h all) / (n + h), after gate and up in the input of down as well."""
    experts, layers, name = one_mixture
    index = torch.tensor([0] * 70 + [1] * 10 + [2] * 80)
    x, calls = calls_of(index)
    solve = Recorder()
    solve_experts(experts, name, layers, calls, True, solve)
    assert set(solve.given) == set(layers)
    gram = lambda x: x.T @ x  # noqa: E731 - a sum
    for e, n in enumerate((70, 10, 80, 0)):
        own, expert = x[index == e], experts[e]
        stats, notes, routed = solve.given[f"{name}.{e}.gate_proj"]
        assert routed == n
        assert notes == ((THIN,) if n < 64 else ())
        torch.testing.assert_close(stats.gram, (gram(own) + 64 * gram(x) / 160) / (n + 64))
        inner = lambda x, expert=expert: torch.nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)  # noqa: E731
        want = (gram(inner(own)) + 32 * gram(inner(x)) / 160) / (n + 32)
        torch.testing.assert_close(solve.given[f"{name}.{e}.down_proj"][0].gram, want)


def test_extremes_are_the_experts_own_where_it_has_enough_tokens():
    low = torch.tensor([-1.0, -2.0])
    own = Stats(low=low, high=-low, sample=torch.ones(3, 2), tokens=50)
    rest = Stats(low=2 * low, high=-2 * low, sample=torch.zeros(5, 2), tokens=400)
    enough, thin = mixed(own, rest, 50), mixed(own, rest, 51)
    assert torch.equal(enough.low, low)
    assert torch.equal(enough.sample, own.sample)
    assert torch.equal(thin.low, 2 * low)
    assert torch.equal(thin.high, -2 * low)
    assert len(thin.sample) == 8
    assert mixed(Stats(), rest, 50) is rest


def test_layers_of_an_expert_are_solved_in_turn_at_linears_alone(one_mixture):
    experts, layers, name = one_mixture

    def broken(group, stats, notes, routed):
        given[group[0].module] = stats.gram.clone()
        for layer in group:
            experts.get_submodule(layer.module.removeprefix(f"{name}.")).weight.data.mul_(2)

    grams = {}
    for in_turn in (False, True):
        given = grams[in_turn] = {}
        kept = {n: p.detach().clone() for n, p in experts.named_parameters()}
        with torch.no_grad():
            solve_experts(experts, name, layers, calls_of(torch.arange(160) % 4)[1], in_turn, broken)
        experts.load_state_dict(kept)
    first, last = f"{name}.2.gate_proj", f"{name}.2.down_proj"
    assert torch.equal(grams[False][first], grams[True][first])
    assert grams[True][last].trace() > 2 * grams[False][last].trace()


def test_coverage_is_in_the_manifest_the_result_and_the_rows(models, tmp_path):
    result = fewbit.quantize(
        models / "deepseek_v3", gptq(group_size=32), output=tmp_path / "out", calibration=FEW
    )
    found = coverage(result.rows)
    own = {r.layer.rpartition(".")[0]: r.routed for r in result.rows if r.routed is not None}
    assert found.experts == EXPERTS
    assert found.fewest == min(own.values()) == own[found.rarest]
    assert found.thin == sum(n < 64 for n in own.values()) > 0  # this model's router prefers one group
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["experts"] == found.as_dict() == result.as_dict()["experts"]
    thin = [row for row in result.rows if THIN in row.notes]
    assert len(thin) == 3 * found.thin
    assert f"got {found.fewest} token" in str(found) or "got no token" in str(found)


def test_without_calibration_nothing_is_said_of_coverage(models, tmp_path):
    result = fewbit.quantize(models / "qwen3_moe", nf4(group_size=32), output=tmp_path / "out")
    assert coverage(result.rows) is None
    assert result.as_dict()["experts"] is None
    assert "experts" not in json.loads((tmp_path / "out" / MANIFEST).read_text())


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_an_interrupted_run_ends_in_the_same_file(arch, models, ends_in_the_same_file):
    ends_in_the_same_file(models / arch, gptq(group_size=32), FEW)


@torch.no_grad()
def test_the_norm_before_experts_feeds_router_shared_and_routed_experts(models):
    model = load(models / "qwen2_moe")
    block = model.model.layers[1]
    x = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    places = torch.arange(24)[None]
    rotary = model.model.rotary_emb(x, places)
    call = lambda: block(x, position_embeddings=rotary, position_ids=places)  # noqa: E731
    seam = next(s for s in find_seams(block, call) if s.producer == "post_attention_layernorm")
    matrices = {f"mlp.experts.{e}.{m}" for e in range(EXPERTS) for m in ("gate_proj", "up_proj")}
    shared = {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
    assert set(seam.readers) == matrices | shared | {"mlp.gate", "mlp.shared_expert_gate"}
    for left_out in ("mlp.gate", "mlp.experts.0.up_proj", "mlp.shared_expert_gate"):
        readers = tuple(r for r in seam.readers if r != left_out)
        assert not _holds(block, call, Seam(kind=Kind.NORM, producer=seam.producer, readers=readers))


@torch.no_grad()
def test_inside_an_expert_up_feeds_down_where_the_gate_is_a_product(models):
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for arch in ("mixtral", "gpt_oss"):
        expert = load(models / arch).model.layers[0].mlp.experts[1]
        found[arch] = [(s.producer, s.readers) for s in find_seams(expert, lambda e=expert: e(x))]
    assert found == {"mixtral": [("w3", ("w2",))], "gpt_oss": []}  # (up + 1) is no product


def test_awq_scales_experts_and_keeps_the_model(models, tmp_path):
    """At 8 bits a scale that is folded wrongly would show, and none does."""
    recipe = awq(bits=8, group_size=32, range="minmax", points=5)
    result = fewbit.quantize(models / "mixtral", recipe, output=tmp_path / "awq", calibration=FEW)
    assert not any("not folded" in note for row in result.rows for note in row.notes)
    with torch.no_grad():
        want, got = (load(p)(tiny_ids()).logits for p in (models / "mixtral", tmp_path / "awq"))
    assert (got - want).norm() < 0.05 * want.norm()
    names = ("block_sparse_moe.gate.weight", "post_attention_layernorm.weight")
    before, after = tensors_of(models / "mixtral"), tensors_of(tmp_path / "awq")
    for name in (f"model.layers.0.{n}" for n in names):
        assert not torch.equal(before[name], after[name])  # the scales went into both


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_transformers_loads_both_layouts(arch, models, tmp_path):
    cls = type(tiny(arch))
    for recipe in (rtn(group_size=32), nf4(group_size=32)):
        out = tmp_path / recipe.name
        fewbit.quantize(models / arch, recipe, output=out)
        loaded = cls.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            got, want = loaded(tiny_ids()).logits, load(out)(tiny_ids()).logits
        # of compressed-tensors it decodes experts in the float16 of their scales
        assert (got - want).norm() <= (0 if recipe.name == "nf4" else 5e-3) * want.norm()


def test_experts_left_float_are_loaded_one_by_one(models, tmp_path):
    keep = Rule(match="*.experts.2.*", weight=None)
    recipe = Recipe(name="mixed", rules=(keep, *nf4(group_size=32).rules))
    result = fewbit.quantize(models / "mixtral", recipe, output=tmp_path / "out")
    assert sum(".experts.2." in n for n in result.plan.left) == 2 * 3
    loaded = type(tiny("mixtral")).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tiny_ids()).logits, load(tmp_path / "out")(tiny_ids()).logits)


def test_the_plan_counts_experts_by_the_tokens_they_get(models):
    source = open_source(models / "qwen3_moe")
    plan = make_plan(source, gptq(group_size=32), FEW)[0]
    shares = {x.share for x in plan.layers if ".experts." in x.module}
    assert shares == {2 / EXPERTS}
    assert {x.share for x in plan.layers if ".experts." not in x.module} == {1.0}
    assert len(plan.layers) == 2 * (4 + 3 * EXPERTS)
    assert Need.GRAM in plan.needs


def test_the_plan_tells_what_readers_make_of_experts(models):
    source = open_source(models / "qwen3_moe")
    of = lambda recipe: " ".join(make_plan(source, recipe, FEW)[0].caveats)  # noqa: E731
    assert "without zero points only" in of(awq(group_size=32))
    assert "without zero points only" not in of(gptq(group_size=32, symmetric=True))
    assert "an expert gets about 144, few for layers of 64 inputs" in of(gptq(group_size=32))
    rules = (Rule(match="*.down_proj", weight=INT8), *rtn(group_size=32).rules)
    assert "one format for them" in of(Recipe(name="mixed", rules=rules))


def test_experts_of_an_unknown_kind_are_refused_by_name():
    """Where nothing tells a fused module's layout it would stay float, and with it most of the model."""
    model = tiny("mixtral")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\)"):
        assign(model, find_blocks(model), rtn(), {})


def test_a_rotation_is_refused_in_words(models, tmp_path):
    with pytest.raises(InputError, match="router or fused experts"):
        fewbit.quantize(models / "mixtral", quarot(), output=tmp_path / "out", calibration=FEW)


def test_a_float32_router_bias_of_a_half_precision_model_keeps_its_bits(tmp_path):
    model = tiny("deepseek_v3").bfloat16()
    bias = torch.linspace(-0.1, 0.1, EXPERTS) + 1e-5
    model.model.layers[1].mlp.gate.e_score_correction_bias = bias.clone()
    save_tiny("deepseek_v3", tmp_path / "model")  # for its tokenizer
    model.save_pretrained(tmp_path / "model")
    fewbit.quantize(tmp_path / "model", rtn(group_size=32), output=tmp_path / "out")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    kept = tensors_of(tmp_path / "out")[name]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, bias)
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(half.get_buffer(name), bias)
