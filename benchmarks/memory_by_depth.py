"""Peak memory does not grow with the number of blocks: random Llamas of 6 and 24 equal blocks.

    python benchmarks/memory_by_depth.py

Each model is quantized with GPTQ by a process of its own; the peaks of their resident sets must differ by
less than one block plus its activations. Writes benchmarks/results/memory_by_depth.md.
"""

import tempfile
from pathlib import Path

import torch
from measure import FEWBIT, measured

ROOT = Path(__file__).parent
HIDDEN, FFN, SAMPLES, SEQLEN = 768, 2048, 16, 256


def build(folder: Path, blocks: int) -> int:
    """A random Llama in bfloat16 with the packaged model's tokenizer; returns parameters of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fewbit.io.source import open_source

    tokenizer = open_source("smollm2").tokenizer()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=blocks, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=len(tokenizer), tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.model.layers[0].parameters())


def peak(folder: Path) -> float:
    """Peak resident MB of quantizing the model in ``folder``."""
    command = (
        f"{FEWBIT} quantize {folder} -r gptq --group-size 64 --samples {SAMPLES} --seqlen {SEQLEN}".split()
    )
    return measured([*command, "-o", f"{folder}-out"])[2]


def main():
    peaks, block = {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        for blocks in (6, 24):
            folder = Path(temporary) / f"llama{blocks}"
            block = build(folder, blocks) * 4 / 2**20
            peaks[blocks] = peak(folder)
    # what is alive while forwards wait at down_proj: residual, normed input, product
    activations = SAMPLES * SEQLEN * 4 * (2 * HIDDEN + FFN) / 2**20
    grown = peaks[24] - peaks[6]
    lines = [
        "Printed by `python benchmarks/memory_by_depth.py`.",
        "",
        f"Llama blocks of hidden {HIDDEN}, FFN {FFN}; {SAMPLES} x {SEQLEN} tokens; GPTQ W4A16 g64.",
        "",
        "| blocks | peak resident MB |",
        "|--:|--:|",
        *(f"| {n} | {p:.0f} |" for n, p in peaks.items()),
        "",
        f"Growth: {grown:.0f} MB. A block in float32: {block:.0f} MB; its activations: {activations:.0f} MB.",
        "",
    ]
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "memory_by_depth.md").write_text("\n".join(lines))
    print("\n".join(lines))
    raise SystemExit(grown >= block + activations)


if __name__ == "__main__":
    main()
