"""Compute the stored vector grids: n points of R^p with the least mean squared error for N(0, I_p).

    python tools/make_gaussian_points.py [--seed 0] [--only higgs-p2-n256] [--output src/fewbit/grid/data]

writes gaussian.npz (float32 [n, p] a grid) and gaussian.json (how each was made, and what it measures), and
prints one line a grid. The grids are those of HIGGS, https://arxiv.org/abs/2411.17525, which asks for the
minimum of

    D(c) = E min_i |x - c_i|^2 / p,   x ~ N(0, I_p),     dD/dc_i = 2 P(cell i) (c_i - mean of cell i) / p

Here D is taken over a scrambled Sobol set mapped to the Gaussian: cell means over it err less than over as
many independent samples, so the points do not fit the noise of their sample. It is minimised by L-BFGS, which
needs fewer steps than Lloyd's iteration, from starts drawn with the asymptotically optimal density, the
Gaussian's to the power p / (p + 2): N(0, (p + 2) / p). Many starts run on a small set; the best go on with a
large one; a fresh set picks the winner, and another one, four times as large, measures it.

The road not taken: competitive learning (CLVQ), which the paper names. It needs no sample set, but its last
digits come slowly.
"""

import argparse
import json
import time
from pathlib import Path

import numba
import numpy as np
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.stats import norm, qmc

# (p, n, starts, starts kept, MSE per dimension of the grid that transformers ships or of others' k-means)
GRIDS = (
    (2, 4, 8, 2, 0.3631),
    (2, 8, 16, 3, 0.2015),
    (2, 16, 40, 4, 0.1071),
    (2, 32, 40, 4, 0.0575),
    (2, 64, 40, 4, 0.02965),
    (2, 128, 40, 4, 0.01538),
    (2, 256, 40, 4, 0.00774),
    (3, 64, 30, 3, 0.1016),
    (3, 512, 8, 2, 0.0274),
    (3, 4096, 2, 1, None),
    (4, 16, 30, 3, 0.3418),
    (4, 256, 8, 2, 0.0974),
    (4, 4096, 2, 1, None),
)
FRESH = 22  # log2 of the samples, none of them used before, behind a printed MSE


def gaussian_set(p: int, log2: int, seed: int) -> np.ndarray:
    """[2^log2, p] float32 of low discrepancy for N(0, I_p)."""
    return norm.ppf(qmc.Sobol(p, seed=seed).random_base2(log2)).astype(np.float32)


@numba.njit(fastmath=True)
def walk(x, c, near, code, mass, total):
    """Nearest points by descent over the graph ``near`` from the codes of the step before.

    Changes code [N] in place, adds counts to mass [n] and sums to total [n, p]; returns sum |x - c|^2.
    """
    error = 0.0
    p = x.shape[1]
    for j in range(x.shape[0]):
        best = code[j]
        least = np.float32(0)
        for d in range(p):
            least += (x[j, d] - c[best, d]) ** 2
        while True:
            centre = best
            for i in near[centre]:
                distance = np.float32(0)
                for d in range(p):
                    distance += (x[j, d] - c[i, d]) ** 2
                if distance < least:
                    least, best = distance, i
            if best == centre:
                break
        code[j] = best
        mass[best] += 1
        for d in range(p):
            total[best, d] += x[j, d]
        error += least
    return error


