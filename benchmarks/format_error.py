"""Mean squared error of every grid of up to 8 bits and every block format, beside theory and print.

    python benchmarks/format_error.py > benchmarks/results/format_error.md

Three distributions of mean 0 and variance 1: Gauss, Laplace, Student's t with 5 degrees of freedom. A grid is
measured at its best step, a block format with the steps it chooses. Then what giving the codes of Inf and NaN
back to numbers brings FP4 (MoFQ, https://arxiv.org/abs/2305.12356), on four distributions and on the linear
layers of the packaged model.
"""

import argparse
import time

import torch

from fewbit.analyze.distribution import TABLED, Distribution, random_samples
from fewbit.analyze.error import Row, best_expected, format_row, grid_row, relative_error
from fewbit.format import FP32, Channel, Format, Group
from fewbit.format.named import FORMATS
from fewbit.grid import GRIDS, by_name
from fewbit.io.source import open_source

SAMPLES = 10**6
FOUR_BITS = ("e2m1-ieee", "e2m1", "int4-narrow")
# On Gauss. Max 1960, tables I (best points) and II (best even points).
PUBLISHED = {
    **{"lloyd1": 0.3634, "lloyd2": 0.1175, "lloyd3": 0.03454, "lloyd4": 0.009497},
    **{"uint1": 0.3634, "uint2": 0.1188, "uint3": 0.03744, "uint4": 0.01154},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="strata for each scalar grid")
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    began = time.perf_counter()
    print("# Error of every format\n")
    print("Printed by `python benchmarks/format_error.py`. Mean squared error on data of variance 1;")
    print("`ratio` is measured over expected; `dB over bound` is the distance to the least that any code of")
    print("these bits can have (rate-distortion function of Gauss, Shannon's lower bound for the others).\n")
    print("Grids, one step for all values, the best one. Unsigned integers have an offset in the middle;")
    print("formats of scales, which have no sign, are measured on |x|.\n")
    grids = [grid for grid in GRIDS if grid.bits <= 8 * grid.width]
    table([[grid_row(grid, law, samples) for law in TABLED] for grid in grids])
    print("\nBlock formats, with the steps they choose and store, on a matrix of 1024 x 1024. Expected: the")
    print("integral over the largest of a block; none where steps depend on more.\n")
    table([[format_row(name, fmt, law) for law in TABLED] for name, fmt in FORMATS.items()])
    reallocation()
    print(f"\n{time.perf_counter() - began:.0f} s on one thread, torch {torch.__version__}.")


def table(rows: list[list[Row]]) -> None:
    """One line for a format: bits, then measured, ratio and distance to the bound for each distribution."""
    heads = [f"{law} | ratio | dB over bound" for law in TABLED]
    print(f"| format | bits | {' | '.join(heads)} | published (Gauss) | ratio |")
    print("|---|" + "--:|" * (3 * len(TABLED) + 3))
    for row in rows:
        cells = []
        for each in row:
            ratio = "" if each.expected is None else f"{each.measured / each.expected:.4f}"
            above = 10 * torch.log10(torch.tensor(each.measured / each.bound)).item()
            cells += [f"{each.measured:.4g}", ratio, f"{above:.2f}"]
        known = PUBLISHED.get(row[0].name)
        cells += ["", ""] if known is None else [f"{known:.4g}", f"{row[0].measured / known:.4f}"]
        print(f"| {row[0].name} | {row[0].bits:.4g} | {' | '.join(cells)} |")


def reallocation() -> None:
    """FP4 with the top exponent for numbers against FP4 with it reserved: relative error, and the saving."""
    print("\nInf and NaN given back to numbers: relative squared error of FP4 with a reserved exponent")
    print("(e2m1-ieee: 0 to 3) and without (e2m1: 0 to 6). First at the best step for all values, then with")
    print("a step for each block, largest magnitude / largest value.\n")
    print("| data | step for | reserved | numbers | saved | int4-narrow |")
    print("|---|---|--:|--:|--:|--:|")
    for law in Distribution:
        line(str(law), "all, the best", [best_expected(by_name(name), law)[1] for name in FOUR_BITS])
    for law in Distribution:
        line(str(law), "128", of_blocks(Group(128), [random_samples(law)]))
    source = open_source("smollm2")
    names = [n for n, info in source.tensors().items() if len(info.shape) == 2 and ".layers." in n]
    weights = [w.float() for w in source.read(names).values()]
    for words, block in (("64", Group(64)), ("row", Channel())):
        line(f"SmolLM2-135M, {len(weights)} linears", words, of_blocks(block, weights))
    print(
        "\nSmolLM2 was distributed in 4 bits, evenly spaced in blocks of 32: its weights lie on few points."
    )


def of_blocks(block: Group | Channel, tensors: list[torch.Tensor]) -> list[float]:
    """Squared error of all tensors over their energy, for each of `FOUR_BITS`."""
    energies = [t.double().square().sum().item() for t in tensors]
    found = []
    for name in FOUR_BITS:
        fmt = Format(grid=by_name(name), block=block, scale=FP32)
        errors = [e * relative_error(fmt, t) for t, e in zip(tensors, energies, strict=True)]
        found.append(sum(errors) / sum(energies))
    return found


def line(data: str, words: str, errors: list[float]) -> None:
    """One line of the table."""
    reserved, numbers, even = errors
    saved = f"{1 - numbers / reserved:.1%}"
    print(f"| {data} | {words} | {reserved:.5f} | {numbers:.5f} | {saved} | {even:.5f} |")


if __name__ == "__main__":
    main()
