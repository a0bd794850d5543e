"""Mean squared error per weight on independent N(0, 1) numbers at 1 to 4 bits, against what no code can beat.

    OMP_NUM_THREADS=1 python benchmarks/gaussian.py > benchmarks/results/gaussian.md
    python benchmarks/gaussian.py e8p:0.95 higgs-p2-n16        any grids by name, with rho after a colon

The bound at R bits is the rate-distortion function of a Gaussian, 4^-R. One step for the whole matrix, the
`Gaussian` rule's: for scalar grids the best one, for vector grids rms / rho. Published: Max 1960 for
Lloyd-Max; for the lattice rho 1.03 the QuIP# paper's figure. The standard error of a row is that of blocks of
4096 numbers.
"""

import argparse
import math
import time

import torch

from fewbit.format import FP32, Format, Gaussian, PerTensor
from fewbit.grid import by_name

ROWS = (
    *("lloyd1", "higgs-p2-n4", "higgs-p4-n16"),
    *("lloyd2", "higgs-p2-n16", "higgs-p3-n64", "higgs-p4-n256", "e8p:0.9", "e8p:1.0", "e8p:1.03"),
    *("lloyd3", "higgs-p2-n64", "higgs-p3-n512", "higgs-p4-n4096", "e8p-3b:0.98"),
    *("lloyd4", "higgs-p2-n256", "higgs-p3-n4096", "e8p-4b:1.03", "e8p-4b:0.93"),
)
PUBLISHED = {"lloyd1": 0.3634, "lloyd2": 0.1175, "lloyd3": 0.03454, "lloyd4": 0.009497, "e8p:1.03": 0.089}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="GRID[:RHO]")
    parser.add_argument("--side", type=int, default=1536, help="of the square matrix; a multiple of 48")
    args = parser.parse_args()
    w = torch.randn(args.side, args.side, generator=torch.Generator().manual_seed(0))
    print(
        "# Gaussian data\n\nPrinted by `OMP_NUM_THREADS=1 python benchmarks/gaussian.py`: mean squared error"
    )
    print(f"per weight on {w.numel():,} numbers of N(0, 1), one step for all. `bound` is 4^-bits; us: CPU")
    print("microseconds a weight to encode.\n")
    print("| grid | rho | bits | MSE | ± | bound | dB over bound | published | us |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in args.rows:
        name, _, rho = row.partition(":")
        grid = by_name(name)
        fmt = Format(grid=grid, block=PerTensor(), range=Gaussian(rho=float(rho or 1)), scale=FP32)
        fmt.quantize(w[:48])  # tables are built
        began = time.process_time()
        q = fmt.quantize(w)
        took = (time.process_time() - began) / w.numel() * 1e6
        errors = (q.dequantize() - w).double().square().flatten().unfold(0, 4096, 4096).mean(1)
        error, spread = errors.mean().item(), (errors.std() / math.sqrt(len(errors))).item()
        bits = grid.bits / grid.width
        bound = 4**-bits
        print(
            f"| {name} | {rho} | {bits:g} | {error:.4g} | {spread:.1g} | {bound:.4g} | "
            f"{10 * math.log10(error / bound):.2f} | {PUBLISHED.get(row, '')} | {took:.2f} |", flush=True,
        )  # fmt: skip
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread.")


if __name__ == "__main__":
    main()
