"""The roads of serve_vllm.py, and our side of one: quantize, export, continue, read.

    python benchmarks/serve_roads.py ROAD --keep FOLDER [--device cuda] [--model smollm2]

Writes FOLDER/<road>.json: the checkpoint, the prompts, our greedy tokens with their gaps and
log-probabilities, and the log-probabilities in another dtype.
"""

import argparse
import fcntl
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from serve_prompts import greedy
from transformers.cache_utils import DynamicCache, DynamicLayer

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, Block2d, Format, Group
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache, QuantizedLayer
from fewbit.nn.kvsteps import kept
from fewbit.recipe import Recipe, Rule, named
from fewbit.stream.data import Calibration
from fewbit.stream.export import export

ROOT = Path(__file__).parent
PLAIN = ["The capital of France is", "Quantization is", "Water boils at"]
OTHER = {"float16": "float32", "bfloat16": "float32", "float32": "float16"}


@dataclass(frozen=True, kw_only=True)
class Road:
    """A recipe by name ("tiles": FP8 in tiles of 64 x 64) and its settings; steps of keys and values; the
    layout of an export; dtypes on a CPU and on a GPU; code that the engine's process runs first on a CPU.
    cut: our keys and values are cut off to E4M3 and not rounded, as vLLM's operator on a CPU does."""

    recipe: str
    settings: dict = field(default_factory=dict)
    kv: str | None = None
    layout: str | None = None
    cpu: str = "float16"
    cuda: str = "float16"
    mend: str = ""
    cut: bool = False


