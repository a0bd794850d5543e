"""GPTQ on a GPU: seconds for blocks of Llama-3-8B's shape, by part, on random weights.

    python benchmarks/gpu_quantize.py [--blocks 2] [--samples 128] [--seqlen 2048]

Writes a random model to a temporary folder, quantizes it to W4A16 g128 with --device cuda and prints the time
of the whole and of each layer. Last result: benchmarks/results/gpu_quantize.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import fewbit
from fewbit.stream.data import Calibration
from fewbit.stream.progress import Progress


class Times(Progress):
    """Wall seconds of layers and blocks."""

    def __init__(self):
        self.layers, self.blocks, self.last = {}, [], time.perf_counter()

    def phase(self, text):
        self.last = time.perf_counter()

    def layer(self, row, seconds):
        kind = row.layer.split(".")[-1]
        self.layers[kind] = self.layers.get(kind, 0) + seconds

    def block(self, done, total, resumed):
        now = time.perf_counter()
        self.blocks.append(now - self.last)
        self.last = now


def build(folder: Path, blocks: int) -> None:
    """Llama-3-8B's blocks with a small vocabulary and random weights, bfloat16."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder / "model", args.blocks)
        torch.cuda.reset_peak_memory_stats()
        times = Times()
        result = fewbit.quantize(
            folder / "model",
            fewbit.recipes.gptq(),
            output=folder / "out",
            calibration=Calibration(samples=args.samples, seqlen=args.seqlen),
            device="cuda",
            progress=times,
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, depth {result.plan.depth}")
    print(f"{args.blocks} blocks, {args.samples} x {args.seqlen} tokens: {result.seconds:.1f} s in all")
    print("seconds a block:", ", ".join(f"{s:.2f}" for s in times.blocks))
    print("solving, all blocks:", ", ".join(f"{k} {s:.2f}" for k, s in times.layers.items()))
    print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, mean error "
          f"{result.as_dict()['mean_error']:.4g}, reload difference {result.difference:.2g}")  # fmt: skip


if __name__ == "__main__":
    main()
