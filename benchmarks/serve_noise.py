"""Why engines part with quantized inputs: the same codes, and a model that carries rounding far.

    python benchmarks/serve_noise.py --vllm PYTHON --keep FOLDER

1. In vLLM's environment: int8 codes and steps of vLLM's CPU operator and of fewbit, of one random input with
   columns of very different size (512 tokens of 576).
2. What its CPU operator stores of values in E4M3: a query that attends to one token gives that token's value.
3. Our own model alone, in float32, its roads those of ``serve_vllm.py`` (made in FOLDER where they are not
   there): log-probabilities of its greedy tokens when its embeddings move by a relative 1e-7, 1e-6 and 1e-5,
   and when it reads token by token, against those of the model as it is, nats.

A value on the edge of a step moves a whole step when its last digit moves, so what rounding is worth does not
shrink with the digits: it is a property of the format of the inputs, and no engine can do better.
Writes benchmarks/results/serve_noise.md.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from serve_roads import cut, logp, no_cache, opened, slug

ROOT = Path(__file__).parent
NAMES = ("W8A8 int8 dynamic", "W8A8 int8 dynamic, SmoothQuant", "QuaRot W4A4, plugin", "QuaRot W4A16, plugin")
SIZES = (1e-7, 1e-6, 1e-5)
CODES = """
import torch
from vllm import _custom_ops as ops
from fewbit.recipe import named
act = named("w8a8", {}).rules[0].input
torch.manual_seed(0)
x = torch.randn(512, 576) * torch.logspace(-1, 1, 576)
codes, steps, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
ours = act.format.encode(x, act.format.fit(x))
other = int((ours.codes.int() != codes.int()).sum())
apart = int((ours.scale.flatten() != steps.flatten()).sum())
print(f"SAID{other} of {x.numel()} codes and in {apart} of 512 steps")
"""


CACHED = f"""
import torch
from vllm import _custom_ops as ops
{inspect.getsource(cut)}
torch.manual_seed(0)
n, d, block, kind, step = 64, 64, 32, "fp8_e4m3", 0.0077
k, q, v = (torch.randn(n, 1, d).half() for _ in range(3))
keys, values = torch.zeros(n, 1, 2 * block, d, dtype=torch.uint8).chunk(2, dim=2)
scales = dict(k_scale=0.03, v_scale=step, kv_cache_dtype=kind)
ops.cpu_attn_reshape_and_cache(k, v, keys, values, torch.arange(n) * block, "vec", **scales)
starts, ones = torch.arange(n + 1, dtype=torch.int32), torch.ones(n, dtype=torch.int32)
plan = ops.cpu_attn_get_scheduler_metadata(
    n, 1, 1, d, ones, q.dtype, starts, True, -1, "vec", False, None, kind)
out = torch.empty_like(q)
ops.cpu_attention_with_kv_cache(
    query=q, key_cache=keys, value_cache=values, output=out, query_start_loc=starts, seq_lens=ones,
    scale=0.125, causal=True, alibi_slopes=None, sliding_window=-1, softcap=0.0, scheduler_metadata=plan,
    block_table=torch.arange(n, dtype=torch.int32)[:, None], s_aux=None, **scales)
x = v.float() / step
same = lambda y: int(torch.isclose(out.float(), y * step, rtol=2e-3, atol=0).sum())
near, off = same(x.to(torch.float8_e4m3fn).float()), same(cut(x))
print("SAID", off, "of", x.numel(), "are cut off towards zero,", near, "are the nearest")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--keep", type=Path, help="where checkpoints stay")
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp())
    codes, cached = (in_engine(args.vllm, code) for code in (CODES, CACHED))
    lines = [
        "Printed by `python benchmarks/serve_noise.py` (its first lines say how).",
        "",
        f"vLLM's int8 operator on a CPU and fewbit's Format differ in {codes}.",
        f"Of values that its cache holds in E4M3 {cached}.",
        "",
        "Our model against itself, mean and largest difference of the log-probabilities of its tokens, nats:",
        "",
        f"| road | {' | '.join(f'embeddings moved by {size:g}' for size in SIZES)} | token by token |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        row = " | ".join(f"{mean:.2g}, {most:.2g}" for mean, most in differences(keep, name))
        lines.append(f"| {name} | {row} |")
        print(lines[-1], flush=True)
    (ROOT / "results" / "serve_noise.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def in_engine(python: str, code: str) -> str:
    """What the code says in vLLM's environment."""
    paths = os.pathsep.join(str(p.absolute()) for p in (ROOT.parent / "src", ROOT))
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=env)
    return next(line[4:].strip() for line in done.stdout.splitlines() if line.startswith("SAID"))


def differences(keep: Path, name: str):
    """(mean, largest) by SIZES and token by token, of a road."""
    file = (keep / slug(name)).with_suffix(".json")
    if not file.exists():
        subprocess.run(
            [sys.executable, str(ROOT / "serve_roads.py"), name, "--keep", str(keep.absolute())], check=True
        )
    said = json.loads(file.read_text())
    ours = [row["ids"] for row in said["rows"]]
    model = opened(Path(said["model"]), "cpu", "float32")
    base = logp(model, no_cache, said["prompts"], ours)
    for size in SIZES:
        draw = torch.Generator().manual_seed(0)

        def moved(module, given, out, size=size, draw=draw):
            return out * (1 + size * torch.randn(out.shape, generator=draw))

        hook = model.get_input_embeddings().register_forward_hook(moved)
        yield mean_and_max(base, logp(model, no_cache, said["prompts"], ours))
        hook.remove()
    yield mean_and_max(base, [row["step"] for row in said["rows"]])


def mean_and_max(base: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """Of the absolute differences."""
    each = [abs(a - b) for x, y in zip(base, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(each) / len(each), max(each)


if __name__ == "__main__":
    main()
