"""What few bits in the optimizer cost a tiny language model, and what each state costs in bytes.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_states.py --data FOLDER [--steps 300] [--seeds 3]

A Llama of 2 blocks, 64 wide, over bytes of Shakespeare; batches of 16 windows of 64; AdamW, lr 3e-3 falling
to a tenth by a cosine, betas (0.9, 0.95), weight decay 0.1, gradients clipped to 1. The loss is that of 64
windows never trained on, after the last step. Every row starts from the same weights and sees the same
batches, seed by seed. Products are float32: only what is kept differs. Bytes a parameter are those of the
storage behind gradient, m, v and the master weight (or the parameter, where that is the master), steps
included, over all parameters of the model; embedding and norms keep wide gradients, and tensors below 4096
elements wide states.

The last rows are meant to fail. "zeros": v is allowed to become zero where it was positive.

Writes benchmarks/results/optimizer_states.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewbit.format import BF16, FP32, Flat, Format
from fewbit.grid import by_name
from fewbit.train import O3, Guard, LowAdamW, fp8_gradients, gradient, low_adamw
from fewbit.train.states import Held, one_step

RESULT = Path(__file__).parent / "results" / "optimizer_states.md"
WINDOW, BATCH = 64, 16
RATE = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def model(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": WINDOW,
    }
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, tie_word_embeddings=False)).train()


def windows(text: Tensor, count: int, made: torch.Generator) -> Tensor:
    """[count, WINDOW] bytes from random places."""
    at = torch.randint(0, len(text) - WINDOW, (count, 1), generator=made)
    return text[at + torch.arange(WINDOW)].long()


def fp8_lm(**changed) -> Callable:
    """FP8-LM's optimizer with FP8 gradients, some of its parts changed."""

    def make(net: torch.nn.Module) -> LowAdamW:
        fp8_gradients(net)
        return low_adamw("fp8-lm", net.parameters(), **RATE, **changed)

    return make


def named(name: str, **changed) -> Callable:
    return lambda net: low_adamw(name, net.parameters(), **RATE, **changed)


LINEAR = Format(grid=by_name("uint8"), block=Flat(256), scale=FP32)
ROWS: dict[str, tuple[Callable, bool]] = {  # how to make the optimizer; whether v may become zero
    "fp32": (named("fp32"), False),
    "fp8-lm (O2)": (fp8_lm(), False),
    "fp8-lm, weights E4M3 (O3)": (lambda net: O3.optimizer(net, **RATE), False),
    "adamw-fp8": (named("adamw-fp8"), False),
    "adamw-8bit": (named("adamw-8bit"), False),
    "adamw-4bit": (named("adamw-4bit"), False),
    "fp8-lm, master BF16": (fp8_lm(master=BF16), False),
    "fp8-lm, master BF16 at random": (fp8_lm(master=BF16, stochastic=True), False),
    "fp8-lm, v E4M3 with one step": (fp8_lm(second=one_step("e4m3fn")), False),
    "fp8-lm, v E4M3 with one step, zeros": (fp8_lm(second=one_step("e4m3fn")), True),
    "adamw-8bit, v linear": (named("adamw-8bit", second=LINEAR), False),
    "adamw-8bit, v linear, zeros": (named("adamw-8bit", second=LINEAR), True),
    "fp8-lm, master E4M3": (fp8_lm(master=one_step("e4m3fn")), False),
}  # fmt: skip


def stored(net: torch.nn.Module, optimizer: LowAdamW) -> float:
    """Bytes a parameter of gradient, m, v and master, by the storage behind them."""
    kept = []
    for p in net.parameters():
        g, held = gradient(p), {k: h for k, h in optimizer.state[p].items() if isinstance(h, Held)}
        kept += [g] if isinstance(g, Tensor) else [g.codes, g.scale]
        kept += [t for h in held.values() for t in (h.codes, h.scale) if t is not None]
        kept += [] if "master" in held else [p.data]
    return sum(t.untyped_storage().nbytes() for t in kept) / sum(p.numel() for p in net.parameters())


def train(make: Callable, zeros: bool, text: Tensor, steps: int, seed: int) -> tuple[float, float]:
    """Loss of held-out windows after the last step, and bytes a parameter."""
    net, made = model(seed), torch.Generator().manual_seed(seed)
    learned, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    optimizer = make(net)
    guard = Guard(optimizer, max_norm=1.0)
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE["lr"] * (0.55 + 0.45 * math.cos(math.pi * t / steps))
        ids = windows(learned, BATCH, made)
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        guard.step()
        for state in optimizer.state.values() if zeros else ():
            state["second"].positive = False
    size = stored(net, optimizer)
    with torch.no_grad():
        ids = windows(held, 64, torch.Generator().manual_seed(0))
        return net.eval()(input_ids=ids, labels=ids).loss.item(), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="one row by its name, printed and not written")
    args = parser.parse_args()
    raw = (args.data / "calib_tinyshakespeare.txt").read_bytes()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    rows, reference = [], None
    for name, (make, zeros) in ROWS.items():
        if args.only not in (None, name):
            continue
        runs = [train(make, zeros, text, args.steps, seed) for seed in range(args.seeds)]
        losses = torch.tensor([loss for loss, _ in runs], dtype=torch.float64)
        reference = losses if reference is None else reference
        change = 100 * (losses / reference - 1)
        each = ", ".join(f"{v:.4f}" for v in losses.tolist())
        spread = f"{change.mean():+.2f} ({change.min():+.2f} to {change.max():+.2f})"
        rows.append(f"| {name} | {runs[0][1]:.2f} | {losses.mean():.4f} | {spread} | {each} |")
        print(rows[-1], flush=True)
    if args.only is not None:
        return
    options = f"--steps {args.steps} --seeds {args.seeds}"
    RESULT.write_text(
        f"Printed by `OMP_NUM_THREADS=1 python benchmarks/optimizer_states.py --data FOLDER {options}`.\n\n"
        f"A Llama of 2 blocks, 64 wide, bytes of Shakespeare, {args.steps} steps; loss on held-out windows, "
        f"mean of {args.seeds} seeds; change against fp32 on the same seed, in percent (least to most).\n\n"
        "| optimizer | bytes a parameter | loss | change | by seed |\n|---|--:|--:|--:|---|\n"
        + "\n".join(rows) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
