"""SmolLM2-135M trained at 2 or 3 bits against its float self, and what that wins over rounding alone.

    python benchmarks/qat_smollm2.py --data FOLDER --out OUT --device cuda --minutes 8 --bits 2
    torchrun --nproc-per-node 2 benchmarks/qat_smollm2.py --data FOLDER --out OUT --device cuda \\
        --bits 3 --group -1 --codes awq --head --batch 64 --more WIKIPEDIA.npy
    python benchmarks/qat_smollm2.py --data FOLDER --out OUT --device cuda --minutes 3 --sample
    python benchmarks/qat_smollm2.py --data FOLDER --smoke [--eager]

The linears of the blocks train with their rounding in the loop (weights, steps, zeros: `LearnedRange`), norm
gains as well, and with ``--head`` the embedding, which is the head, on the KL divergence of the whole
vocabulary from the float model. They begin at the codes of GPTQ, with ``--codes awq`` on columns that AWQ has
scaled. Text: C4, Wikipedia, books, speeches and WikiText-2 validation (which the rows of methods.py are
calibrated on); ``--more``: windows of wikipedia_windows.py, or files of text; and what the model writes
itself: ``--sample`` goes on from beginnings in those texts, half of them in WikiText-2, for so many minutes,
and later runs find in OUT what every seed wrote. Windows of 512 tokens; the float model's last hidden states
are computed once. Products in bfloat16, weights and optimizer float32. The rates are shares of each weight's
root mean square and fall to 0 by a cosine of the time, while `dampen` draws the weights to their codes, ever
more so. Under torchrun every process has a share of the windows, and torch's DDP takes the mean of gradients,
in bfloat16 on GPUs.

Evaluation as in methods.py: 12 windows of 512 tokens of WikiText-2 raw test, against the float model, of the
model that was trained and of the converted one, whose outputs must be the same bits. The last windows of the
validation text teach nothing; their KL is in the log.

Writes OUT/NAME.json and a checkpoint OUT/NAME. ``--page`` prints the rows kept in
benchmarks/results/qat_smollm2 as benchmarks/results/qat_smollm2.md.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from qat_texts import LENGTH, RANK, START, TEST, TEXTS, VALID, WORLD, eager, hidden, say, states, texts, write
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

import fewbit
from fewbit.compare.worker import device_name
from fewbit.evaluate import Protocol, windows
from fewbit.io.attached import make_saveable
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.train import (
    FakeLinear,
    LearnedRange,
    convert,
    dampen,
    forward_kl,
    kd_loss,
    prepare,
    start_from,
)

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "qat_smollm2"
EVERY = 4  # updates between pulls of `dampen`
GRIDS = {
    "int": "asymmetric integers", "midrise": "odd multiples of half a step",
    "lloyd": "least squared error for normal weights",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--model", default="smollm2", help="or a folder or file of it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="set-up and training")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--grid", choices=GRIDS, help=", ".join(f"{k}: {v}" for k, v in GRIDS.items()))
    parser.add_argument("--group", type=int, default=64, help="weights that share a step; -1: a row")
    parser.add_argument("--codes", dest="start", choices=("awq", "gptq", "nearest"), default="gptq")
    parser.add_argument("--lr", type=float, help="of weights, as a share of their root mean square")
    parser.add_argument("--lr-steps", type=float, default=1e-3, help="of all others, likewise")
    parser.add_argument(
        "--dampen", type=float, default=0.8, help="lambda of `fewbit.train.dampen` at the end; 0 at first"
    )
    parser.add_argument("--head", action="store_true", help="train the embedding, which is the head, too")
    parser.add_argument("--batch", type=int, default=32, help="windows per update and process")
    parser.add_argument(
        "--more", type=Path, nargs="*", default=[], help="further texts, or windows of token ids (.npy)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--sample", action="store_true", help="write text for later runs; train nothing")
    parser.add_argument("--own-only", action="store_true", help="learn from text the model wrote, no other")
    parser.add_argument("--rows", type=int, default=2048, help="texts written at a time")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "out" / "qat_smollm2")
    parser.add_argument("--name", help="of the row; made of the settings otherwise")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a CPU: does it run?")
    parser.add_argument("--page", action="store_true", help="print the kept rows, and train nothing")
    args = parser.parse_args()
    if missing := [str(path) for path in args.more if not path.is_file()]:
        parser.error(f"--more {' '.join(missing)}: there is no such file; give files of text")
    needed = (VALID, TEST) if args.smoke else (*TEXTS, VALID, TEST)
    if not args.page and (missing := [name for name in needed if not (args.data / name).is_file()]):
        parser.error(f"--data {args.data} lacks {', '.join(missing)}; give the folder of these texts")
    args.grid = args.grid or {2: "midrise", 3: "lloyd", 4: "int"}[args.bits]
    args.lr = args.lr or {2: 5e-3, 3: 3e-3, 4: 1.5e-3}[args.bits]
    if not 0 <= EVERY * args.dampen * args.lr <= 1:
        parser.error(f"--dampen {args.dampen:g} at --lr {args.lr:g}: give 0 to {1 / EVERY / args.lr:g}")
    if args.smoke:
        args.batch, args.minutes, args.rows = 2, 5.0, 2
    size = "row" if args.group < 0 else f"g{args.group}"
    parts = args.grid + str(args.bits), size, f"lr{args.lr:g}", "head" if args.head else "", args.start
    parts += (f"damp{args.dampen:g}" if args.dampen else "", f"{args.minutes:g}m")
    args.name = args.name or "-".join(filter(None, parts))
    return args


def recipe(args: argparse.Namespace) -> fewbit.Recipe:
    """GPTQ's, on columns that AWQ has scaled or not. Training takes over the weight formats."""
    options = {"group_size": args.group, "symmetric": args.grid != "int", "scale": "fp16"}
    options["grid"] = f"{args.grid}{args.bits}"
    if args.start == "awq":
        return fewbit.recipes.awq(solver="gptq", duo=True, points=14, **options)
    return fewbit.recipes.gptq(**options)


