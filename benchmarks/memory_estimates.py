"""Estimates of `fewbit memory` beside what they estimate: files, filled caches, autograd, the allocator.

    python benchmarks/memory_estimates.py

Writes benchmarks/results/memory_estimates.md. Files are those that `fewbit quantize smollm2` writes, headers
included. Caches, activations in training (bytes per token that autograd keeps) and in a prefill (peak of
torch's allocations on a CPU, without logits) are those of tiny random models in bfloat16.
"""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))

from held import peak_bytes, saved_bytes  # noqa: E402
from tiny import ARCHITECTURES, tiny, tiny_ids  # noqa: E402

import fewbit  # noqa: E402
from fewbit.analyze.anatomy import anatomy  # noqa: E402
from fewbit.analyze.memory import SCHEMES, cache_bytes, prefill_bytes, weights  # noqa: E402
from fewbit.analyze.training import saved_behind, saved_per_block  # noqa: E402
from fewbit.format import BF16  # noqa: E402
from fewbit.io.config import open_config  # noqa: E402
from fewbit.recipe import fp8, int8, nf4, rtn  # noqa: E402

RECIPES = {
    "int8 W8A16 per channel": int8(),
    "fp8 E4M3 per channel": fp8(),
    "W4A16 g{} asymmetric": rtn(group_size=64, symmetric=False),
    "W4A16 g{} symmetric": rtn(group_size=64),
    "nf4 g{} double quantization": nf4(),
    "W3A16 g{} symmetric": rtn(bits=3, group_size=64),
    "W2A16 g{} asymmetric": rtn(bits=2, group_size=64, symmetric=False),
}


def line(*cells):
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def files():
    """Rows of estimated and written sizes of SmolLM2-135M."""
    model = anatomy(open_config("smollm2"))
    for scheme in SCHEMES:
        if scheme.name not in (*RECIPES, "bf16"):
            continue
        estimate = weights(model, scheme)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            if scheme.name == "bf16":
                fewbit.load("smollm2", dtype=torch.bfloat16).save_pretrained(out)
            else:
                fewbit.quantize("smollm2", RECIPES[scheme.name], output=out)
            real = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        off = 100 * (estimate.nbytes / real - 1)
        yield line(estimate.scheme, f"{estimate.nbytes:,}", f"{real:,}", f"{off:+.2f} %")


def activations():
    """Rows of ratios, estimate over measured, of tiny models."""
    for arch in ARCHITECTURES:
        model = tiny(arch).bfloat16()
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            found = anatomy(open_config(folder))
        ids = tiny_ids(4, 128)
        kept = saved_bytes(model, ids) / ids.numel()
        estimate = found.blocks * saved_per_block(found.widths) + saved_behind(found)
        peak = peak_bytes(lambda model=model, ids=ids: model.base_model(input_ids=ids, use_cache=False))
        prefill = prefill_bytes(found, 128, 4) - 6 * 4 * found.vocabulary
        cache = "none"
        if found.cache:
            with torch.no_grad():
                layers = model(ids, use_cache=True).past_key_values.layers
            real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            cache = f"{cache_bytes(found, BF16, 128, 4) / real:.3f}"
        yield line(arch, cache, f"{estimate / kept:.3f}", f"{prefill / peak:.3f}")


def main():
    torch.set_num_threads(1)
    text = [
        "Printed by `python benchmarks/memory_estimates.py`.",
        "",
        "SmolLM2-135M, bytes:",
        "",
        line("scheme", "estimate", "file", "off by"),
        "|---|--:|--:|--:|",
        *files(),
        "",
        "Tiny random models, estimate / measured:",
        "",
        line("architecture", "cache", "training", "prefill"),
        "|---|--:|--:|--:|",
        *activations(),
    ]
    (ROOT / "results" / "memory_estimates.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
