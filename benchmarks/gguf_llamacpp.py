"""GGUF files of ours in llama.cpp: its greedy tokens beside those of our dequantized model.

    python benchmarks/gguf_llamacpp.py [--client PYTHON] [--only TEXT ...]

``--client`` is a Python that has llama-cpp-python (`pip install llama-cpp-python`); by default this one.
Eight prompts, 20 tokens each. Model: SmolLM2-135M, and for all K-quants, whose blocks of 256 do not tile its
576 columns (most of its layers get Q5_0 in place of Q4_K), a random Llama of 256
columns. Rows are kept in benchmarks/results/gguf_llamacpp.json as they come and not taken again;
gguf_llamacpp.md beside it is the table.

When llama.cpp multiplies with quantized weights it rounds the inputs to 8 bits per 32, which is its
arithmetic and not the file's. So each file is asked twice: as llama.cpp unpacks it to float32, and as it runs
it. The row "packaged" is a file of llama.cpp's own: how far it agrees as it runs is what can be expected.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fewbit
from fewbit.format import FORMATS
from fewbit.io.gguf_write import write
from fewbit.io.locate import packaged_file
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule, named
from fewbit.solve import Ldlq
from fewbit.stream.data import Calibration

ROOT = Path(__file__).parent
ROWS = ROOT / "results" / "gguf_llamacpp.json"
TOKENS = 20
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three laws of motion were written by",
    "In the year 1969, two people",
    "A good recipe for bread needs flour,",
    "The opposite of hot is",
)


def recipes() -> dict[str, tuple[str, Recipe]]:
    """Row -> (model, recipe)."""
    rows = {}
    for f in ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "mxfp4"):
        rule = Rule(weight=FORMATS[f], solver=Ldlq())
        rows[f"gptq {f}"] = ("random", Recipe(name=f"gptq-{f}", rules=(rule,)))
    rows |= {f"rtn {f}": ("random", named("rtn", {"format": f})) for f in ("q5_0", "q5_1")}
    rows |= {f"rtn {f}": ("smollm2", named("rtn", {"format": f})) for f in ("q8_0", "q4_1", "q4_0")}
    rows["rtn q4_k"] = ("smollm2", named("rtn", {"format": "q4_k"}))  # q5_0 where 256 does not divide rows
    rows["gptq q4_0"] = ("smollm2", named("gptq", {"format": "q4_0"}))
    zeros = {"group_size": "64", "scale": "fp16", "symmetric": "false"}
    rows["gptq int4 g64 with zeros"] = ("smollm2", named("gptq", zeros))
    return rows


def random_model(folder: Path) -> Path:
    """A Llama of random weights whose every row is whole blocks of 256; SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = open_source("smollm2")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return folder


def llama_cpp(python: str, path: Path, *how: str) -> dict:
    """What the client answers."""
    question = json.dumps({"texts": PROMPTS, "tokens": TOKENS})
    command = [python, str(ROOT / "llamacpp_client.py"), str(path), *how]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def ours(path: str | Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of the model in float32, and of each prompt the smallest lead of a first choice."""
    model, tokens, leads = fewbit.load(path), [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            top = model(ids).logits[0, len(prompt) - 1 : -1].topk(2).values
        tokens.append(ids[0, len(prompt) :].tolist())
        leads.append((top[:, 0] - top[:, 1]).min().item())
    return tokens, leads


def row(name: str, folder: str | Path, path: Path, kinds: str, python: str) -> str:
    """One line of the table: prompts whose tokens all agree, both ways, and tokens before the first that does
    not.
    """
    unpacked, running = llama_cpp(python, path, "--unpack"), llama_cpp(python, path)
    tokenizer = open_source(folder).tokenizer()
    ids = [tokenizer(text).input_ids for text in PROMPTS]
    assert unpacked["ids"] == running["ids"] == ids, "the tokenizers differ"
    mine, leads = ours(folder, ids)

    def agree(theirs: dict) -> str:
        same = [
            next((i for i in range(TOKENS) if a[i] != b[i]), TOKENS)
            for a, b in zip(theirs["tokens"], mine, strict=True)
        ]
        return f"{sum(n == TOKENS for n in same)} of {len(same)} ({sum(same)} of {TOKENS * len(same)})"

    size = path.stat().st_size / 1e6
    return f"| {name} | {kinds} | {size:.1f} | {agree(unpacked)} | {agree(running)} | {min(leads):.3f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=())
    args = parser.parse_args()
    kept = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    todo = {**recipes(), "packaged": ("smollm2", None)}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        out, path = scratch / "out", scratch / "model.gguf"
        random = random_model(scratch / "random")
        for name, (model, recipe) in todo.items():
            if name in kept or (args.only and not any(text in name for text in args.only)):
                continue
            if recipe is None:
                kept[name] = row(name, "smollm2", packaged_file(), "Q4_1, Q8_0 embedding", args.client)
            else:
                start = random if model == "random" else model
                fewbit.quantize(
                    start, recipe, output=out, calibration=Calibration(samples=8), read_back=False
                )
                written = write(open_source(out), path)
                label = name if model == "smollm2" else f"{name}, random weights"
                kept[name] = row(label, out, path, str(written), args.client)
                shutil.rmtree(out)
            print(kept[name], flush=True)
            ROWS.write_text(json.dumps(kept, indent=1) + "\n")
    lines = [kept[name] for name in todo if name in kept]
    text = (
        "Printed by `python benchmarks/gguf_llamacpp.py --client PYTHON`.\n"
        f"Prompts whose {TOKENS} greedy tokens are those of our dequantized model in float32, and in\n"
        "brackets tokens before the first that differs. Lead: the smallest distance from the first to the\n"
        "second logit on the way.\n\n"
        "| weights | in the file | MB | unpacked by llama.cpp | run by it, inputs rounded | least lead |\n"
        "|---|---|--:|---|---|--:|\n" + "\n".join(lines) + "\n"
    )
    (ROOT / "results" / "gguf_llamacpp.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
