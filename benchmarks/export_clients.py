"""What clients make of exported checkpoints: logits of a fresh transformers process beside fewbit's own.

    python benchmarks/export_clients.py

Writes benchmarks/results/export_clients.md. A tiny random Llama (float32) is quantized, exported and verified
as `fewbit export` does it; the difference is the largest of the logits on 24 tokens, over the largest logit.
Cases for bitsandbytes need that package, others nothing beyond fewbit's own dependencies.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))

from tiny import save_tiny  # noqa: E402

from fewbit.format import FP32, Block2d, Format, Group, Token, format_by_name  # noqa: E402
from fewbit.format.activation import Activation  # noqa: E402
from fewbit.grid import Int, by_name  # noqa: E402
from fewbit.recipe import Recipe, Rule, named  # noqa: E402
from fewbit.stream.data import Calibration  # noqa: E402
from fewbit.stream.export import export  # noqa: E402
from fewbit.stream.quantize import quantize  # noqa: E402

STATIC = {"static": "true", "input": "tensor"}
E4M3 = {"grid": "e4m3fn", "weight": "tensor"}
TOKEN = Activation(format=Format(grid=Int(8), block=Token(), scale=FP32))
ROUNDED = Format(grid=Int(4), block=Group(32), scale=FP32)
W4A8 = Recipe(name="w4a8", rules=(Rule(weight=ROUNDED, input=TOKEN),))
STORED = Activation(format=format_by_name("nvfp4"), static=True)
NVFP4 = Recipe(name="nvfp4", rules=(Rule(weight=format_by_name("nvfp4"), input=STORED),))
TILED = Format(grid=by_name("e4m3fn"), block=Block2d(128, 128), scale=FP32)
TILES = Recipe(name="fp8-tiles", rules=(Rule(weight=TILED),))
CASES = (
    ("W4A16, group 32", "rtn", {"group_size": "32"}, "compressed-tensors"),
    (
        "W3A16, group 32, asymmetric",
        "rtn",
        {"bits": "3", "group_size": "32", "symmetric": "false"},
        "compressed-tensors",
    ),
    ("FP8 weights and inputs, dynamic", "fp8-dynamic", {}, "compressed-tensors"),
    ("FP8 weights and inputs, static", "w8a8", STATIC | E4M3, "compressed-tensors"),
    ("W8A8 int8, static", "w8a8", STATIC, "compressed-tensors"),
    ("W8A8 int8, dynamic", "w8a8", {}, "compressed-tensors"),
    ("W4A8 int8, dynamic, group 32", W4A8, {}, "compressed-tensors"),
    ("NVFP4", "rtn", {"format": "nvfp4"}, "compressed-tensors"),
    ("NVFP4 weights and inputs, stored step", NVFP4, {}, "compressed-tensors"),
    ("MXFP4", "rtn", {"format": "mxfp4"}, "compressed-tensors"),
    ("FP8 per tensor, static inputs", "w8a8", STATIC | E4M3, "fp8"),
    ("FP8 in tiles of 128 x 128", TILES, {}, "fp8"),
    ("FP8 in tiles of 128 x 128", TILES, {}, "compressed-tensors"),
    ("NF4, steps doubly quantized", "nf4", {}, "bitsandbytes"),
    ("int8 weights", "int8", {}, "bitsandbytes"),
    ("LLM.int8()", "llm-int8", {"calibrate": "false"}, "bitsandbytes"),
    ("W4A16, group 32", "rtn", {"group_size": "32"}, "gptq"),
    ("W4A16, group 32", "rtn", {"group_size": "32"}, "awq"),
    ("any Format: W4A16, group 32", "rtn", {"group_size": "32"}, "native"),
)


def wide(folder: Path) -> None:
    """The tiny Llama with sides that tiles of 128 divide."""
    import torch

    model = save_tiny("llama", folder)
    config = model.config
    config.hidden_size, config.intermediate_size, config.num_key_value_heads = 256, 512, 2
    config.head_dim = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(model)(config)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1
    model.save_pretrained(folder)


def main() -> None:
    """Run every case; a line for each."""
    lines = ["Printed by `python benchmarks/export_clients.py`.", ""]
    lines += ["| source | layout | difference | or why not |", "|---|---|--:|---|"]
    few = Calibration(samples=4, seqlen=32)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        save_tiny("llama", root / "model")
        wide(root / "wide")
        for i, (name, recipe, settings, target) in enumerate(CASES):
            source = root / f"{i}"
            made = named(recipe, settings) if isinstance(recipe, str) else recipe
            quantize(
                root / ("wide" if made is TILES else "model"),
                made,
                output=source,
                calibration=few,
                read_back=False,
            )
            seen = export(source, target, root / f"{i}-exported").seen
            shown = "" if seen.difference is None else f"{seen.difference:.2g}"
            lines.append(f"| {name} | {target} | {shown} | {seen.why} |")
            print(lines[-1], flush=True)
    (ROOT / "results" / "export_clients.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
