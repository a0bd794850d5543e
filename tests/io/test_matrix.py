"""Every scheme beside the code of a client: logits of transformers, or of the layout's formula, against ours.

The clients run in one process in which fewbit is never imported (``clients.py``). A difference is the largest
of the logits over the largest logit. 0 to 1e-5: nothing but the order of sums. More, where a client rounds
otherwise: bfloat16 in which it decodes or computes, steps of int8 tokens from max / 127.5 and not max / 127.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_ids
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.format import FP32, Block2d, Format, Group
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io.gguf_write import write
from fewbit.io.load import load
from fewbit.io.ordered import OrderedTensor
from fewbit.io.source import open_source
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache, QuantizedLayer
from fewbit.nn.kvsteps import kept
from fewbit.recipe import Recipe, Rule, named
from fewbit.stream.client import SCRIPT
from fewbit.stream.data import Calibration
from fewbit.stream.export import export
from fewbit.stream.quantize import quantize

from .layouts import decode_awq, decode_gptq, decode_ordered

CT, FEW = "compressed-tensors", Calibration(samples=4, seqlen=32)
G32, ROWS = {"group_size": "32"}, {"group_size": "-1"}
ASYM, EIGHT = {"symmetric": "false"}, {"bits": "8"}
W8A8 = EIGHT | ROWS
EXACT, TOKENS, BF16 = 1e-5, 0.02, 0.02  # tokens: steps of max / 127.5; bf16: of decoded weights


def tiles(size: int, inputs: bool) -> Recipe:
    """FP8 in tiles, with inputs per group of that width."""
    e4m3 = by_name("e4m3fn")
    x = Activation(format=Format(grid=e4m3, block=Group(size), scale=FP32)) if inputs else None
    weight = Format(grid=e4m3, block=Block2d(size, size), scale=FP32)
    return Recipe(name="tiles", rules=(Rule(weight=weight, input=x),))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A scheme and its client. model: which tiny Llama; decode: the formula, where no client is installed."""

    name: str
    recipe: str | Recipe
    settings: dict = field(default_factory=dict)
    target: str = CT
    close: float = EXACT
    kv: str | None = None
    model: str = "narrow"
    decode: object = None
    ordered: bool = False


def gptq(v2: bool):
    return lambda tensors, module: decode_gptq(tensors, module, 4, v2)


SCHEMES = (
    Row(name="W4A16", recipe="gptq", settings=G32),
    Row(name="W4A16 per channel", recipe="rtn", settings=ROWS),
    Row(name="W4A16 asymmetric", recipe="rtn", settings=G32 | ASYM | {"scale": "fp32"}),
    Row(name="W3A16", recipe="rtn", settings=G32 | {"bits": "3"}),
    Row(name="W8A16", recipe="int8"),
    Row(name="W8A8 dynamic", recipe="rtn", settings=W8A8 | {"input": "int8"}, close=TOKENS),
    Row(name="W8A8 static", recipe="rtn", settings=W8A8 | {"input": "int8-static"}),
    Row(
        name="W8A8 static, asymmetric",
        recipe="w8a8",
        settings={"static": "true", "input": "tensor", "zero": "integer"},
    ),
    Row(name="W4A8", recipe="gptq", settings=G32 | {"input": "int8"}, close=TOKENS),
    Row(name="FP8 static", recipe="w8a8", settings={"grid": "e4m3fn", "static": "true", "input": "tensor"}),
    Row(name="FP8 dynamic", recipe="fp8-dynamic"),
    Row(name="FP8 blocks", recipe=tiles(32, inputs=True), close=BF16),
    Row(name="FP8 weights", recipe="fp8"),
    Row(name="NVFP4A16", recipe="rtn", settings={"format": "nvfp4"}, close=BF16),
    Row(name="NVFP4", recipe="rtn", settings={"format": "nvfp4", "input": "nvfp4"}, close=0.4),
    Row(name="MXFP4A16", recipe="rtn", settings={"format": "mxfp4"}, close=BF16),
    Row(name="MXFP4", recipe="rtn", settings={"format": "mxfp4", "input": "mxfp4"}, close=0.4),
    Row(name="MXFP8", recipe="rtn", settings={"format": "mxfp8-e4m3", "input": "mxfp8"}, close=0.1),
    Row(name="KV E4M3 per tensor", recipe="gptq", settings=G32, kv="fp8-tensor"),
    Row(name="KV E4M3 per head", recipe="rtn", settings=G32, kv="fp8-head"),
    Row(name="KV int8", recipe="rtn", settings=W8A8 | {"input": "int8-static"}, kv="int8-tensor"),
    Row(name="actorder", recipe="rtn", settings=G32 | ASYM | {"scale": "fp16"}, ordered=True,
        decode=lambda tensors, module: decode_ordered(tensors, module, 4)),
    Row(name="transform", recipe="quarot", settings=G32 | {"input_bits": "16"}),
    Row(name="transform, W8A8", recipe="quarot", settings={"bits": "8", "input_bits": "8"}, close=TOKENS),
    Row(name="GPTQ v1", recipe="gptq", settings=G32, target="gptq", decode=gptq(False)),
    Row(name="GPTQ v2", recipe="gptq", settings=G32 | ASYM, target="gptq_v2", decode=gptq(True)),
    Row(name="GPTQ v2, actorder", recipe="rtn", settings=G32 | ASYM, target="gptq_v2", ordered=True,
        decode=gptq(True)),
    Row(name="AWQ", recipe="gptq", settings=G32 | ASYM, target="awq",
        decode=lambda tensors, module: decode_awq(tensors, module, 32)),
    Row(name="NF4", recipe="nf4", settings={"scale": "fp32"}, target="bitsandbytes", close=BF16),
    Row(name="NF4, double", recipe="nf4", target="bitsandbytes", close=BF16),
    Row(name="LLM.int8()", recipe="llm-int8", settings={"calibrate": "false"}, target="bitsandbytes",
        close=BF16),
    Row(name="FP8 128 x 128", recipe=tiles(128, inputs=False), target="fp8", model="wide", close=0.05),
    Row(name="GGUF q8_0", recipe="rtn", settings={"format": "q8_0"}, target="gguf", close=1e-3),
    Row(name="GGUF q4_0", recipe="rtn", settings={"format": "q4_0"}, target="gguf", close=1e-3),
)  # fmt: skip


