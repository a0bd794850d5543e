"""The ladder of LLM.int8()'s Table 1 on a model with outliers: from one step per tensor to decomposition.

    OMP_NUM_THREADS=1 python benchmarks/int8_ladder.py [--data FOLDER] [--only SUBSTRING] [--natural]

The packaged SmolLM2, all linears of the blocks in W8A8, input steps fitted at every call; perplexity of
WikiText-2 raw test, solid join, 12 windows of 512. A model of 135M has no outliers of the kind that appear
beyond 6.7B, so they are planted, without changing the function: in every norm of a block six channels get 20
to 100 times their gain, and the columns of the linears that read them are divided by the same. With
--natural, a second table has the model as it is.

Rows are named as in the paper (https://arxiv.org/abs/2208.07339): row-wise is a step per token and one for
the weight, vector-wise a step per token and per output channel; decomposition multiplies input columns with
an |x| of 6 or more, and their columns of the weight, in float.

Writes benchmarks/results/int8_ladder.md, row by row; rows in int8_ladder.json beside it are kept, so an
interrupted run goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.format import FP32, AbsMax, Channel, Format, MinMax, PerTensor, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import Int
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.nn.linear import transform_input

ROOT = Path(__file__).parent
ABSMAX = Format(grid=Int(8), range=AbsMax(), scale=FP32)
ZEROPOINT = Format(grid=Int(8, signed=False), range=MinMax(), zero=Zero.INTEGER, scale=FP32)
TAU = 6.0
ROWS = {  # weight, input, decomposition
    "absmax per tensor": (ABSMAX, PerTensor(), PerTensor(), None),
    "zeropoint per tensor": (ZEROPOINT, PerTensor(), PerTensor(), None),
    "absmax row-wise": (ABSMAX, PerTensor(), Token(), None),
    "absmax vector-wise": (ABSMAX, Channel(), Token(), None),
    "zeropoint vector-wise": (ZEROPOINT, Channel(), Token(), None),
    "absmax row-wise + decomposition": (ABSMAX, PerTensor(), Token(), "float"),
    "LLM.int8(): absmax vector-wise + decomposition": (ABSMAX, Channel(), Token(), "float"),
    "LLM.int8(), zeropoint": (ZEROPOINT, Channel(), Token(), "float"),
    "LLM.int8(), the outliers' weights from int8 codes": (ABSMAX, Channel(), Token(), "codes"),
}


def plant(model: nn.Module, channels: int = 6, low: float = 20, high: float = 100) -> None:
    """Outliers in the inputs of q, k, v and of gate, up; logits stay."""
    factor = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), channels)
    draw = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        attention, ffn = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
        ):
            at = torch.randperm(len(norm.weight), generator=draw)[:channels]
            norm.weight.data[at] *= factor
            for reader in readers:
                reader.weight.data[:, at] /= factor


def quantize(layer: nn.Linear, weight: Format, act: Activation, decomposition: str | None):
    """Give a linear the arithmetic of a row; returns what undoes it."""
    w, forward = layer.weight.data, layer.forward
    rounded = weight.quantize(w).dequantize()
    if decomposition != "float":
        layer.weight.data = rounded
        undo = transform_input(layer, act)
    else:
        lost = w - rounded

        def decomposed(x):
            wide = x.abs().flatten(0, -2).amax(0) >= act.outliers
            return linear(act(x), rounded, layer.bias) + linear(x[..., wide], lost[:, wide])

        layer.forward = decomposed
        undo = None

    def restore():
        layer.weight.data, layer.forward = w, forward
        if undo is not None:
            undo()

    return restore


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--only", default="")
    parser.add_argument("--natural", action="store_true", help="the model without planted outliers, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol()
    tokenizer = open_source("smollm2").tokenizer()
    tokens = windows(tokenizer, read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    kept = ROOT / "results" / "int8_ladder.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    model = fewbit.load("smollm2").float()
    for table in ("planted", "natural")[: 1 + args.natural]:
        if table == "natural":
            model = fewbit.load("smollm2").float()
        else:
            with torch.no_grad():
                before = model(tokens[:1]).logits
                plant(model)
                after = model(tokens[:1]).logits
            done["change"] = ((after - before).norm() / before.norm()).item()
            print(f"logits changed by {done['change']:.1e}", flush=True)
        for name in ("float", *ROWS):
            if args.only not in f"{table}/{name}" or f"{table}/{name}" in done:
                continue
            undo = []
            if name != "float":
                fmt, of_weight, of_input, decomposition = ROWS[name]
                act = Activation(format=replace(fmt, block=of_input), outliers=TAU if decomposition else None)
                undo = [
                    quantize(m, replace(fmt, block=of_weight), act, decomposition)
                    for block in model.model.layers
                    for m in block.modules()
                    if isinstance(m, nn.Linear)
                ]
            got = fewbit.evaluate(model, tokens, protocol)
            for each in undo:
                each()
            done[f"{table}/{name}"] = got.perplexity
            print(table, name, f"{got.perplexity:.2f}", f"{got.seconds:.0f} s", flush=True)
            kept.write_text(json.dumps(done, indent=1))
            write(done)
    write(done)


def write(done: dict) -> None:
    lines = [
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/int8_ladder.py`; its first lines say what is "
        f"measured. Planting changed the float logits by {done['change']:.0e} (relative).",
        "",
    ]
    for table in ("planted", "natural"):
        rows = {name: done[f"{table}/{name}"] for name in ("float", *ROWS) if f"{table}/{name}" in done}
        if len(rows) < 2:
            continue
        lines += [f"| W8A8, outliers {table} | perplexity | above float, % |", "|---|--:|--:|"]
        for name, got in rows.items():
            lines.append(f"| {name} | {got:.2f} | {100 * (got / rows['float'] - 1):+.1f} |")
        lines.append("")
    (ROOT / "results" / "int8_ladder.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