def refine(x: np.ndarray, c: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
    """L-BFGS on D over the set x from the points c: the points and their D."""
    n, p = c.shape
    code = cKDTree(c).query(x)[1].astype(np.int32)
    # In units of 1 / sqrt(P(cell)) the Hessian of D is near the identity.
    unit = 1 / np.sqrt(np.maximum(np.bincount(code, minlength=n), 1) / len(x))[:, None]

    def distortion(flat):
        c = (flat.reshape(n, p) * unit).astype(np.float32)
        near = cKDTree(c).query(c, k=min(n, 2 ** (p + 2)))[1][:, 1:].astype(np.int32)
        mass, total = np.zeros(n), np.zeros((n, p))
        error = walk(x, c, near, code, mass, total)
        gradient = 2 * (mass[:, None] * c - total) / len(x) / p
        return error / len(x) / p, (gradient * unit).ravel()

    found = minimize(
        distortion, (c / unit).ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": steps, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-9},
    )  # fmt: skip
    return found.x.reshape(n, p) * unit, found.fun


def polish(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`refine`, again while points have lost their samples: they join the cells of largest error."""
    n = len(c)
    for _ in range(5):
        c = refine(x, c, 200)[0]
        distance, code = cKDTree(c).query(x)
        lost = np.flatnonzero(np.bincount(code, minlength=n) < len(x) / n / 50)
        if not len(lost):
            break
        error = np.bincount(code, distance**2, n)
        for i, worst in zip(lost, np.argsort(-error)[: len(lost)], strict=True):
            mine = np.flatnonzero(code == worst)
            c[i] = (c[worst] + x[mine[distance[mine].argmax()]]) / 2
    return c


def distortion(c: np.ndarray, x: np.ndarray) -> float:
    """D of the points c over the samples x, by exact search."""
    return float((cKDTree(c).query(x)[0] ** 2).mean() / c.shape[1])


def make(p: int, n: int, starts: int, kept: int, seed: int) -> np.ndarray:
    """[n, p] float32, in ascending order of the first coordinate."""
    rng = np.random.default_rng([seed, p, n])
    small = gaussian_set(p, min(20, max(14, int(np.log2(n)) + 8)), int(rng.integers(2**31)))
    large = gaussian_set(p, 20 if n <= 512 else 21, int(rng.integers(2**31)))
    tries = []
    for _ in range(starts):
        start = rng.standard_normal((n, p)) * np.sqrt((p + 2) / p)
        tries.append(refine(small, start, 150))
    tries.sort(key=lambda each: each[1])
    judge = gaussian_set(p, 20, int(rng.integers(2**31)))
    done = [polish(large, c) for c, _ in tries[:kept]]
    best = min(done, key=lambda c: distortion(c, judge)).astype(np.float32)
    return best[np.lexsort(best.T[::-1])]


def measure(c: np.ndarray, seed: int) -> tuple[float, float]:
    """Over a fresh set: D, and the rms distance of points from the means of their cells, over sqrt(D)."""
    n, p = c.shape
    x = gaussian_set(p, FRESH, seed + 10**6)
    distance, code = cKDTree(c).query(x)
    mass = np.bincount(code, minlength=n)[:, None]
    total = np.stack([np.bincount(code, x[:, d], n) for d in range(p)], 1)
    mse = float((distance**2).mean() / p)
    return mse, float(np.sqrt(((total - mass * c) ** 2 / np.maximum(mass, 1)).sum() / len(x) / p / mse))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of the grids to make; the others are kept")
    parser.add_argument("--output", type=Path, default=Path("src/fewbit/grid/data"))
    args = parser.parse_args()
    points, record = {}, {}
    if args.only and (args.output / "gaussian.npz").exists():
        points = dict(np.load(args.output / "gaussian.npz", allow_pickle=False))
        record = json.loads((args.output / "gaussian.json").read_text())
    print("| grid | MSE per dimension | tabulated | ratio | off-centre | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for p, n, starts, kept, tabulated in GRIDS:
        name = f"higgs-p{p}-n{n}"
        if args.only and name not in args.only:
            continue
        begin = time.perf_counter()
        points[name] = make(p, n, starts, kept, args.seed)
        mse, centre = measure(points[name], args.seed)
        record[name] = {"seed": args.seed, "starts": starts, "mse": round(mse, 7), "fresh_samples": 2**FRESH}
        ratio = f"{tabulated} | {mse / tabulated:.4f}" if tabulated else "- | -"
        seconds = time.perf_counter() - begin
        print(f"| {name} | {mse:.6f} | {ratio} | {centre:.4f} | {seconds:.0f} |", flush=True)
    order = [f"higgs-p{p}-n{n}" for p, n, *_ in GRIDS]
    args.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output / "gaussian.npz", **{k: points[k] for k in order if k in points})
    record = {"script": "tools/make_gaussian_points.py"} | {k: record[k] for k in order if k in record}
    (args.output / "gaussian.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
