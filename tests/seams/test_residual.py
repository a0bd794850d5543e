"""Rotations of the residual stream: found, folded, proved, and refused where they cannot be."""

from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, VOCAB, tiny, tiny_ids
from torch import nn

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Format, QTensor, Token
from fewbit.grid import by_name
from fewbit.nn.blocks import find_blocks, weight_of
from fewbit.nn.linear import QLinear, transform_input
from fewbit.seams.heads import Values, find_values, fold_online, rotate_values, rotate_values_checked
from fewbit.seams.norms import absorb, form_of
from fewbit.seams.residual import Centred, find_residual, fold_gains, rotate, rotate_checked
from fewbit.seams.rotation import block_calls, find_outside, rotate_model, rotate_stream
from fewbit.transform import Diagonal, Hadamard, Orthogonal

REFUSED = {"gemma3": "post_attention_layernorm of Gemma3", "bert": r"output\.LayerNorm of BertLayer"}
ROTATED = [a for a in ARCHITECTURES if a not in REFUSED]
INT4 = Format(grid=by_name("int4"), block=Token(), scale=FP32)
IDS = tiny_ids()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def difference(a, b):
    return float(((a - b).norm() / a.norm()).detach())


def block_of(arch, index=0):
    """A block of a tiny model, and what runs it on the inputs it has in the model's forward."""
    _, block, call = list(block_calls(tiny(arch), IDS))[index]
    return block, call


@pytest.mark.parametrize("arch", ROTATED)
def test_rotations_leave_the_logits_and_move_every_linear(arch):
    model = tiny(arch)
    before = logits(model)
    old = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2 and "norm" not in n}
    done = rotate_model(model, seed=3)
    assert difference(before, logits(model)) < 1e-5
    assert len(done.values) == len(find_blocks(model))
    assert len(done.online) == 2 * len(find_blocks(model))  # before what attention and the MLP write with
    for name, weight in old.items():  # each is multiplied by something, none only scaled
        new = model.get_parameter(name)
        cosine = torch.cosine_similarity(new.flatten(), weight.flatten(), dim=0)
        assert cosine.abs() < 0.7, name


@pytest.mark.parametrize("arch", ROTATED)
def test_the_rotated_stream_is_the_old_one_times_q(arch):
    model = tiny(arch)
    before = [call() for _, _, call in block_calls(model, IDS)]
    q = rotate_stream(model).stream
    for old, (_, _, call) in zip(before, block_calls(model, IDS), strict=True):
        old, new = (x if isinstance(x, torch.Tensor) else x[0] for x in (old, call()))
        assert difference(q.apply(old), new) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "opt", "falcon"])
def test_a_rotated_stream_is_an_ordinary_checkpoint_of_the_same_class(arch, tmp_path):
    model = tiny(arch)
    before = logits(model)
    names = set(model.state_dict())
    done = rotate_stream(model)
    assert done.untied == ("lm_head.weight",)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert difference(before, logits(type(model).from_pretrained(tmp_path))) < 1e-5


@pytest.mark.parametrize("arch", REFUSED)
def test_models_with_a_norm_in_the_way_are_refused_by_its_name_and_left_alone(arch):
    model = tiny(arch)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(InputError, match=REFUSED[arch]):
        rotate_model(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def small(name, **own):
    """A tiny model of another architecture."""
    import transformers as hf

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(hf, f"{name}Config")(**{**sizes, **heads, **own})
        model = getattr(hf, f"{name}ForCausalLM")(config).eval()
        for p in model.parameters():
            p.data.mul_(3) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ["Gemma", "Granite", "Olmo", "Cohere", "Nemotron"])
def test_other_norms_and_multipliers_and_sizes_need_no_table(name):
    """1 + weight; scaled residuals; norms without weights; one norm for two readers; LayerNorm of 1 + weight.
    96 = 12 x 8 and 160 = 20 x 8: Hadamard matrices that are not symmetric.
    """
    own = {"Gemma": {"head_dim": 24}, "Granite": {"residual_multiplier": 0.3, "embedding_multiplier": 4.0}}
    model = small(name, **own.get(name, {}))
    before = logits(model)
    done = rotate_model(model)
    assert difference(before, logits(model)) < 1e-5
    assert len(done.values) == 2


