"""transform_config: the library's modules do what our maps do, and what they cannot is refused in words."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import Group
from fewbit.io import compressed_maps as maps
from fewbit.io import compressed_tensors as ct
from fewbit.transform import Hadamard, Kronecker

from .layouts import entries_of, infos_of

ONLINE = (
    Hadamard(64),
    Hadamard(64, seed=3),
    Hadamard(64, block=16),
    Hadamard(48, seed=0),  # 12 x 4: no power of two
    Hadamard(96, block=12),
)


def written(map, name="m", rows=32):
    """Tensors and configuration of one module whose input takes ``map``."""
    fmt = int_format(4, block=Group(16))
    q = fmt.quantize(torch.randn(rows, map.size, generator=torch.Generator().manual_seed(0)))
    config = ct.quantization_config({name: fmt}, [], maps={name: map})
    return ct.to_dict(name, q) | maps.to_dict({name: map}, torch.bfloat16), json.loads(json.dumps(config))


@pytest.mark.parametrize("map", ONLINE, ids=str)
def test_the_library_s_own_transform_is_our_map_and_comes_back(map):
    tensors, config = written(map)
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(map.size, 32)})
    x = torch.randn(5, map.size)
    plain = torch.nn.functional.linear(map.apply(x), model["m"].weight, model["m"].bias)
    apply_transform_config(model, TransformConfig.model_validate(config["transform_config"]))
    own = dict(model.named_parameters())
    matrices = [n for n in tensors if "hadamard" in n]
    with torch.no_grad():
        for name in matrices:
            own[name].copy_(tensors[name])
        torch.testing.assert_close(model["m"](x), plain, rtol=1e-5, atol=1e-5)
    assert len(matrices) == (map.seed is not None or bool(map.factors[:-1]))
    entry = entries_of(ct, config, tensors)["m"]
    assert (entry.online, entry.output) == (map, None)
    assert ct.beside(config, infos_of(tensors)) == matrices


def test_one_matrix_serves_all_modules_with_its_map():
    fmt, map = int_format(4), Hadamard(64, seed=1)
    both = {"a": map, "b": Hadamard(64, seed=1), "c": Hadamard(64, seed=2), "d": None}
    stored = maps.to_dict(both, torch.float32)
    assert list(stored) == ["a.hadamard_64_seed1_input.weight", "c.hadamard_64_seed2_input.weight"]
    config = ct.quantization_config(dict.fromkeys(both, fmt), [], maps=both)
    targets = [g["apply"][0]["targets"] for g in config["transform_config"]["config_groups"].values()]
    assert targets == [["a", "b"], ["c"]]
    assert "transform_config" not in ct.quantization_config({"d": fmt}, [], maps={"d": None})


@pytest.mark.parametrize(
    ("online", "output", "words"),
    [
        (Hadamard(107), None, "matrices of +-1"),
        (Hadamard(64, seed=0, block=16), None, "signs differ from block to block"),
        (Kronecker(64), None, "not Kronecker"),
        (None, Hadamard(64, seed=0), "map of its output"),
    ],
    ids=str,
)
def test_maps_that_do_not_fit_are_refused_in_words(online, output, words):
    assert words in maps.refusal(online, output)
    assert maps.refusal(None, None) is None


def test_transforms_of_other_tools_are_read():
    """Sylvester's matrix by pattern, in blocks, before and after; weights turned offline need nothing."""
    tensors, config = written(Hadamard(64), "model.q_proj", rows=64)
    args = {"targets": ["re:.*q_proj"], "ignore": [], "inverse": True}
    group = {"type": "hadamard", "head_dim": 16, "randomize": False}
    config["transform_config"] = {
        "config_groups": {
            "u": group | {"apply": [{**args, "location": "output"}, {**args, "location": "weight_output"}]},
            "v": group | {"apply": [{**args, "location": "input"}, {**args, "location": "weight_input"}]},
        }
    }
    entry = entries_of(ct, config, tensors)["model.q_proj"]
    assert entry.online == entry.output == Hadamard(64, block=16)
    y, h = torch.randn(3, 64), torch.tensor([[1.0, 1], [1, -1]])
    sylvester = torch.kron(torch.kron(h, h), torch.kron(h, h)) / 4
    torch.testing.assert_close(entry.output.invert(y), (y.view(3, 4, 16) @ sylvester.T).flatten(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "random-matrix"}, "a map of type random-matrix"),
        ({"randomize": True}, "in a random order"),
        ({"head_dim": 7}, "in blocks of 7"),
        ({"location": "k_cache"}, "a map of k_cache"),
        ({"targets": ["Linear"]}, "a map of head, which is not quantized"),
        ({"twice": True}, "a second map of the input of m"),
    ],
)
def test_transforms_that_are_not_read_are_refused_in_words(change, words):
    tensors, config = written(Hadamard(64, seed=0))
    group = config["transform_config"]["config_groups"]["hadamard_64_seed0"]
    if change.pop("twice", None):
        group["apply"] *= 2
    for key, value in change.items():
        (group["apply"][0] if key in group["apply"][0] else group)[key] = value
    with pytest.raises(InputError, match=words):
        entries_of(ct, config, tensors | {"head.weight": torch.zeros(8, 64)})


def test_a_matrix_that_is_missing_or_another_s_is_refused():
    tensors, config = written(Hadamard(64, seed=0))
    name = "m.hadamard_64_seed0_input.weight"
    with pytest.raises(InputError, match="has no matrix of its transform hadamard_64_seed0"):
        entries_of(ct, config, {n: t for n, t in tensors.items() if n != name})
    for other, words in (
        (-tensors[name], "does not draw from the seed"),
        (torch.ones(8, 8), r"shape \[8, 8\]"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(ct, config, tensors | {name: other})
    group = {"type": "hadamard", "apply": [{"targets": ["m"], "location": "input"}]}
    config["transform_config"] = {"config_groups": {"u": group}}
    odd, _ = written(replace(Hadamard(48, seed=0)))
    with pytest.raises(InputError, match="Sylvester's matrix of 48 channels, which is no power of two"):
        entries_of(ct, config, odd)