class Rounded(QuantizedLayer):
    """A call attends to its own keys and values as they are stored, as in transformers and vLLM."""

    def update(self, key_states, value_states, *args, **keywords):
        super().update(key_states, value_states)
        return tuple(store.read() for store in self.stores)


def logits(folder: Path) -> torch.Tensor:
    """Ours."""
    model = load(folder)
    found, cache = kept(model), None
    if found is not None:
        kv, steps = found
        cache = QuantizedCache(model.config, kv, steps)
        cache.layers = [Rounded(kv, *pair) for pair in zip(steps.key, steps.value, strict=True)]
    with torch.no_grad():
        return model(tiny_ids(), past_key_values=cache).logits.float()


def made(row: Row, root: Path) -> Path:
    """The checkpoint of a row."""
    recipe = row.recipe if isinstance(row.recipe, Recipe) else named(row.recipe, row.settings)
    recipe = recipe if row.kv is None else replace(recipe, kv=kv_format(row.kv))
    start = root / row.name.replace(" ", "_").replace("/", "_")
    quantize(root / row.model, recipe, output=start, calibration=FEW, read_back=False)
    if row.ordered:
        sort_columns(start)
    out = start.with_name(f"{start.name}-out")
    if row.target == "gguf":
        out.mkdir()
        shutil.copy(root / row.model / "config.json", out)  # says which class to load
        write(open_source(start), out / "model.gguf")
    else:
        export(start, row.target, out, verify=False)
    return out


def sort_columns(folder: Path) -> None:
    """Put the first q projection of a compressed-tensors checkpoint into groups of columns far apart."""
    from fewbit.io import compressed_tensors as ct
    from fewbit.io.checkpoint import save_tensors

    module, file = "model.layers.0.self_attn.q_proj", folder / "model.safetensors"
    q = open_source(folder).read_qtensor(module)
    order = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(0))
    save_tensors(file, load_file(file) | ct.to_dict(module, OrderedTensor(rest=q, order=order)))


def decoded(row: Row, folder: Path, root: Path) -> torch.Tensor:
    """Logits of a float model whose weights the layout's formula gives, in numpy."""
    tensors = load_file(folder / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(root / row.model, dtype=torch.float32).eval()
    state = {n: t for n, t in tensors.items() if n in model.state_dict()}
    modules = [n.rpartition(".")[0] for n in tensors if n.endswith(("qweight", "weight_packed"))]
    assert len(modules) == 14
    for module in modules:
        state[f"{module}.weight"] = torch.from_numpy(row.decode(tensors, module))
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        return model(tiny_ids()).logits


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(ours, the client's) by row."""
    root = tmp_path_factory.mktemp("matrix")
    save_tiny("llama", root / "narrow")
    own = LlamaConfig.from_pretrained(root / "narrow")
    save_tiny("llama", root / "wide")
    own.hidden_size, own.intermediate_size, own.num_key_value_heads, own.head_dim = 128, 256, 4, 32
    torch.manual_seed(0)
    LlamaForCausalLM(own).save_pretrained(root / "wide")
    torch.save(tiny_ids(), root / "ids.pt")
    folders = {row.name: made(row, root) for row in SCHEMES}
    jobs = [
        [str(folders[row.name]), str(root / "ids.pt"), f"{folders[row.name]}.pt", row.target]
        for row in SCHEMES
        if row.decode is None
    ]
    words = [sys.executable, str(Path(__file__).with_name("clients.py")), SCRIPT, json.dumps(jobs)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = {}
    for row in SCHEMES:
        folder = folders[row.name]
        theirs = torch.load(f"{folder}.pt") if row.decode is None else decoded(row, folder, root)
        path = folder / "model.gguf" if row.target == "gguf" else folder
        out[row.name] = (logits(path), theirs)
    return out


@pytest.mark.parametrize("row", SCHEMES, ids=lambda row: row.name)
def test_a_client_gives_our_logits(table, row):
    ours, theirs = table[row.name]
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    assert difference <= row.close, f"{row.name}: {difference:.2g}"
