"""Compute the table of the trellis code HYB: 512 points of R^2, each with its mirror image.

    python tools/make_hyb_table.py [--seed 0] [--output src/fewbit/grid/data/hyb.npy]

writes float16 [512, 2]. QTIP, https://arxiv.org/abs/2406.11235, takes k-means points of N(0, I_2). As a bit
of the state negates the first coordinate, every point stands for its mirror image too, so k-means runs here
on the folded samples (|x_1|, x_2): Lloyd's iteration over a scrambled Sobol set mapped to the Gaussian. The
points are divided by their common rms, so that a state drawn at random emits values of unit rms, and sorted.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import norm, qmc

POINTS, STEPS, LOG2_SAMPLES = 512, 200, 18


def table(seed: int) -> np.ndarray:
    """[512, 2] float16 of unit rms."""
    x = norm.ppf(qmc.Sobol(2, seed=seed).random_base2(LOG2_SAMPLES))
    x[:, 0] = np.abs(x[:, 0])
    c = x[:POINTS].copy()
    for _ in range(STEPS):
        code = cKDTree(c).query(x)[1]
        count = np.bincount(code, minlength=POINTS)
        assert count.all(), "a point lost all of its samples; take another seed"
        c = np.stack([np.bincount(code, x[:, d], POINTS) for d in range(2)], 1) / count[:, None]
    c = (c / np.sqrt((c**2).mean())).astype(np.float16)
    return c[np.lexsort(c.T[::-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/fewbit/grid/data/hyb.npy"))
    args = parser.parse_args()
    points = table(args.seed)
    np.save(args.output, points)
    wide = points.astype(np.float64)
    print(f"{len(points)} points, rms {np.sqrt((wide**2).mean()):.5f}, largest {np.abs(wide).max():.3f}")


if __name__ == "__main__":
    main()
