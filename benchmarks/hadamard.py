"""Hadamard maps on a CPU: products with small matrices against one dense matrix and a butterfly; and what an
inexact factor costs.

    OMP_NUM_THREADS=1 python benchmarks/hadamard.py > benchmarks/results/hadamard.md

Speed: 2048 tokens, float32, signs included in all three; CPU time of one thread, for the machine may be
shared; least of eight runs, two where a run takes over a second, ways in turn. The butterfly does log2(2^k)
passes of sums and differences, then a product with the matrix of the other factor, on the same cachefuls of
rows as the map.
Quality: relative int4 per-token error after the map, on normal activations with 1, 3 or 20 channels 100 times
as large; means of 6 draws of 256 tokens. The factor of order m = 9, 43, 107 of n = 128 m is Hartley's, or
random orthogonal; the library needs one of the two for 107 alone and has an exact map of the other sizes.
"""

import math
import time

import torch

from fewbit.format import FP32, Format, Token
from fewbit.grid import Int
from fewbit.transform import Hadamard, hadamard_matrix

SIZES = (576, 1536, 4096, 14336)
TOKENS = 2048


def butterfly(x: torch.Tensor, *args: object) -> torch.Tensor:
    """x [tokens, n], a cacheful of rows at a time."""
    out, step = torch.empty_like(x), (1 << 17) // x.shape[-1]
    for i in range(0, len(x), step):
        out[i : i + step] = passes(x[i : i + step], *args)
    return out


def passes(x: torch.Tensor, signs: torch.Tensor, odd: torch.Tensor | None, twos: int) -> torch.Tensor:
    """x [tokens, n], n = len(odd) * twos: log2(twos) passes, then the other factor."""
    n = x.shape[-1]
    x = x * signs
    half = 1
    while half < twos:
        a, b = x.view(-1, 2, half).unbind(1)
        x = torch.stack([a + b, a - b], 1)
        half *= 2
    x = x.view(-1, n // twos, twos)
    x = x if odd is None else odd.T @ x
    return x.reshape(-1, n) * n**-0.5


def speed() -> None:
    print("| n | factors | fewbit ms | dense n x n ms | butterfly ms | dense / fewbit | butterfly / fewbit |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for n in SIZES:
        x, t = torch.randn(TOKENS, n), Hadamard(n, seed=0)
        *odd, twos = t.factors
        other = hadamard_matrix(odd[0]).float() if odd else None
        dense = t.apply(torch.eye(n))
        signs = t.apply(torch.eye(n))[:, 0].sign()
        if odd:
            signs = signs * hadamard_matrix(odd[0])[:, 0].float().repeat_interleave(twos)
        ways = (lambda: t.apply(x), lambda: x @ dense, lambda: butterfly(x, signs, other, twos))  # noqa: B023
        results = [way() for way in ways]  # also warms up
        for got in results[1:]:
            torch.testing.assert_close(got, results[0], rtol=0, atol=1e-4)
        del results
        least = [math.inf] * 3
        for run in range(8):
            for i, way in enumerate(ways):
                if run < 2 or least[i] < 1e3:
                    start = time.process_time()
                    way()
                    least[i] = min(least[i], 1e3 * (time.process_time() - start))
        a, b, c = least
        named = " x ".join(map(str, t.factors))
        print(f"| {n} | {named} | {a:.1f} | {b:.1f} | {c:.1f} | {b / a:.1f} | {c / a:.1f} |", flush=True)


def quality() -> None:
    fmt = Format(grid=Int(4), block=Token(), scale=FP32)

    def measured(y: torch.Tensor) -> tuple[float, float]:
        error = (fmt.quantize(y).dequantize() - y).norm() / y.norm()
        return (y.abs().amax(-1) / y.square().mean(-1).sqrt()).mean().item(), error.item()

    print("\n| n | outlier channels | no map: max/rms, error | Hartley | random | error, random / Hartley |")
    print("|--:|--:|--:|--:|--:|--:|")
    for odd in (9, 43, 107):
        n = odd * 128
        for channels in (1, 3, 20):
            rows = []
            for draw in range(6):
                torch.manual_seed(draw)
                x = torch.randn(256, n)
                x[:, torch.randperm(n)[:channels]] *= 100
                two = hadamard_matrix(128).float() / 128**0.5
                q, r = torch.linalg.qr(torch.randn(odd, odd))
                i = torch.arange(odd)
                angle = (i[:, None] * i % odd) * (2 * torch.pi / odd)
                signs = torch.randint(0, 2, (n,)) * 2 - 1
                parts = ((angle.cos() + angle.sin()) / odd**0.5, q * r.diagonal().sign())
                mapped = [(f.T @ ((x * signs).view(-1, odd, 128) @ two)).flatten(1) for f in parts]
                rows.append([measured(y) for y in (x, *mapped)])
            a, b, c = torch.tensor(rows).mean(0).tolist()
            cells = " | ".join(f"{peak:.2f}, {error:.3f}" for peak, error in (a, b, c))
            print(f"| {n} | {channels} | {cells} | {c[1] / b[1]:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Printed by `OMP_NUM_THREADS=1 python benchmarks/hadamard.py` (see its first lines).\n")
    speed()
    quality()
