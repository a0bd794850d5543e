"""ACIQ and OCTAV beside a brute-force search: how close their clips come, and how much faster they are.

    OMP_NUM_THREADS=1 python benchmarks/range_search.py > benchmarks/results/range_search.md

Accuracy: 2^20 samples at the quantiles (i + 1/2) / n of Gauss and Laplace, so that tails carry no noise; the
search tries clips on the grid itself, within 10 % of the prior's in steps of 0.5 %, then around the best of
those in steps of 0.05 %. Speed: a float32 matrix [1024, 4096] of normal numbers, against the library's own
search (`MSE`: real grid, blocks in the cache) over 200 clips; least of several runs, methods in turn.
"""

import time

import torch

from fewbit.format import FP32, MSE, Format, Zero
from fewbit.format import octav as octav_module
from fewbit.format.aciq import ACIQ, clip
from fewbit.format.octav import OCTAV
from fewbit.format.prior import Gaussian, Prior, best_clip
from fewbit.grid import Int, Table, by_name

SAMPLES = 1 << 20


def samples(prior: Prior) -> torch.Tensor:
    p = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    x = (
        torch.special.ndtri(p)
        if prior is Prior.GAUSS
        else torch.sign(p - 0.5) * -torch.log1p(-2 * (p - 0.5).abs())
    )
    return x.float()


def integer_formats(bits: int) -> dict[str, Format]:
    steps = 2 ** (bits - 1)
    paper = Table("paper", (torch.arange(-steps, steps + 1) / steps).tolist())
    return {
        f"int{bits}-narrow": Format(grid=Int(bits, narrow=True), scale=FP32),
        f"uint{bits} affine": Format(grid=Int(bits, signed=False), zero=Zero.OFFSET, scale=FP32),
        f"2^{bits} + 1 points": Format(grid=paper, scale=FP32),
    }


def error(fmt: Format, x: torch.Tensor, a: float) -> float:
    half = torch.tensor([a])
    parts = x[None].split(1 << 16, -1)  # a cacheful at a time
    return sum((fmt.round_trip(p, -half, half) - p).square().sum().item() for p in parts) / len(x)


def search(fmt: Format, x: torch.Tensor, about: float) -> tuple[float, float]:
    """(least error, its clip): 0.5 % steps over +-10 %, then 0.05 % steps around the best."""
    _, a = min((error(fmt, x, c), c) for c in (about * (0.9 + 0.005 * i) for i in range(41)))
    return min((error(fmt, x, c), c) for c in (a * (0.994 + 0.0005 * i) for i in range(25)))


def accuracy() -> None:
    print("| data | grid | best clip | ACIQ clip | ACIQ MSE | OCTAV clip | OCTAV MSE | OCTAV steps "
          "| MSE of the ACIQ paper's clip | MSE of OCTAV's fixed point |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    taken: list[int] = []
    recursion = octav_module.recursion

    def counted(*args):
        out = recursion(*args)
        taken.append(out[2])
        return out

    octav_module.recursion = counted
    worst = {"aciq": 0.0, "octav": 0.0}
    for prior in Prior:
        x = samples(prior)
        cases = [(bits, name, f) for bits in range(2, 9) for name, f in integer_formats(bits).items()]
        cases += [(None, n, Format(grid=by_name(n), scale=FP32)) for n in ("e2m1", "nf4", "e3m2", "e4m3fn")]
        for bits, name, fmt in cases:
            least, best = search(fmt, x, best_clip(fmt.unit_points(), prior))
            cells = [best]
            for key, rule in (("aciq", ACIQ()), ("octav", OCTAV())):
                a = rule(x, fmt, None)[1].item()
                cells += [a / best, error(fmt, x, a) / least]
                if bits:
                    worst[key] = max(worst[key], abs(a / best - 1))
            steps = taken[-1]
            fixed = error(fmt, x, OCTAV(refine=0)(x, fmt, None)[1].item()) / least
            table = f"{error(fmt, x, clip(bits, prior)) / least:.4f}" if bits else ""
            a, b, c, d, e = cells
            print(f"| {prior} | {name} | {a:.4f} | {b:.4f} | {c:.5f} | {d:.4f} | {e:.5f} | {steps} "
                  f"| {table} | {fixed:.4f} |", flush=True)  # fmt: skip
    octav_module.recursion = recursion
    print(
        f"\nWorst clip on the integer grids: ACIQ {worst['aciq']:.2%} off, OCTAV {worst['octav']:.2%} off.\n"
    )


def speed() -> None:
    print("| grid | blocks | search of 200 clips, ms | ACIQ, ms | times faster | OCTAV, ms | times faster "
          "| Gaussian, ms |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    x = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    shapes = {"channel": x[:, None], "tensor": x.reshape(-1), "group 128": x.view(1024, 32, 128)}
    rules = (MSE(steps=196, shrink=0.2, weighted=False), ACIQ(), OCTAV(), Gaussian())
    for bits in (2, 4, 8):
        for name, fmt in list(integer_formats(bits).items())[:2]:
            for shape, blocks in shapes.items():
                least = [float("inf")] * len(rules)
                for run in range(7):
                    for i, rule in enumerate(rules):
                        if i or run < 3:
                            start = time.perf_counter()
                            rule(blocks, fmt, None)
                            least[i] = min(least[i], time.perf_counter() - start)
                brute, aciq, octav, gaussian = (1e3 * t for t in least)
                print(f"| {name} | {shape} | {brute:.0f} | {aciq:.1f} | {brute / aciq:.0f} | {octav:.1f} "
                      f"| {brute / octav:.0f} | {gaussian:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Printed by `OMP_NUM_THREADS=1 python benchmarks/range_search.py`. Clips and errors are divided by "
          "those of the search. One thread of a shared machine; per tensor the search leaves the cache, "
          "so compare OCTAV there with the search per channel too.\n")  # fmt: skip
    accuracy()
    speed()
