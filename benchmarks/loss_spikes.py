"""Loss spikes in small: a second moment that is out of date, AdamW against StableAdamW.

    OMP_NUM_THREADS=1 python benchmarks/loss_spikes.py --data FOLDER [--seeds 3]

The Llama of benchmarks/optimizer_states.py learns bytes of Shakespeare for 200 steps (lr 1e-2 after 20 steps
of warm-up, betas (0.9, b2), no weight decay), and its loss counts 0.01. From then on it counts 1, for 60
steps: the same model and text, gradients a hundred times as large. Adam does not feel a constant weight, so
that nothing changes but how well v knows the gradient.

Losses are those of 32 windows never trained on. Spike: the highest loss within 8 steps of the change (spikes
are reported 1 to 8 steps after v was wrong) less the loss at the change; above 0.1 it counts as one. rms: the
largest of the embedding's update (1 where v is right; ``LowAdamW(clip=math.inf)`` measures it and clips
nothing). Lead: how many steps it is above 2.3 before the loss is highest.

Writes benchmarks/results/loss_spikes.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from optimizer_states import BATCH, model, windows
from torch import Tensor

from fewbit.train import LowAdamW, clip_gradients

RESULT = Path(__file__).parent / "results" / "loss_spikes.md"
BEFORE, AFTER, NEAR, RATE, WARM = 200, 60, 8, 1e-2, 20
ALERT = 2.3  # an rms that announces a spike
SHOWN = (0, 1, 2, 4, 8, 16, 32, 59)  # steps after the change
# name, b2, clip of the update, clip of the gradients' norm
ROWS = (
    ("AdamW", 0.999, math.inf, None),
    ("AdamW", 0.99, math.inf, None),
    ("AdamW", 0.95, math.inf, None),
    ("AdamW, gradients clipped to 1", 0.999, math.inf, 1.0),
    ("StableAdamW", 0.999, 1.0, None),
    ("StableAdamW", 0.99, 1.0, None),
)


def run(b2: float, clip: float, norm: float | None, text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """From the change on: the loss before each step, and the rms of the embedding in it."""
    net, made = model(seed), torch.Generator().manual_seed(seed)
    optimizer = LowAdamW(net.parameters(), RATE, (0.9, b2), weight_decay=0.0, clip=clip)
    embedding = net.get_input_embeddings().weight
    learned, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    judge = windows(unseen, 32, torch.Generator().manual_seed(0))
    losses, rms = [], []
    for t in range(BEFORE + AFTER):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (t + 1) / WARM)
        if t >= BEFORE:
            with torch.no_grad():
                losses.append(net(input_ids=judge, labels=judge).loss)
        ids = windows(learned, BATCH, made)
        optimizer.zero_grad()
        (net(input_ids=ids, labels=ids).loss * (0.01 if t < BEFORE else 1.0)).backward()
        if norm is not None:
            clip_gradients(net.parameters(), norm)
        optimizer.step()
        rms.append(optimizer.rms[embedding])
    return torch.stack(losses), torch.stack(rms[BEFORE:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    raw = (args.data / "calib_tinyshakespeare.txt").read_bytes()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    lines = []
    for name, b2, clip, norm in ROWS:
        runs = [run(b2, clip, norm, text, seed) for seed in range(args.seeds)]
        losses, rms = (torch.stack(parts) for parts in zip(*runs, strict=True))
        height, at = (losses[:, : NEAR + 1] - losses[:, :1]).max(1)
        spikes = int((height > 0.1).sum())
        leads = [int(a) - int((r > ALERT).int().argmax()) for a, r in zip(at, rms, strict=True)]
        curve = " | ".join(f"{v:.2f}" for v in losses.mean(0)[list(SHOWN)].tolist())
        lines.append(
            f"| {name} | {b2} | {rms.amax(1).mean():.1f} | {height.mean():+.3f} | {spikes} of {args.seeds} | "
            f"{f'{min(leads)} to {max(leads)}' if spikes else '-'} | {curve} |"
        )
        print(lines[-1], flush=True)
    steps = " | ".join(f"+{t}" for t in SHOWN)
    RESULT.write_text(
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/loss_spikes.py --data FOLDER --seeds "
        f"{args.seeds}`.\n\nA Llama of 2 blocks (64 wide, bytes) whose loss counts a hundredfold from step "
        f"{BEFORE} on; means of {args.seeds} seeds. Spike: highest loss within {NEAR} steps less that at the "
        f"change. Lead: steps from an rms above {ALERT} to the highest loss. Last columns: the loss so many "
        f"steps after the change.\n\n| optimizer | b2 | rms | spike | spikes | lead | {steps} |\n"
        f"|---|--:|--:|--:|--:|--:|{'--:|' * len(SHOWN)}\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
