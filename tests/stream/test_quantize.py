"""The main road on tiny models of every architecture: quantize, save, reload, and the checks on the way."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Group
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule, gptq, rtn
from fewbit.solve import Ldlq, Rtn
from fewbit.stream.data import Calibration
from fewbit.stream.job import MANIFEST, RECIPE
from fewbit.stream.progress import Progress
from fewbit.stream.verify import stream_logits

FEW = Calibration(samples=6, seqlen=48)
IDS = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(1))


def logits(path):
    return stream_logits(open_source(path), IDS)


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_quantizes_saves_reloads_and_stays_close(arch, tmp_path):
    save_tiny(arch, tmp_path / "model")
    result = fewbit.quantize(
        tmp_path / "model", gptq(bits=8, group_size=32), output=tmp_path / "out", calibration=FEW
    )
    assert result.difference == 0
    assert all(0 < row.error < 1e-3 and row.tokens == 6 * 48 for row in result.rows)
    original, got = logits(tmp_path / "model"), logits(tmp_path / "out")
    assert torch.isfinite(got).all()
    assert (got - original).norm() < 0.03 * original.norm()
    with torch.no_grad():
        loaded = fewbit.load(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(loaded, got, rtol=1e-4, atol=1e-4 * float(got.abs().max()))
    assert not (tmp_path / "out.partial").exists()
    stored = [n for n in (tmp_path / "out").iterdir() if n.suffix == ".safetensors"]
    assert sum(p.stat().st_size for p in stored) < 1.05 * result.plan.size_bytes + 20_000


def test_gptq_beats_rounding_on_every_layer_of_the_same_grid(llama, tmp_path):
    errors = {}
    for name, solver in {"rtn": Rtn(), "gptq": Ldlq()}.items():
        # the range rule asks for the same statistics in both
        fmt = gptq(bits=3, group_size=32).rules[0].weight
        recipe = Recipe(name=name, rules=(Rule(weight=fmt, solver=solver),))
        result = fewbit.quantize(llama, recipe, output=tmp_path / name, calibration=FEW)
        errors[name] = {row.layer: row.error for row in result.rows}
    assert errors["gptq"].keys() == errors["rtn"].keys()
    assert sum(errors["gptq"].values()) < 0.8 * sum(errors["rtn"].values())


def test_suspension_at_blocks_gathers_the_same_first_groups(llama, tmp_path):
    by_depth = {}
    for depth in ("linear", "block"):
        result = fewbit.quantize(
            llama, gptq(group_size=32), output=tmp_path / depth, calibration=FEW, depth=depth
        )
        assert result.plan.depth == depth
        assert result.difference == 0
        by_depth[depth] = {row.layer: row.error for row in result.rows}
    first = [n for n in by_depth["linear"] if "layers.0.self_attn.q" in n]
    assert [by_depth["linear"][n] for n in first] == [by_depth["block"][n] for n in first]
    later = "model.layers.0.mlp.down_proj"
    assert by_depth["linear"][later] != by_depth["block"][later]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_bits(llama, tmp_path, stop_after):
    class Interrupt(Progress):
        def block(self, done, total, resumed):
            if done == stop_after:
                raise KeyboardInterrupt

    whole = fewbit.quantize(llama, gptq(group_size=32), output=tmp_path / "whole", calibration=FEW)
    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(
            llama, gptq(group_size=32), output=tmp_path / "broken", calibration=FEW, progress=Interrupt()
        )
    assert not (tmp_path / "broken").exists()
    result = fewbit.quantize(llama, gptq(group_size=32), output=tmp_path / "broken", calibration=FEW)
    assert result.resumed_blocks == stop_after
    assert result.rows == whole.rows
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_the_same_command_after_success_says_so_and_another_is_refused(llama, tmp_path):
    fewbit.quantize(llama, rtn(group_size=32), output=tmp_path / "out")
    before = files(tmp_path / "out")
    again = fewbit.quantize(llama, rtn(group_size=32), output=tmp_path / "out")
    assert again.finished_before
    assert files(tmp_path / "out") == before
    with pytest.raises(InputError, match="holds something else"):
        fewbit.quantize(llama, rtn(bits=8, group_size=32), output=tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_another_runs_work_folder_is_refused(llama, tmp_path):
    class Interrupt(Progress):
        def block(self, done, total, resumed):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(llama, rtn(group_size=32), output=tmp_path / "out", progress=Interrupt())
    with pytest.raises(InputError, match=r"another run \(different recipe\)"):
        fewbit.quantize(llama, rtn(group_size=16), output=tmp_path / "out")


def test_rules_choose_formats_by_name_and_leave_the_rest(llama, tmp_path):
    int8 = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
    int4 = Format(grid=by_name("int4"), block=Group(32), scale=FP16)
    recipe = Recipe(
        name="mixed",
        rules=(
            Rule(match="*.down_proj", weight=int8),
            Rule(match="*.layers.0.*", weight=None),
            Rule(match="*_proj", weight=int4, solver=Ldlq()),
        ),
    )
    result = fewbit.quantize(llama, recipe, output=tmp_path / "out", calibration=FEW)
    formats = {layer.name: layer.format for layer in result.plan.layers}
    assert all((f == int8) == n.endswith("down_proj") for n, f in formats.items())
    assert not any(".layers.0." in n and not n.endswith("down_proj") for n in formats)
    assert "model.layers.0.self_attn.q_proj" in result.plan.left
    original = open_source(llama).read(["model.layers.0.self_attn.q_proj.weight"])
    kept = open_source(tmp_path / "out").read(["model.layers.0.self_attn.q_proj.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(kept[name], original[name].to(kept[name].dtype))
    assert fewbit.recipes.from_yaml((tmp_path / "out" / RECIPE).read_text()) == recipe


def test_a_solver_goes_onto_any_grid(llama, tmp_path):
    others = (  # and whose layout holds it
        ("native", {"grid": "nf4"}),
        ("compressed-tensors", {"grid": "e2m1", "scale": "e8m0"}),  # MXFP4
        ("native", {"grid": "e2m1", "scale": "e4m3"}),  # no float32 step over the steps, as NVFP4 has
    )
    for i, (layout, settings) in enumerate(others):
        result = fewbit.quantize(
            llama, gptq(group_size=32, range="absmax", **settings), output=tmp_path / str(i), calibration=FEW
        )
        assert result.plan.checkpoint == layout
        assert bool(result.plan.checkpoint_reason) == (layout != "compressed-tensors")
        assert result.difference == 0
        assert result.plan.bits_per_weight < 4.6


def test_the_manifest_tells_the_run_and_nothing_of_the_clock(llama, tmp_path):
    result = fewbit.quantize(llama, gptq(group_size=32), output=tmp_path / "out", calibration=FEW)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["job"]["calibration"]["samples"] == 6
    assert len(manifest["job"]["calibration"]["tokens_sha256"]) == 64
    assert manifest["job"]["versions"]["torch"] == torch.__version__
    assert manifest["bits_per_weight"] == result.plan.bits_per_weight == 4 + 16 / 32
    assert len(manifest["layers"]) == len(result.plan.layers)
    assert not any("second" in key or "time" in key for row in manifest["layers"] for key in row)


def test_the_global_generator_is_never_touched(llama, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fewbit.quantize(llama, gptq(group_size=32), output=tmp_path / "out", calibration=FEW)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_nan_in_a_shard_is_named_and_nothing_is_left(llama, tmp_path, name):
    shutil.copytree(llama, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} holds 1 "):
        fewbit.quantize(tmp_path / "bad", rtn(group_size=32), output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_rule_that_matches_nothing_is_refused_before_any_work(llama, tmp_path):
    recipe = Recipe(name="r", rules=(Rule(match="*"), Rule(match="*.nothing", weight=FP16)))
    with pytest.raises(InputError, match=r"rule 2 .*'\*\.nothing'.* none of the \d+ linear"):
        fewbit.quantize(llama, recipe, output=tmp_path / "out")
    with pytest.raises(InputError, match="leaves every layer"):
        fewbit.quantize(llama, Recipe(name="r", rules=(Rule(match="*"),)), output=tmp_path / "out")
    with pytest.raises(InputError, match=r"group size 48 does not divide the 64 input columns of layer .*32"):
        fewbit.quantize(llama, rtn(group_size=48), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_mid_run_leaves_whole_blocks_to_resume_from(llama, tmp_path, monkeypatch):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        fewbit.quantize(llama, rtn(group_size=32), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = sorted(p.name for p in (tmp_path / "out.partial").iterdir())
    assert left == ["block-00000.safetensors", "job.json"]
    assert fewbit.quantize(llama, rtn(group_size=32), output=tmp_path / "out").resumed_blocks == 1


def test_many_shards_have_an_index_that_lists_every_tensor(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbit.stream.job.SHARD_BYTES", 60_000)
    fewbit.quantize(llama, gptq(group_size=32), output=tmp_path / "out", calibration=FEW)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted({*index.values()})
    assert len(shards) > 1
    held = {}
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as f:
            held.update(dict.fromkeys(f.keys(), shard))
    assert held == index