@pytest.mark.parametrize(
    ("name", "own", "reason"),
    [
        ("Mixtral", {"num_local_experts": 4}, "no linear reads what post_attention_layernorm"),
        ("Olmo2", {}, "post_feedforward_layernorm .* norms what is added"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "word_embeddings_layernorm"),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 128}, "embed_positions"),
        (
            "OPT",
            {"do_layer_norm_before": False, "ffn_dim": 128},
            "final_layer_norm .* norms what the",
        ),
    ],
)
def test_what_cannot_be_rotated_is_named(name, own, reason):
    with pytest.raises(InputError, match=f"{reason}.*; leave rotations out of the recipe for this model"):
        rotate_model(small(name, **own))


def test_readers_and_writers_are_found_in_serial_and_parallel_blocks():
    found = find_residual(*block_of("llama"))
    norms = {n.name: n.readers for n in found.norms}
    assert norms == {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    assert found.writers == ("self_attn.o_proj", "mlp.down_proj")
    assert not found.centred
    found = find_residual(*block_of("falcon"))
    assert [n.readers for n in found.norms] == [("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)]
    assert found.writers == ("self_attention.dense", "mlp.dense_4h_to_h")
    assert found.centred
    assert find_residual(*block_of("gpt2")).writers == ("attn.c_proj", "mlp.c_proj")


@pytest.mark.parametrize("arch", ["qwen2", "opt", "falcon"])
def test_gains_fold_into_the_readers_alone(arch):
    block, call = block_of(arch)
    before = call()
    residual = find_residual(block, call)
    fold_gains(block, residual)
    after = call()
    first = lambda x: x if isinstance(x, torch.Tensor) else x[0]  # noqa: E731
    assert difference(first(before), first(after)) < 1e-6
    assert all((block.get_submodule(n.name).weight == 1).all() for n in residual.norms)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_gain_of_one_plus_weight_is_told_from_a_gain_of_weight(shift):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, linear = (Gemma3RMSNorm if shift else LlamaRMSNorm)(32), nn.Linear(32, 8)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    form = form_of(norm, 32)
    assert (form.shift, form.centred) == (shift, False)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = linear(norm(x))
        absorb(norm, "norm", [linear])
        assert difference(before, linear(norm(x))) < 1e-6
    assert (norm.weight == 1 - shift).all()
    assert form_of(nn.Tanh(), 32) is None
    assert form_of(nn.Identity(), 32) is None


@pytest.mark.parametrize("taken", [True, False])
def test_the_bias_of_a_norm_goes_to_the_readers_that_have_one_or_stays(taken):
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 8, bias=taken)
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    q = Centred(Hadamard(32, seed=0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)) + 1
    with torch.no_grad():
        before = linear(norm(x))
        absorb(norm, "norm", [linear], q)
        assert difference(before, linear(norm(q.apply(x)))) < 1e-6
        assert bool(norm.bias.any()) != taken
        norm.weight[3], norm.bias[3] = 0, 1
    if not taken:
        with pytest.raises(InputError, match=r"norm blocks\.7\.ln has channels with gain 0"):
            absorb(norm, "blocks.7.ln", [linear])


@pytest.mark.parametrize("n", [64, 96, 576, 868])
def test_a_centred_map_is_orthogonal_keeps_the_mean_and_spreads_outliers(n):
    q = Centred(Hadamard(n, seed=1))
    t = q.apply(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(t @ t.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(t.sum(0), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close(q.invert(t), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    largest = t.abs().amax(1) * n**0.5
    assert largest.median() < 2
    assert largest.max() < 5
    assert q == Centred(Hadamard(n, seed=1))


def test_maps_that_do_not_fit_the_stream_are_refused():
    block, call = block_of("opt")
    residual = find_residual(block, call)
    with pytest.raises(InputError, match=r"LayerNorm subtracts the mean.* give Centred"):
        rotate(block, residual, Hadamard(64, seed=0))
    with pytest.raises(InputError, match="does not fit a residual stream of 64 channels"):
        rotate(block, residual, Hadamard(128, seed=0))
    with pytest.raises(InputError, match="not orthogonal"):
        rotate(block, residual, Diagonal(torch.full((64,), 2.0)))


def test_a_block_with_more_in_it_than_was_found_is_refused_and_put_back():
    block, call = block_of("llama")
    residual = find_residual(block, call)
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    block.self_attn.register_forward_hook(lambda m, a, out: (out[0].clamp(-0.01, 0.01), *out[1:]))
    with pytest.raises(InputError, match="reaches post_attention_layernorm of LlamaDecoderLayer is not"):
        rotate_checked(block, residual, Hadamard(64, seed=0), call)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    block, call = block_of("llama")
    lost = replace(residual, writers=residual.writers[1:])
    with pytest.raises(InputError, match="reaches post_attention_layernorm"):
        rotate_checked(block, lost, Hadamard(64, seed=0), call)


@pytest.mark.parametrize(
    ("arch", "source", "first", "last"),
    [
        ("llama", "self_attn.v_proj", 0, 16),  # heads 0 and 1 of the queries share values 0
        ("gpt2", "attn.c_attn", 128, 176),  # all queries, all keys, all values
        ("gpt_neox", "attention.query_key_value", 32, 176),  # query, key, value of each head
        ("phi3", "self_attn.qkv_proj", 96, 112),
        ("falcon", "self_attention.query_key_value", 48, 112),  # two queries, key, value of each group
    ],
)
def test_values_are_found_in_separate_fused_and_interleaved_projections(arch, source, first, last):
    block, call = block_of(arch)
    values = find_values(block, find_residual(block, call), call)
    assert (values.source, values.head_dim, len(values.rows)) == (source, 16, 4)
    assert values.rows[0] == tuple(range(first, first + 16))
    assert values.rows[3] == tuple(range(last, last + 16))


def test_the_size_of_a_head_is_found_without_its_name():
    block, call = block_of("opt")
    residual = find_residual(block, call)
    named = find_values(block, residual, call)
    own, run = block.self_attn.head_dim, block.self_attn.forward
    block.self_attn.head_dim = None

    def forward(*args, **kwargs):
        block.self_attn.head_dim = own
        try:
            return run(*args, **kwargs)
        finally:
            block.self_attn.head_dim = None

    block.self_attn.forward = forward
    assert find_values(block, residual, call) == named
    assert named.head_dim == 16


def test_a_rotation_across_heads_is_refused_and_put_back():
    block, call = block_of("mistral")
    values = find_values(block, find_residual(block, call), call)
    with pytest.raises(InputError, match="does not fit heads of 16 channels"):
        rotate_values(block, values, Hadamard(32))
    block, call = block_of("opt")
    rows = torch.arange(64).view(2, 32).tolist()
    wrong = Values(source="self_attn.v_proj", writer="self_attn.out_proj", rows=tuple(map(tuple, rows)))
    before = block.self_attn.v_proj.weight.detach().clone()
    with pytest.raises(InputError, match="changed its output"):
        rotate_values_checked(block, wrong, Hadamard(32), call)
    assert torch.equal(block.self_attn.v_proj.weight, before)


def test_any_orthogonal_map_serves_the_values():
    """A learned one, say: SpinQuant's R2."""
    block, call = block_of("qwen2")  # value biases; two query heads on one value head
    values = find_values(block, find_residual(block, call), call)
    r = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    before = call()
    rotate_values_checked(block, values, Orthogonal(r), call)
    assert difference(before, call()) < 1e-6


def test_an_online_map_and_its_folded_weight_cancel_in_a_quantized_layer():
    linear, t = nn.Linear(96, 32), Hadamard(96, seed=2)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = linear(x)
        fold_online(linear, t)
        int8 = Format(grid=by_name("int8"), block=Token(), scale=FP32)
        w = linear.weight.detach()
        q = int8.encode(w, int8.fit(w))
        assert isinstance(q, QTensor)
        assert difference(before, QLinear(q, linear.bias, online=t)(x)) < 0.01
        assert difference(before, linear(x)) > 0.5


def test_an_outlying_head_is_spread_over_all_inputs_of_o():
    spread = {}
    for online in (False, True):
        model = tiny("llama")
        block = model.model.layers[0]
        with torch.no_grad():
            block.self_attn.v_proj.weight[:16] *= 100  # one of two heads of values, of 16 channels
        (rotate_model if online else rotate_stream)(model)
        read = []
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, args: read.append(args[0]))  # noqa: B023
        logits(model)
        x = read[0].flatten(0, -2)
        spread[online] = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()
        heads = x.unflatten(-1, (4, 16)).square().mean((0, 2)).sqrt()
        assert bool(heads.max() < 3 * heads.min()) == online
    assert spread[True] < 0.9 * spread[False]


def test_half_precision_is_proved_within_its_rounding():
    model = tiny("llama").bfloat16()
    before = logits(model)
    rotate_model(model)
    assert difference(before, logits(model)) < 0.03


def test_the_outside_of_a_model_is_found_without_its_blocks():
    model = tiny("llama")
    for block in find_blocks(model).modules:
        block.to("meta")
    outside = find_outside(model)
    assert (outside.embeddings, outside.norm, outside.head) == (
        ("model.embed_tokens",),
        "model.norm",
        "lm_head",
    )
    assert outside.tied


def plant(model, by, channels):
    """Multiply channels of every norm's gain and divide the readers' columns: the function stays."""
    for _, block, call in block_calls(model, IDS):
        for norm in find_residual(block, call).norms:
            block.get_submodule(norm.name).weight.data[channels] *= by
            for reader in norm.readers:
                weight_of(block.get_submodule(reader)).data[:, channels] /= by


def int4_errors(model, ids):
    """||Q(x) W^T - x W^T|| / ||x W^T|| squared, x in int4 per token, of each linear that reads a norm."""
    errors, undo = {}, []
    for name, block, call in block_calls(model, ids):
        for reader in (r for norm in find_residual(block, call).norms for r in norm.readers):
            module = block.get_submodule(reader)

            def measure(x, module=module, key=f"{name}.{reader}"):
                rows, w = x.flatten(0, -2), weight_of(module)
                e = INT4.encode(rows, INT4.fit(rows)).dequantize() - rows
                errors[key] = float((e @ w.T).square().sum() / (rows @ w.T).square().sum())
                return x

            undo.append(transform_input(module, measure))
    logits(model, ids)
    for take_off in undo:
        take_off()
    return errors


def falls(model, ids, by, channels):
    """How many times the error of each reader falls when a model with planted outliers is rotated."""
    before = logits(model, ids)
    plant(model, by, channels)
    bad = int4_errors(model, ids)
    rotate_stream(model)
    good = int4_errors(model, ids)
    assert difference(before, logits(model, ids)) < 1e-4
    return torch.tensor([bad[name] / good[name] for name in bad]), good


def test_planted_outliers_cost_3_times_less_in_int4_after_a_rotation():
    gain, good = falls(tiny("llama"), IDS, 50, [5, 17])
    assert gain.min() > 3
    assert max(good.values()) < 0.04


@pytest.mark.slow
def test_planted_outliers_of_smollm2_cost_3_times_less_in_int4_after_a_rotation():
    ids = torch.randint(1000, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    gain, good = falls(fewbit.load("smollm2"), ids, 50, [7, 100, 321])
    assert gain.min() > 3
    assert sorted(good.values())[len(good) // 2] < 0.04