G64, ASYM = {"group_size": "64"}, {"symmetric": "false"}
FP8 = {"grid": "e4m3fn"}
# vLLM 0.32 calls a method on a CPU that its class of maps does not have
CPU_LINEAR = """
import torch
from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import HadamardTransform
HadamardTransform.cpu_linear = staticmethod(torch.nn.functional.linear)
"""
TURNED = {"recipe": "quarot", "settings": G64 | {"input_bits": "16"}, "layout": "compressed-tensors"}
ROADS = {
    "W4A16 symmetric": Road(recipe="gptq", settings=G64),
    "W4A16 asymmetric": Road(recipe="gptq", settings=G64 | ASYM),
    "W8A16": Road(recipe="int8"),
    "W8A8 int8 dynamic": Road(recipe="w8a8", cpu="float32"),
    "W8A8 int8 dynamic, SmoothQuant": Road(recipe="smoothquant", cpu="float32"),
    "W8A8 int8 static": Road(recipe="w8a8", settings={"static": "true", "input": "tensor"}, cpu="float32"),
    "FP8 dynamic": Road(recipe="fp8-dynamic"),
    "FP8 static": Road(recipe="w8a8", settings=FP8 | {"static": "true", "input": "tensor"}),
    "FP8 in tiles of 64 x 64": Road(recipe="tiles", cuda="bfloat16"),
    "NVFP4A16": Road(recipe="gptq", settings={"format": "nvfp4"}, cuda="bfloat16"),
    "NVFP4": Road(recipe="gptq", settings={"format": "nvfp4", "input": "nvfp4"}, cuda="bfloat16"),
    "MXFP4A16": Road(recipe="gptq", settings={"format": "mxfp4"}, cuda="bfloat16"),
    "W4A16, keys and values in E4M3": Road(recipe="gptq", settings=G64, kv="fp8-tensor", cuda="bfloat16"),
    "W4A16, keys and values in E4M3, ours cut off": Road(
        recipe="gptq", settings=G64, kv="fp8-tensor", cut=True
    ),
    "QuaRot W4A16, transform_config": Road(**TURNED),
    "QuaRot W4A16, transform_config, `cpu_linear` added to vLLM": Road(**TURNED, mend=CPU_LINEAR),
    "GPTQ layout, symmetric": Road(recipe="gptq", settings=G64, layout="gptq"),
    "AWQ layout": Road(recipe="gptq", settings=G64 | ASYM, layout="awq"),
    "NF4, plugin": Road(recipe="nf4", cpu="float32"),
    "NF4, stored steps of keys and values, plugin": Road(
        recipe="nf4", kv="fp8-tensor", cpu="float32", cuda="bfloat16"
    ),
    "HIGGS, 4 bit, plugin": Road(recipe="higgs", settings={"bits": "4"}, cpu="float32"),
    "QTIP, 4 bit, plugin": Road(recipe="qtip", settings={"bits": "4", "state_bits": "10"}, cpu="float32"),
    "QuaRot W4A16, plugin": Road(recipe="quarot", settings={"input_bits": "16"}, cpu="float32"),
    "QuaRot W4A4, plugin": Road(recipe="quarot", cpu="float32"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("road", choices=list(ROADS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="smollm2", help="or a folder or file of it")
    parser.add_argument("--keep", type=Path, required=True, help="where checkpoints stay")
    args = parser.parse_args()
    make(args, args.road)


def make(args, name: str) -> None:
    """Quantize, export where asked, and write what ours says beside it."""
    road = ROADS[name]
    dtype = road.cpu if args.device == "cpu" else road.cuda
    words = [road.recipe, *(f"{k}={v}" for k, v in road.settings.items()), road.kv or ""]
    made = args.keep / slug("-".join(words))
    with (args.keep / f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # roads share checkpoints
        if not made.exists():
            quantized(args, road, made)
        if road.layout is not None:
            made, start = made.with_name(f"{made.name}-{road.layout}"), made
            if not made.exists():
                export(start, road.layout, made, verify=False)
    tokenizer = open_source(made).tokenizer()
    chosen = json.loads((ROOT / "results" / "serve_prompts.json").read_text())["prompts"]
    prompts = [road["ids"] for road in chosen] + [tokenizer(text).input_ids for text in PLAIN]
    method = json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"]
    cache = no_cache if method == "fewbit" else cut_cache if road.cut else stored_cache
    rows = continued(opened(made, args.device, dtype), cache, prompts)
    ours = [row["ids"] for row in rows]
    try:
        noise = logp(opened(made, args.device, OTHER[dtype]), cache, prompts, ours)
    except (RuntimeError, InputError) as error:  # a kernel for one dtype alone: the row is worth having
        print(f"not in {OTHER[dtype]}: {error}")
        noise = None
    said = {"model": str(made), "dtype": dtype, "prompts": prompts, "rows": rows, "noise": noise}
    said["layout"] = "native" if method == "fewbit" else method
    (args.keep / slug(name)).with_suffix(".json").write_text(json.dumps(said))


def slug(name: str) -> str:
    """A name of files."""
    return re.sub(r"\W+", "-", name).strip("-")


def quantized(args, road: Road, made: Path) -> None:
    """The checkpoint of a road."""
    recipe = tiles() if road.recipe == "tiles" else named(road.recipe, road.settings)
    recipe = recipe if road.kv is None else replace(recipe, kv=kv_format(road.kv))
    fewbit.quantize(
        args.model, recipe, output=made, calibration=Calibration(samples=16), device=args.device,
        read_back=args.device == "cpu",
    )  # fmt: skip


def tiles():
    """FP8 in tiles of 64 x 64, which divide SmolLM2's sides, and inputs per 64."""
    e4m3 = by_name("e4m3fn")
    weight = Format(grid=e4m3, block=Block2d(64, 64), scale=FP32)
    x = Activation(format=Format(grid=e4m3, block=Group(64), scale=FP32))
    return Recipe(name="tiles", rules=(Rule(weight=weight, input=x),))


def opened(checkpoint: Path, device: str, dtype: str):
    """Our model in that dtype."""
    return fewbit.load(checkpoint, device, getattr(torch, dtype))


def continued(model, cache, prompts: list[list[int]]) -> list[dict]:
    """Per prompt our greedy tokens, how far the likeliest is before the second at each, and its
    log-probability as it was made, and when the continuation is read at once, nats."""
    rows = []
    for prompt in prompts:
        ids, gaps, step = greedy(model, torch.tensor([prompt], device=model.device), cache(model))
        rows.append({"ids": ids[0].tolist(), "gaps": gaps[0].tolist(), "step": step[0].tolist()})
    read = logp(model, cache, prompts, [row["ids"] for row in rows])
    return [row | {"logp": each} for row, each in zip(rows, read, strict=True)]


def logp(model, cache, prompts: list[list[int]], ours: list[list[int]]) -> list[list[float]]:
    """Of every token of ``ours`` after its prompt and those before it, nats."""
    out = []
    for prompt, goes_on in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt + goes_on], device=model.device)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache(model)).logits[0, len(prompt) - 1 : -1]
        said = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        out.append(said[:, 0].tolist())
    return out


def no_cache(model):
    """What the plugin does with stored steps: nothing. None makes transformers' own, in float."""
    return None


def stored_cache(model):
    """A cache by the model's own steps, of which a call attends to its own tokens as well, as vLLM does."""

    class Rounded(QuantizedLayer):
        def update(self, key_states, value_states, *args, **keywords):
            super().update(key_states, value_states)
            return tuple(store.read() for store in self.stores)

    if (found := kept(model)) is None:
        return None
    cache = QuantizedCache(model.config, *found)
    steps = zip(found[1].key, found[1].value, strict=True)
    cache.layers = [Rounded(found[0], *pair) for pair in steps]
    return cache


class CutLayer(DynamicLayer):
    """Keys and values as the largest E4M3 numbers, times the step, that are not larger in magnitude."""

    def __init__(self, steps: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.steps = steps

    def update(self, key_states, value_states, *args, **keywords):
        pairs = zip((key_states, value_states), self.steps, strict=True)
        return super().update(*((cut(x.float() / s) * s).to(x.dtype) for x, s in pairs))


def cut(x: torch.Tensor) -> torch.Tensor:
    """x, float32, towards zero to E4M3."""
    near = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = near.view(torch.uint8) - (near.float().abs() > x.abs()).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


def cut_cache(model):
    """A cache of CutLayers by the model's own steps."""
    found, cache = kept(model)[1], DynamicCache(config=model.config)
    cache.layers = [CutLayer(pair) for pair in zip(found.key, found.value, strict=True)]
    return cache


if __name__ == "__main__":
    main()
