"""Loss spikes in small: a second moment that is out of date, AdamW against StableAdamW.

    OMP_NUM_THREADS=1 python benchmarks/loss_spikes.py --data FOLDER [--seeds 3]

The Llama of benchmarks/optimizer_states.py learns bytes of Shakespeare for 200 steps (lr 1e-2 after 20 steps
of warm-up, betas (0.9, b2), no weight decay). Then the learning signal changes, and it goes on for 60 more:

    weight    the loss counts 0.01 until then and 1 from then on: the same model, the same text, gradients a
              hundred times as large (Adam does not feel a constant weight, so the loss is what it would be)
    text      a line that repeats until then, Shakespeare from then on: what was quiet wakes up

Losses are those of 32 windows of Shakespeare never trained on. Spike: the highest loss of the 30 steps after
the change less the loss at the change; above 0.1 it counts as one. rms: the largest of the embedding's update
(1 where v is right; ``LowAdamW(clip=math.inf)`` measures it and clips nothing). Lead: how many steps it is
above 2.3 before the loss is highest.

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
BEFORE, AFTER, NEAR, RATE, WARM = 200, 60, 30, 1e-2, 20
ALERT = 2.3  # an rms that announces a spike
LINE = b"To be, or not to be. "
# name, b2, clip of the update, clip of the gradients' norm
ROWS = (
    ("AdamW", 0.999, math.inf, None),
    ("AdamW", 0.99, math.inf, None),
    ("AdamW", 0.95, math.inf, None),
    ("AdamW, gradients clipped to 1", 0.999, math.inf, 1.0),
    ("StableAdamW", 0.999, 1.0, None),
    ("StableAdamW", 0.99, 1.0, None),
)


def run(
    change: str, b2: float, clip: float, norm: float | None, text: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """From the change on: the loss before each step, and the rms of the embedding in it."""
    net, made = model(seed), torch.Generator().manual_seed(seed)
    optimizer = LowAdamW(net.parameters(), RATE, (0.9, b2), weight_decay=0.0, clip=clip)
    embedding = net.get_input_embeddings().weight
    quiet = torch.frombuffer(bytearray(LINE * 500), dtype=torch.uint8)
    learned, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    judge = windows(unseen, 32, torch.Generator().manual_seed(0))
    losses, rms = [], []
    for t in range(BEFORE + AFTER):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (t + 1) / WARM)
        early = t < BEFORE
        if not early:
            with torch.no_grad():
                losses.append(net(input_ids=judge, labels=judge).loss)
        ids = windows(quiet if early and change == "text" else learned, BATCH, made)
        loss = net(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        (loss * (0.01 if early and change == "weight" else 1.0)).backward()
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
    for change in ("weight", "text"):
        for name, b2, clip, norm in ROWS:
            runs = [run(change, b2, clip, norm, text, seed) for seed in range(args.seeds)]
            losses, rms = (torch.stack(parts) for parts in zip(*runs, strict=True))
            height, at = (losses[:, :NEAR] - losses[:, :1]).max(1)
            spikes = int((height > 0.1).sum())
            leads = [int(a) - int((r > ALERT).int().argmax()) for a, r in zip(at, rms, strict=True)]
            lead = f"{min(leads)} to {max(leads)}" if spikes else "-"
            lines.append(
                f"| {change} | {name} | {b2} | {losses[:, 0].mean():.3f} | {rms.amax(1).mean():.1f} | "
                f"{height.mean():+.3f} | {spikes} of {args.seeds} | {lead} | {losses[:, 20].mean():.3f} | "
                f"{losses[:, -1].mean():.3f} |"
            )
            print(lines[-1], flush=True)
    RESULT.write_text(
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/loss_spikes.py --data FOLDER --seeds "
        f"{args.seeds}`.\n\nA Llama of 2 blocks (64 wide, bytes), {BEFORE} steps before and {AFTER} after the "
        f"change; means of {args.seeds} seeds. Spike: highest loss of {NEAR} steps after the change less that "
        f"at the change. Lead: steps from an rms above {ALERT} to the highest loss.\n\n"
        "| change | optimizer | b2 | loss at it | rms | spike | spikes | lead | loss 20 later | at the end |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
