"""Claims: experts as linears compute what the fused module does, and are cut from a fused file exactly."""

import pytest
import torch
from tiny import EXPERTS, MIXTURES, save_tiny, tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.io.skeleton import build_skeleton, parameter_map
from fewbit.io.source import open_source
from fewbit.nn.blocks import linears
from fewbit.nn.experts import Experts, Names, in_experts, routers, split_experts


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_loaded_model_is_the_saved_one_and_every_expert_has_its_linears(arch, tmp_path):
    saved = save_tiny(arch, tmp_path)
    model = fewbit.load(tmp_path)
    with torch.no_grad():
        want, got = saved(tiny_ids()).logits, model(tiny_ids()).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    for name, experts in in_experts(model).items():
        assert len(experts) == EXPERTS
        inside = [n for n in linears(model) if n.startswith(f"{name}.")]
        assert len(inside) == 3 * EXPERTS
    assert not any(p.ndim == 3 for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "names"),
    [("mixtral", Names(gate="w1", up="w3", down="w2")), ("qwen3_moe", Names()), ("deepseek_v3", Names())],
)
def test_matrices_have_the_names_of_the_file(arch, names, tmp_path):
    save_tiny(arch, tmp_path)
    source = open_source(tmp_path)
    model = build_skeleton(source)
    mapping, unused = parameter_map(source, model)
    assert unused == ()
    for experts in in_experts(model).values():
        assert experts.names == names
    inside = {n: s for n, s in mapping.items() if ".experts." in n}
    assert inside
    assert all(n.split(".experts.")[1] == s.split(".experts.")[1] for n, s in inside.items())


def test_a_fused_file_is_cut_exactly_and_read_one_expert_at_a_time(tmp_path):
    saved = save_tiny("gpt_oss", tmp_path)
    source = open_source(tmp_path)
    mapping, unused = parameter_map(source, build_skeleton(source))
    assert unused == ()
    assert not any(n.endswith("gate_up_proj") for n in source.tensors())  # shown cut, and only so
    fused, base = saved.model.layers[1].mlp.experts, "model.layers.1.mlp.experts"
    parts = {
        "gate_proj": (fused.gate_up_proj[:, :, ::2], fused.gate_up_proj_bias[:, ::2]),
        "up_proj": (fused.gate_up_proj[:, :, 1::2], fused.gate_up_proj_bias[:, 1::2]),
        "down_proj": (fused.down_proj, fused.down_proj_bias),
    }
    for e in range(EXPERTS):
        for name, (w, b) in parts.items():
            own = {k: mapping[f"{base}.{e}.{name}.{k}"] for k in ("weight", "bias")}
            read = source.read(own.values())
            assert torch.equal(read[own["weight"]], w[e].T)
            assert torch.equal(read[own["bias"]], b[e])
            info = source.tensors()[own["weight"]]
            assert (info.shape, info.nbytes) == (tuple(w[e].T.shape), 4 * w[e].numel())


def test_a_fused_file_of_another_shape_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("gpt_oss", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name][:, :16].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    with pytest.raises(InputError, match=r"experts\.down_proj with shape .* config asks for"):
        parameter_map(source, build_skeleton(source))


def test_what_routes_is_a_router_and_no_linear_layer():
    found = {}
    for arch in ("mixtral", "qwen2_moe", "gpt_oss", "llama"):
        model = tiny(arch)
        split_experts(model)
        block = model.model.layers[1]
        found[arch] = set(routers(block))
        assert not found[arch] & set(linears(block))
    assert found == {
        "mixtral": {"mlp.gate"},
        "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"},  # the second is an nn.Linear of one output
        "gpt_oss": {"mlp.router"},
        "llama": set(),
    }


def test_only_routed_tokens_count_and_places_beyond_the_last_expert_are_none():
    model = tiny("qwen3_moe")
    split_experts(model)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.shape[0]))
    assert isinstance(experts, Experts)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    none = EXPERTS
    index, weight = torch.tensor([[0, none], [2, 0], [none, none]]), torch.tensor([[0.5, 9.0]] * 3)
    with torch.no_grad():
        y = experts(x, index, weight)
        one, two = 0.5 * experts[0](x[:1]), 0.5 * experts[2](x[1:2]) + 9 * experts[0](x[1:2])
    torch.testing.assert_close(y[:2], torch.cat([one, two]))
    assert not y[2].any()
