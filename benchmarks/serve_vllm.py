"""What vLLM makes of our checkpoints: its greedy tokens beside ours, road by road.

    python benchmarks/serve_vllm.py --vllm PYTHON [--only TEXT ...] [--keep FOLDER]

PYTHON is the interpreter of an environment that has vLLM and, for the native roads, fewbit. A road is a
recipe, and a layout it is exported to where one is named. SmolLM2-135M is quantized on the text that ships
with Python, 16 windows; both sides continue the same prompts greedily for 24 tokens. Ours is transformers on
what ``fewbit.load`` gives, in the same dtype. Tokens that agree are counted up to the first that differs;
there our two likeliest tokens are a gap of nats apart, which says whether rounding alone explains it.

Rows are written to benchmarks/results/serve_vllm.json as they come, and are not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
PROMPTS = ["The capital of France is", "Quantization is", "Water boils at"]
TOKENS = 24
G64 = ["--set", "group_size=64"]
ROADS = {  # name: recipe and settings, layout of an export, dtype
    "W4A16 symmetric, compressed-tensors": (["gptq", *G64], None, "float16"),
    "W4A16 asymmetric, compressed-tensors": (["gptq", *G64, "--set", "symmetric=false"], None, "float16"),
    "W8A16, compressed-tensors": (["int8"], None, "float16"),
    "W8A8 int8 dynamic, compressed-tensors": (["w8a8"], None, "float32"),
    "W4A16 with keys and values in E4M3": (["gptq", *G64, "--kv", "fp8-tensor"], None, "float16"),
    "QuaRot W4A16, transform_config": (
        ["quarot", *G64, "--set", "input_bits=16"],
        "compressed-tensors",
        "float16",
    ),
    "GPTQ layout, symmetric": (["gptq", *G64], "gptq", "float16"),
    "AWQ layout": (["gptq", *G64, "--set", "symmetric=false"], "awq", "float16"),
    "NF4, plugin": (["nf4"], None, "float32"),
    "HIGGS, 4 bit, plugin": (["higgs", "--set", "bits=4"], None, "float32"),
    "QTIP, 4 bit, plugin": (["qtip", "--set", "bits=4", "--set", "state_bits=10"], None, "float32"),
    "QuaRot W4A16, plugin": (["quarot", "--set", "input_bits=16"], None, "float32"),
    "QuaRot W4A4, plugin": (["quarot"], None, "float32"),
}

SERVE = """
import json, os, sys
os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model, dtype, prompts, tokens = json.loads(sys.argv[1])
    llm = LLM(model, dtype=dtype, max_model_len=512, enforce_eager=True)
    out = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    found = [{"ids": list(o.outputs[0].token_ids), "text": o.outputs[0].text} for o in out]
    print("FOUND" + json.dumps(found))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--only", nargs="*", default=[""], help="roads whose names hold one of these")
    parser.add_argument("--keep", type=Path, help="where checkpoints stay")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "serve_vllm.json")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    done = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name, road in ROADS.items():
        if name not in done and any(o in name for o in args.only):
            done[name] = travel(args.vllm, folder, *road)
            print(name, json.dumps(done[name]), flush=True)
            args.results.write_text(json.dumps(done, indent=1))
    args.results.with_suffix(".md").write_text(markdown(done), encoding="utf-8")


def travel(vllm: str, folder: Path, recipe: list[str], layout: str | None, dtype: str) -> dict:
    """Quantize, export where asked, generate on both sides."""
    made = fewbit(folder, "quantize", "smollm2", "--samples", "16", "-r", *recipe)
    if layout is not None:
        made = fewbit(folder, "export", str(made), "--to", layout)
    script = folder / "serve.py"
    script.write_text(SERVE)
    words = [vllm, str(script), json.dumps([str(made), dtype, PROMPTS, TOKENS])]
    said = subprocess.run(words, capture_output=True, text=True)
    found = [line for line in said.stdout.splitlines() if line.startswith("FOUND")]
    if not found:
        reasons = [line for line in (said.stdout + said.stderr).splitlines() if "Error: " in line]
        return {"failed": (reasons or ["no reason given"])[0].rpartition("Error: ")[2][:300]}
    theirs = json.loads(found[0].removeprefix("FOUND"))
    rows = [beside(ours, t["ids"]) for ours, t in zip(continued(made, dtype), theirs, strict=True)]
    return {"dtype": dtype, "rows": rows, "texts": [t["text"] for t in theirs]}


def fewbit(folder: Path, *words: str) -> Path:
    """Run a command that writes a checkpoint, unless it is there."""
    out = folder / "-".join(w.replace("/", "_") for w in words if not w.startswith("-"))
    if not out.exists():
        subprocess.run([sys.executable, "-m", "fewbit.cli.main", *words, "-o", str(out)], check=True)
    return out


def continued(checkpoint: Path, dtype: str) -> list[tuple[list[int], list[float]]]:
    """Per prompt our greedy tokens, and how far the likeliest token is before the second at each, nats."""
    import torch

    import fewbit as package
    from fewbit.io.source import open_source

    model = package.load(checkpoint, dtype=getattr(torch, dtype))
    tokenizer, out = open_source(checkpoint).tokenizer(), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        said = model.generate(
            ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, past_key_values=stored_cache(model),
        )  # fmt: skip
        best = [logits[0].float().log_softmax(-1).topk(2).values for logits in said.logits]
        out.append((said.sequences[0, ids.shape[1] :].tolist(), [float(b[0] - b[1]) for b in best]))
    return out


def stored_cache(model):
    """A cache by the model's own steps, of which a call attends to its own tokens as well, as vLLM does."""
    from fewbit.nn.kvlayer import QuantizedCache, QuantizedLayer
    from fewbit.nn.kvsteps import kept

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


def beside(ours: tuple[list[int], list[float]], theirs: list[int]) -> dict:
    """How many tokens agree from the start, and the gap at the first that does not."""
    ids, gaps = ours
    agree = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=True)) if a != b), len(ids))
    return {"agree": agree, "gap": None if agree == len(ids) else gaps[agree]}


def markdown(done: dict) -> str:
    """The table."""
    lines = [
        "Printed by `python benchmarks/serve_vllm.py` (its first lines say how), vLLM 0.32 on a CPU.",
        "",
        f"| road | dtype | tokens of {TOKENS} that agree, by prompt | gap in nats where they part | "
        f"after {PROMPTS[0]!r} |",
        "|---|---|---|---|---|",
    ]
    for name in (n for n in ROADS if n in done):
        r = done[name]
        if "failed" in r:
            lines.append(f"| {name} | | failed | | {r['failed']} |")
            continue
        agree = ", ".join(str(row["agree"]) for row in r["rows"])
        gaps = ", ".join(f"{row['gap']:.3f}" for row in r["rows"] if row["gap"] is not None)
        text = " ".join(r["texts"][0].split())[:60]
        lines.append(f"| {name} | {r['dtype']} | {agree} | {gaps} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