def groups(model, args: argparse.Namespace) -> list[dict]:
    """Parameters by rate: shares of their root mean square, in powers of the square root of 2."""
    rates: dict[float, list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            fast = args.lr if "_proj" in name and name.endswith(".weight") else args.lr_steps
            size = 1.0 if name.endswith("weight_zero") else float(p.detach().square().mean().sqrt())
            rate = fast * 2 ** (round(2 * math.log2(max(size, 1e-6))) / 2)
            rates.setdefault(rate, []).append(p)
    return [{"params": own, "lr": rate, "first": rate} for rate, own in rates.items()]


def optimizer_of(model, args: argparse.Namespace) -> torch.optim.Optimizer:
    fused = args.device != "cpu"
    return torch.optim.AdamW(groups(model, args), betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def train(model, teacher_head, taught, target, held, held_target, args: argparse.Namespace) -> dict:
    """Updates until the minutes are over; what the run was."""
    compiled = [] if args.eager else list(model.model.layers)
    for block in compiled:
        block.compile(fullgraph=True)
    divergence = forward_kl if args.eager else torch.compile(forward_kl)
    rounded = FakeLinear.rounded if args.eager else torch.compile(FakeLinear.rounded)

    class Loss(torch.nn.Module):
        """What DDP wraps: the model, and the loss of some windows."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, wanted):
            with torch.autocast(args.device.split(":")[0], torch.bfloat16):
                states, head = hidden(self.model, tokens, args), self.model.lm_head
                return kd_loss(states, wanted, head, teacher_head, chunk=4096, divergence=divergence)

    loss_of = Loss()
    held_loss = lambda: loss_of(held, held_target).item()  # with gradients: nothing is compiled anew  # noqa: E731
    model.train()
    optimizer = optimizer_of(model, args)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        loss_of(taught[: args.batch], target[: args.batch]).backward()  # compiles
    except RuntimeError as error:
        if not compiled:
            raise
        say(f"torch.compile failed, so the blocks run as they are: {str(error).splitlines()[0]}")
        eager(compiled)
        rounded = FakeLinear.rounded
        loss_of(taught[: args.batch], target[: args.batch]).backward()
    optimizer.zero_grad()
    first_held = held_loss()
    say(f"{sum(p.numel() for p in trained):,} parameters, held-out KL {first_held:.4f}")
    torch._dynamo.config.optimize_ddp = False  # blocks are compiled one by one: nothing to split
    shared = torch.nn.parallel.DistributedDataParallel(loss_of) if WORLD > 1 else loss_of
    if WORLD > 1 and args.device != "cpu":  # torch has it for NCCL alone
        shared.register_comm_hook(None, bf16_compress_hook)
    begun, budget = time.perf_counter(), 60 * args.minutes - (time.perf_counter() - START)
    generator = torch.Generator().manual_seed(args.seed)
    queue, step, seen = [], 0, []
    looked, asked = begun, begun
    while (share := together((time.perf_counter() - begun) / max(budget, 1.0))) < 1:
        if args.smoke and step == 5:
            break
        if not queue:
            queue = list(torch.randperm(len(taught), generator=generator).split(args.batch))[::-1]
            queue = [rows for rows in queue if len(rows) == args.batch]
        rows = queue.pop().to(target.device)
        rate = min(1.0, share / 0.03) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * rate
        loss = shared(taught[rows], target[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
        step += 1
        if args.dampen and step % EVERY == 0:
            dampen(model, EVERY * args.dampen * share * args.lr * rate, rounded=rounded)
        now = time.perf_counter()
        if RANK == 0 and (now - looked > 10 or args.smoke):
            recent = torch.stack(seen).mean().item()
            speed = step * WORLD * args.batch * taught.shape[1] / (time.perf_counter() - begun)
            say(f"step {step}, {100 * share:.0f} %, KL {recent:.4f}, {speed:,.0f} tokens/s")
            seen, looked = [], now
        if RANK == 0 and now - asked > 60:
            say(f"held-out KL {held_loss():.4f}")
            asked = now
    seconds = time.perf_counter() - begun
    last_held = held_loss()
    eager(compiled)  # what follows has other shapes
    say(f"{step} steps in {seconds:.0f} s, held-out KL {first_held:.4f} -> {last_held:.4f}")
    tokens = step * WORLD * args.batch * taught.shape[1]
    return {
        "steps": step, "tokens": tokens, "texts": WORLD * taught.numel(), "train_seconds": seconds,
        "tokens_per_second": tokens / seconds, "held_kl_before": first_held, "held_kl": last_held,
    }  # fmt: skip


def together(share: float) -> float:
    """The first process's share of the time, in all of them."""
    said = [share]
    if WORLD > 1:
        dist.broadcast_object_list(said, group=CLOCK)
    return said[0]


def start(model, args: argparse.Namespace) -> None:
    """Codes of another method, in the format that trains; kept in OUT for other runs of that format."""
    folder = args.out / f"start-{args.start}-{args.grid}{args.bits}-{args.group}"
    if not folder.exists():
        calibration = fewbit.Calibration(source=args.data / VALID, samples=128, seqlen=LENGTH)
        how = {"calibration": calibration, "device": args.device, "read_back": False}
        fewbit.quantize(args.model, recipe(args), output=folder, **how)
        say(f"{args.start} is done")
    start_from(model, fewbit.load(folder, device=args.device, dtype=torch.float32))


def main() -> None:
    args = arguments()
    if args.page:
        return page()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if WORLD > 1 and args.device != "cpu":
        torch.cuda.set_device(RANK)
    tokenizer = open_source(args.model).tokenizer()
    original = fewbit.load(args.model, dtype=torch.float32).to(args.device).requires_grad_(False)
    if args.sample:
        return write(args, original, tokenizer)
    taught, held = texts(args, tokenizer)
    taught = taught[: len(taught) // WORLD * WORLD][RANK::WORLD].to(args.device)  # or every step waits for it
    rules = replace(recipe(args), transforms=())
    model = prepare(copy.deepcopy(original), rules, weight=LearnedRange())
    if args.start != "nearest":
        for turn in range(min(WORLD, 2)):  # the first process makes it, the others find it
            if turn == min(RANK, 1):
                start(model, args)
            if WORLD > 1:
                dist.barrier(group=CLOCK)
    for name, p in model.named_parameters():
        p.requires_grad_(args.head or "layers." in name or name == "model.norm.weight")
    say(f"the float model reads {taught.numel():,} tokens")
    target, held_target = states(original, taught, args), states(original, held, args)
    say("it has read them")
    protocol = Protocol(windows=1, window=64) if args.smoke else Protocol()
    test = windows(tokenizer, read_text(args.data / TEST), protocol)
    score = lambda m: fewbit.evaluate(m.eval(), test, protocol, against=original)  # noqa: E731
    before = score(model)
    say(f"before training: KL {before.kl:.4f}, perplexity {before.perplexity:.2f}")
    row = {"name": args.name, "bits": bits(model), "device": device_name(args.device)}
    row |= train(model, original.lm_head, taught, target, held, held_target, args)
    del target
    if RANK:
        return
    with torch.no_grad():  # what has no codes is stored in float16
        for p in (p for name, p in model.named_parameters() if "_proj" not in name):
            p.copy_(p.half())
    trained = score(model)
    with torch.no_grad():
        want = model(input_ids=test[:1].to(args.device)).logits
        equal = torch.equal(convert(model)(input_ids=test[:1].to(args.device)).logits, want)
    result = score(model)
    say(f"KL {trained.kl:.4f}, perplexity {trained.perplexity:.2f}")
    say(f"converted: KL {result.kl:.4f}, the same bits: {equal}")
    row |= {"before": before.kl, "trained": trained.kl, "same_bits": equal, "settings": settings(args)}
    row |= {k: v for k, v in result.as_dict().items() if k in ("kl", "kl_error", "top1", "perplexity")}
    (args.out / f"{args.name}.json").write_text(json.dumps(row, indent=1) + "\n")
    make_saveable(model.half()).save_pretrained(args.out / args.name)
    tokenizer.save_pretrained(args.out / args.name)
    say(f"{args.out / args.name}.json")


def bits(model) -> float:
    """Stored bits of a weight, steps and zeros counted."""
    layers = [m for m in model.modules() if isinstance(m, FakeLinear)]
    total = sum(m.format.bits_per_weight(m.weight.shape) * m.weight.numel() for m in layers)
    return total / sum(m.weight.numel() for m in layers)


def settings(args: argparse.Namespace) -> dict:
    kept = "minutes bits grid group start lr lr_steps dampen head batch seed own_only"
    return {name: getattr(args, name) for name in kept.split()} | {"more": [path.name for path in args.more]}


COLUMNS = {
    "row": "{name}", "bits / weight": "{bits:.3f}", "KL before": "{before:.3f}", "KL": "{kl:.4f}",
    "±": "{kl_error:.4f}", "held out": "{held_kl:.4f}", "top-1": "{top1:.3f}",
    "perplexity": "{perplexity:.2f}", "updates": "{steps}", "tokens": "{tokens:,}", "of": "{texts:,}",
    "s": "{train_seconds:.0f}", "on": "{device}",
}  # fmt: skip


def page() -> None:
    rows = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    lines = [
        "Printed by `python benchmarks/qat_smollm2.py --page` (its first lines say what wrote the rows).",
        "Held out: KL on the end of WikiText-2 validation. Tokens: with repetitions; of: without.",
        "",
        " | ".join(["", *COLUMNS, ""]).strip(),
        "|---" + "|--:" * (len(COLUMNS) - 2) + "|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["bits"], r["kl"])):
        lines.append(" | ".join(["", *(form.format(**row) for form in COLUMNS.values()), ""]).strip())
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if WORLD > 1:
        dist.init_process_group()
        CLOCK = dist.new_group(backend="gloo")
    main()
    if WORLD > 1:
        dist.destroy_process_group()
