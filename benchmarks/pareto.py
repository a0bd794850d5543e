"""KL against bits of every method on SmolLM2-135M and of the libraries beside it: docs/pictures/pareto.svg.

    python benchmarks/pareto.py

Measures nothing: it draws the rows that benchmarks/methods.py put into benchmarks/results/methods, and the
peers' results in benchmarks/results/against_peers.json, which are of the same evaluation, and prints the
front: the rows that no other row beats in both bits and KL. The ground is left transparent, and the colours
can be read on white and on black.
"""

import json
from pathlib import Path

from against_peers import ROWS
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parent
PICTURE = ROOT.parent / "docs" / "pictures" / "pareto.svg"
OURS, THEIRS, TEXT = "#2f8fd0", "#d9742b", "#808080"
MOST = 4.0  # KL of the upper edge: nothing is left of a model beyond it
Point = tuple[float, float, str]


def ours() -> list[Point]:
    """(bits, KL, name) of fewbit's rows."""
    rows = json.loads((ROOT / "results" / "methods" / "results.json").read_text())["rows"]
    return [(row["bits"], row["kl"], row["name"]) for row in rows if row["error"] is None]


def theirs() -> list[Point]:
    """(bits, KL, package and method) of the peers' rows that have a KL."""
    rows = json.loads((ROOT / "results" / "against_peers.json").read_text())
    known = [row for row in ROWS if "theirs kl" in rows.get(row.name, {})]
    # Where the two differ in bits, the peer's stand second.
    return [
        (float(r.bits.split(", ")[-1]), rows[r.name]["theirs kl"], f"{r.package}: {r.name.split(',')[0]}")
        for r in known
    ]


def front(points: list[Point]) -> list[Point]:
    """Points that no other beats, the fewest bits first."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def draw(own: list[Point], peers: list[Point]) -> Figure:
    """The picture."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    best = [p for p in front(own) if p[1] <= MOST]
    rest = [p for p in own if p not in best and p[1] <= MOST]
    axes.plot(*_ends(rest), "o", ms=4.5, color=OURS, alpha=0.45, mew=0, label="fewbit")
    # Steps: whoever has bits to spare can take the row to the left.
    steps = {"drawstyle": "steps-post", "ms": 6, "lw": 1.5}
    axes.plot(*_ends(best), "o-", **steps, color=OURS, label="fewbit, nothing of it is better")
    axes.plot(*_ends(peers), "^", ms=7, color=THEIRS, mew=0, label="other libraries")
    axes.set(xlabel="bits per weight, everything counted", ylabel="KL, nats per token", yscale="log")
    axes.set_xlim(1.8, 8.6)
    for bits, kl, name in _apart(best):
        _say(axes, bits, kl, name, OURS, (-6, -12), "right" if bits > 2.4 else "left")
    above = 0.0
    for bits, kl, name in sorted(peers, key=lambda p: -p[1]):
        down = -9 if 1 < above / kl < 1.15 else 0  # two names on one height
        _say(axes, bits, kl, name, THEIRS, (7, down), "left" if bits < 8 else "right")
        above = kl
    axes.tick_params(colors=TEXT, which="both")
    axes.grid(True, which="major", color=TEXT, alpha=0.25, lw=0.6)
    for side in axes.spines.values():
        side.set_color(TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.legend(frameon=False, labelcolor=TEXT, loc="upper right")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure


def _ends(points: list[Point]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _apart(points: list[Point], bits: float = 0.25) -> list[Point]:
    """Points whose names do not meet: of close neighbours, the best."""
    kept: list[Point] = []
    for point in points:
        if kept and point[0] - kept[-1][0] < bits:
            kept.pop()
        kept.append(point)
    return kept


def _say(axes, x: float, y: float, words: str, colour: str, offset: tuple[int, int], side: str) -> None:
    if side == "right":
        offset = (-abs(offset[0]), offset[1])
    axes.annotate(
        words, (x, y), offset, textcoords="offset points", ha=side, color=colour, fontsize=8, va="center"
    )


def main():
    own, peers = ours(), theirs()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewbit", "font.family": "sans-serif"}):
        draw(own, peers).savefig(PICTURE, metadata={"Date": None})
    print("| bits / weight | KL | method |")
    print("|--:|--:|---|")
    for bits, kl, name in front(own):
        print(f"| {bits:.3f} | {kl:.4f} | {name} |")
    print()
    for bits, kl, name in sorted(peers):
        least = min((k, n) for b, k, n in own if b <= bits + 0.005)  # the peers' are rounded to 0.01
        print(f"{name}, {bits:.2f} bits, KL {kl:.4f}; fewbit in as many: {least[0]:.4f}, {least[1]}")


if __name__ == "__main__":
    main()
