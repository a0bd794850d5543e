"""What the trellis grids lose on Gaussian data, and what their search costs.

    python benchmarks/trellis.py [--tiles 192] [--device cpu]

prints three Markdown tables. Errors: mean squared error on N(0, 1) for every code, k = 2, 3, 4 and L = 10,
12, 16 (a step of 1 / 0.95), with the bound 4^-k. First walk: the same for shorter first walks of the
tail-biting search. Time: microseconds a tile (CPU: processor time over tiles, so that other programs do not
count; CUDA: median of events), alone and with two threads; on CUDA by batch size, after a comparison of
the states with those of the eager reference.
"""

import argparse
import time

import torch

from fewbit.grid.trellis import Code, Trellis
from fewbit.viterbi import EAGER

RHO = 0.95
STATES = (10, 12, 16)


def mse(grid: Trellis, x: torch.Tensor, window: int | None = None) -> float:
    """Mean squared error of closed walks for x [N, 256] ~ N(0, 1)."""
    states = grid.walks(x * RHO, window)
    return (grid.points(x.device)[states.long()].flatten(1) / RHO - x).square().mean().item()


def grids(rates=(2, 3, 4)):
    """Every code, rate and number of states that exists."""
    for code in Code:
        for rate in rates:
            for state_bits in STATES:
                if 2 * rate * (1 + (code is Code.HYB)) <= state_bits:
                    yield Trellis(code=code, rate=rate, state_bits=state_bits)


def errors(x: torch.Tensor) -> None:
    """The table of errors; fewer tiles at L = 16."""
    print("| code | k | 4^-k | " + " | ".join(f"L = {L}" for L in STATES) + " |")
    print("| --- " * (3 + len(STATES)) + "|")
    few = x[: len(x) // 4] if x.device.type == "cpu" else x
    found = {(g.code, g.rate, g.state_bits): mse(g, few if g.state_bits == 16 else x) for g in grids()}
    for code in Code:
        for rate in (2, 3, 4):
            row = [found.get((code, rate, L)) for L in STATES]
            cells = " | ".join("-" if v is None else f"{v:.5f}" for v in row)
            print(f"| {code} | {rate} | {4.0**-rate:.5f} | {cells} |", flush=True)


def first_walks(x: torch.Tensor) -> None:
    """MSE by the steps to each side of the seam that the first walk covers."""
    windows = (8, 16, 32, 64, 128)
    print("\n| grid | work | " + " | ".join(f"+-{w}" for w in windows) + " |")
    print("| --- " * (2 + len(windows)) + "|")
    for state_bits in (12, 16):
        grid = Trellis(rate=2, state_bits=state_bits)
        part = x[: len(x) // (4 if state_bits == 16 and x.device.type == "cpu" else 1)]
        cells = " | ".join(f"{mse(grid, part, w):.5f}" for w in windows)
        print(f"| {grid} | 1 + w / 128 | {cells} |", flush=True)


def cpu_times(x: torch.Tensor) -> None:
    """Processor and wall time by threads."""
    print("\n| grid | us a tile, processor time, 1 thread | wall, 1 thread | wall, 2 threads |")
    print("| --- | --- | --- | --- |")
    for grid in (Trellis(rate=2, state_bits=L) for L in STATES):
        part = x[:32] if grid.state_bits == 16 else x
        grid.walks(part[:16])  # compiles
        cells = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wall, own = time.perf_counter(), time.process_time()
            grid.walks(part)
            own, wall = time.process_time() - own, time.perf_counter() - wall
            cells += [own, wall] if threads == 1 else [wall]
        print(f"| {grid} | " + " | ".join(f"{1e6 * c / len(part):.0f}" for c in cells) + " |", flush=True)
    torch.set_num_threads(1)


def cuda_times(device: str) -> None:
    """States equal to the eager reference's, then the time by batch size."""
    batches = (36, 132, 528, 2112)
    print("\n| grid | equal to eager | " + " | ".join(f"us a tile of {n}" for n in batches) + " |")
    print("| --- " * (2 + len(batches)) + "|")
    every = [Trellis(rate=2, state_bits=12), *(g for g in grids() if g.state_bits == 16)]
    for grid in every:
        x = torch.randn(max(batches), 256, device=device)
        args = grid.scaled(x[:4]), grid.raw(device), grid.shift, 128 // grid.values_per_step
        same = torch.equal(EAGER.run(*args, 1 << 30), grid.walks(x[:4]))
        cells = []
        for n in batches:
            spans = []
            for _ in range(3):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                grid.walks(x[:n])
                end.record()
                end.synchronize()
                spans.append(begin.elapsed_time(end))
            cells.append(f"{1e3 * sorted(spans)[1] / n:.1f}")
        print(f"| {grid} | {same} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    x = torch.randn(args.tiles, 256, generator=torch.Generator().manual_seed(0)).to(args.device)
    errors(x)
    first_walks(x)
    if x.device.type == "cpu":
        cpu_times(x)
    else:
        cuda_times(args.device)


if __name__ == "__main__":
    main()
