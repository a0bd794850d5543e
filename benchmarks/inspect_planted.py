"""Does `fewbit inspect` find outliers where they were planted, and is its advice worth taking?

Six channels of what each norm of SmolLM2 hands on are made 20 to 100 times as large, and the weights that
read them as much smaller (`plant` of int8_ladder.py): the logits stay. The model before and the model after
are looked at; new channels must be those planted, in every block. Then the planted model is quantized by the
advised recipe and by steps per channel and token alone, and perplexity is measured on WikiText-2.

    OMP_NUM_THREADS=1 python benchmarks/inspect_planted.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from int8_ladder import plant

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.inspect import Inspection, advise, look
from fewbit.inspect.advice import mean_error
from fewbit.inspect.remedies import Remedy
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import named
from fewbit.stream.data import Calibration

ROOT = Path(__file__).parent
LOOK = Calibration(samples=8, seqlen=512)


def save_planted(folder: Path) -> dict[str, set[int]]:
    """The planted model in a folder, and the channels planted by norm."""
    model = fewbit.load("smollm2").float()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("layernorm.weight")}
    plant(model)
    now = dict(model.named_parameters())
    model.save_pretrained(folder)
    open_source("smollm2").tokenizer().save_pretrained(folder)
    return {
        n.removesuffix(".weight"): set((now[n] != p).nonzero().flatten().tolist()) for n, p in before.items()
    }


def channels(seen: Inspection) -> dict[str, set[int]]:
    """Those that stand out behind each norm."""
    return {g.norm: {c.index for c in g.input.channels} for g in seen.groups if g.norm is not None}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of the quantizations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol()
    tokens = windows(
        open_source("smollm2").tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "planted"
        planted = save_planted(folder)
        natural, seen = look("smollm2", LOOK), look(folder, LOOK)
        before, after = channels(natural), channels(seen)
        exact = sum(
            after[n] - before[n] == planted[n] - before[n] and planted[n] <= after[n] for n in planted
        )
        weakest = min(
            c.ratio
            for g in seen.groups
            for c in g.input.channels
            if g.norm in planted and c.index in planted[g.norm]
        )
        done = {"norms": len(planted), "exact": exact, "weakest": weakest, "rows": {}}
        for name, one in (("natural", natural), ("planted", seen)):
            for r in Remedy:
                done["rows"][f"{name}/{r}"] = mean_error(one, r, 8)
        advice = advise(seen)
        words = " ".join([advice.recipe, *(f"{k}={v}" for k, v in advice.settings.items())])
        done["advised"] = words
        done["float"] = fewbit.evaluate(fewbit.load(folder), tokens, protocol).perplexity
        print(json.dumps(done, indent=1), flush=True)
        text = Calibration(samples=args.samples, seqlen=512)
        for row, recipe in (
            ("w8a8", named("w8a8")),
            (words, named(advice.recipe, dict(advice.settings))),
        ):
            out = Path(temporary) / row.replace(" ", "_")
            fewbit.quantize(folder, recipe, output=out, calibration=text)
            done[row] = fewbit.evaluate(fewbit.load(out), tokens, protocol).perplexity
            print(row, done[row], flush=True)
    (ROOT / "results" / "inspect_planted.json").write_text(json.dumps(done, indent=1))
    write(done)


def write(done: dict) -> None:
    plain, advised = done["w8a8"], done[done["advised"]]
    lines = [
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/inspect_planted.py`; its first lines say what is "
        "measured.",
        "",
        f"Behind {done['exact']} of {done['norms']} norms the channels that stand out anew are exactly "
        f"those planted; the least of them reaches {done['weakest']:.1f} times the median channel's rms, "
        "where 6 is asked.",
        "",
        "| simulated error of a layer's output, W8A8, % | natural | planted |",
        "|---|--:|--:|",
        *(
            f"| {r} | {100 * done['rows'][f'natural/{r}']:.3g} | {100 * done['rows'][f'planted/{r}']:.3g} |"
            for r in Remedy
        ),
        "",
        "| planted SmolLM2 | perplexity | above float, % |",
        "|---|--:|--:|",
        f"| float | {done['float']:.2f} | 0.0 |",
        f"| steps per channel and token (`w8a8`) | {plain:.2f} | {100 * (plain / done['float'] - 1):+.1f} |",
        f"| advised: `{done['advised']}` | {advised:.2f} | {100 * (advised / done['float'] - 1):+.1f} |",
        "",
    ]
    (ROOT / "results" / "inspect_planted.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
