"""What keys and values in few bits cost in perplexity and save in bytes: SmolLM2-135M, the cache in use.

    python benchmarks/kv_cache.py [--data FOLDER] [--windows 3] [--window 1024] [--chunk 64]

FOLDER holds wikitext2_raw_test.txt. Every window goes through the model in chunks: a chunk attends to its own
keys and values as they are and to earlier ones as they are stored. Percentages are perplexity against the
float cache under the same chunks. Bytes per token are those held at the end of a window, float tokens
included, and those that each token more adds. transformers' own FP8 cache stands beside. A second table
decodes the first 256 tokens one by one. Fails where 8 bits lose more than 0.5 % or 4 bits more than 5 %.
Writes benchmarks/results/kv_cache.md.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import fewbit
from fewbit.evaluate import Protocol, evaluate, windows
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.nn.kvcache import kv_format
from fewbit.nn.kvlayer import QuantizedCache
from fewbit.nn.kvsteps import calibrate

ROOT = Path(__file__).parent
NAMES = (
    "int8-token", "fp8", "fp8-tensor", "fp8-head", "fp8-e5m2", "kivi4", "kivi4-r32", "int4-token", "mxfp4",
    "kivi2", "kivi2-r32", "kivi2-r32-s4", "int2-token",
)  # fmt: skip
ONE_BY_ONE = ("int8-token", "int4-token", "kivi4-r32")
LIMITS = {
    0.5: ("int8-token", "fp8", "fp8-tensor", "fp8-head"),
    5.0: ("kivi4", "kivi4-r32", "int4-token"),
}


def marginal(name: str, model) -> float:
    """Bytes that a token adds in the long run, all layers."""
    kv, c = kv_format(name), model.config
    shape = (1, c.num_key_value_heads)
    head = c.hidden_size // c.num_attention_heads
    many, more = (kv.nbytes(*shape, n, head, model.dtype) for n in (128 * 64, 128 * 65))
    return c.num_hidden_layers * (more - many) / 128


def own_fp8(model):
    """transformers' quantized cache, the one backend that needs no other package."""
    return transformers.QuantizedCache(backend="fp8", config=model.config)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source, model = open_source("smollm2"), fewbit.load("smollm2", "cpu", torch.float32)
    protocol = Protocol(window=args.window, windows=args.windows, chunk=args.chunk)
    text = read_text(args.data / "wikitext2_raw_test.txt")
    tokens = windows(source.tokenizer(), text, protocol)
    few = Protocol(window=512, windows=4)
    calibration = windows(source.tokenizer(), read_text("embedded"), few)
    steps = {n: calibrate(model, calibration, kv_format(n)) for n in ("fp8-tensor", "fp8-head")}

    def measure(name, ids, how):
        def cache():
            if name == "transformers fp8":
                return own_fp8(model)
            return QuantizedCache(model.config, kv_format(name), steps.get(name))

        quantized = None if name == "float32" else cache
        found = evaluate(model, ids, how, cache=quantized)
        print(name, found.perplexity, found.cache_bytes, round(found.seconds, 1), flush=True)
        return found

    base = measure("float32", tokens, protocol)
    rows, over = [], []
    for name in NAMES:
        found = measure(name, tokens, protocol)
        loss = 100 * (found.perplexity / base.perplexity - 1)
        over += [name for limit, names in LIMITS.items() if name in names and loss > limit]
        rows.append(
            f"| {name} | {found.perplexity:.3f} | {loss:+.2f} | "
            f"{found.cache_bytes / args.window:,.0f} | {marginal(name, model):,.0f} | {found.seconds:.0f} |"
        )
    theirs = measure("transformers fp8", tokens, protocol)
    loss = 100 * (theirs.perplexity / base.perplexity - 1)
    rows.append(f"| transformers' fp8 | {theirs.perplexity:.3f} | {loss:+.2f} | | | "
                f"{theirs.seconds:.0f} |")  # fmt: skip
    full = base.cache_bytes / args.window
    one = replace(protocol, window=256, windows=1, chunk=1)
    ids = tokens[:1, :256]
    exact = measure("float32", ids, one)
    single = []
    for name in ONE_BY_ONE:
        found = measure(name, ids, one)
        loss = 100 * (found.perplexity / exact.perplexity - 1)
        single.append(f"| {name} | {found.perplexity:.3f} | {loss:+.2f} |")
    lines = [
        f"Printed by `python benchmarks/kv_cache.py`; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, one thread.",
        "",
        "SmolLM2-135M in float32 (30 layers, 3 key-value heads of 64), WikiText-2 raw test, "
        f"{args.windows} windows of {args.window} tokens in chunks of {args.chunk}, the float tokens of a "
        "cache in float32, too.",
        "",
        "| KV format | perplexity | % | bytes per token held | per token more | s |",
        "|---|--:|--:|--:|--:|--:|",
        f"| float32 | {base.perplexity:.3f} | | {full:,.0f} | {full:,.0f} | {base.seconds:.0f} |",
        *rows,
        "",
        "Token by token, the first 256 tokens:",
        "",
        "| KV format | perplexity | % |",
        "|---|--:|--:|",
        f"| float32 | {exact.perplexity:.3f} | |",
        *single,
        "",
    ]
    (ROOT / "results" / "kv_cache.md").write_text("\n".join(lines))
    print("\n".join(lines))
    if over:
        raise SystemExit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
