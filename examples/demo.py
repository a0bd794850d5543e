"""The main job on a real model: quantize SmolLM2-135M to W4A16, see what it cost, read what it writes.

Run by `make demo`; a few minutes on two cores, no download. Every step is a command that you can type
yourself. Evaluation uses WikiText-2 (raw, test) when `../shared/data/wikitext2_raw_test.txt` is there, and
otherwise the part of the embedded text that calibration does not see. The checkpoints stay in `out/`.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEWBIT = Path(sys.executable).with_name("fewbit")
WIKITEXT = Path("..", "shared", "data", "wikitext2_raw_test.txt")  # seen from the root
MODEL = "smollm2"
GRID = ["--bits", "4", "--group-size", "64"]  # 576 columns: 128 does not divide them
CALIBRATION = ["--samples", "32"]
PROMPT = "The three most important things to know about the Moon are"


def fewbit(*words: str) -> str:
    """Print a command, run it, return its standard output; progress goes on to the terminal."""
    print("\n$", shlex.join(["fewbit", *words]), flush=True)
    return subprocess.run([FEWBIT, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def quantize(recipe: str, out: str, *words: str) -> str:
    """Quantize by ``recipe`` into the folder ``out``, made anew; returns its name."""
    for stale in (out, f"{out}.partial"):
        shutil.rmtree(ROOT / stale, ignore_errors=True)
    print(fewbit("quantize", MODEL, "-r", recipe, *GRID, *words, "-o", out), end="")
    return out


def evaluate(model: str, *words: str) -> dict:
    """What `fewbit eval` finds."""
    data = str(WIKITEXT) if (ROOT / WIKITEXT).is_file() else "embedded:eval"
    return json.loads(fewbit("eval", model, "--data", data, *words, "--json"))


def generate(model: str) -> dict:
    """What the model makes of the prompt."""
    found = json.loads(fewbit("generate", model, PROMPT, "--max-new-tokens", "48", "--json"))
    print(found["prompt"] + found["text"])
    return found


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table; the first one is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def row(name: str, bits: float, size: float, found: dict, text: dict) -> tuple[str, ...]:
    """One line of the comparison."""
    kl = "0" if found["kl"] is None else f"{found['kl']:.3f}"
    top1 = "100 %" if found["top1"] is None else f"{100 * found['top1']:.1f} %"
    speed = f"{text['tokens_per_second']:.1f}"
    return name, f"{bits:.2f}", f"{size / 1e6:.0f} MB", f"{found['perplexity']:.2f}", kl, top1, speed


def main() -> None:
    """Plan, quantize, evaluate, compare, generate."""
    start = time.perf_counter()
    print(fewbit("plan", MODEL, "-r", "gptq", *GRID, *CALIBRATION), end="")
    gptq = quantize("gptq", "out/smollm2-w4a16", *CALIBRATION)
    rtn = quantize("rtn", "out/smollm2-w4a16-rtn")
    found = {MODEL: evaluate(MODEL)} | {out: evaluate(out, "--against", MODEL) for out in (rtn, gptq)}
    texts = {name: generate(name) for name in found}

    # The packaged file is a 4-bit GGUF; what is quantized here is the model that it stands for.
    plain = found[MODEL]["parameters"] * 2
    rows = [("model", "bits per weight", "size", "perplexity", "KL", "top-1", "tokens/s")]
    rows.append(row("SmolLM2-135M, bfloat16", 16, plain, found[MODEL], texts[MODEL]))
    for name, out in (("W4A16, rounded to nearest", rtn), ("W4A16, GPTQ", gptq)):
        rows.append(
            row(name, found[out]["bits_per_weight"], found[out]["size_bytes"], found[out], texts[out])
        )
    protocol = found[gptq]
    text = "WikiText-2 raw test" if (ROOT / WIKITEXT).is_file() else "the embedded text's held-out part"
    print(f"\n{table(rows)}\n")
    print(
        f"{protocol['windows']} windows of {protocol['window']} tokens of {text}, join {protocol['join']}; ",
        end="",
    )
    print("KL in nats per token and top-1 agreement are against the original.")
    print(f"Took {time.perf_counter() - start:.0f} s. The checkpoint is in {gptq};", end=" ")
    print("transformers and vLLM load it without fewbit.")


if __name__ == "__main__":
    main()
