"""Beginnings at which a float model is decided: prompts for a fair comparison of greedy tokens.

    python benchmarks/serve_prompts.py --texts calib_wikipedia_extract.txt calib_c4_en_train_first1000.jsonl

Two engines round differently, so where a model's two likeliest tokens are nearly tied chance decides, and
from there on the continuations are different texts. A greedy comparison says something of an engine only
where the model itself is decided. The float model alone chooses, before anything is quantized or served: from
the first 24 tokens of paragraphs of the texts, and a few beginnings that count, list or quote, those whose
greedy road of 24 tokens has the largest smallest gap between the two likeliest tokens, in nats: the four of
all, and the four of the paragraphs that follow. Roads that end the text, or have fewer than 8 tokens that
differ (a loop is decided, too), are left out.

Writes benchmarks/results/serve_prompts.json, which serve_vllm.py reads, and .md.
"""

import argparse
import json
import random
from pathlib import Path

import torch

import fewbit
from fewbit.io.source import open_source
from fewbit.io.text import read_text

ROOT = Path(__file__).parent
TOKENS, LENGTH, DISTINCT = 24, 24, 8
WRITTEN = [
    "one, two, three, four, five, six, seven,",
    "one two three four five six seven eight nine",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    "2, 4, 6, 8, 10, 12, 14, 16,",
    "100, 99, 98, 97, 96, 95, 94, 93,",
    "Monday, Tuesday, Wednesday,",
    "January, February, March, April,",
    "A B C D E F G H I J",
    "a, b, c, d, e, f, g, h, i,",
    "Mercury, Venus, Earth,",
    "first, second, third, fourth, fifth,",
    "We hold these truths to be self-evident, that all men are",
    "Four score and seven years ago our fathers",
    "We the People of the United States, in Order to form a",
    "Twinkle, twinkle, little star,",
    "To be, or not to be,",
    "Our Father, who art in heaven,",
    "In the beginning God created the",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
    "1 x 7 = 7, 2 x 7 = 14, 3 x 7 = 21,",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", required=True, help="files whose paragraphs begin")
    parser.add_argument("--model", default="smollm2", help="or a folder or file")
    parser.add_argument("--candidates", type=int, default=900)
    parser.add_argument("--keep", type=int, default=4)
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer()
    model = fewbit.load(args.model, dtype=torch.float32)
    found = []
    for ids in beginnings(tokenizer, args.texts, args.candidates):
        found += roads(model, tokenizer, ids)
    found.sort(key=lambda road: -road["gap"])
    plain = [road for road in found[args.keep :] if not road["text"].startswith(tuple(WRITTEN))]
    kept = found[: args.keep] + plain[: args.keep]
    counts = {"candidates": args.candidates + len(WRITTEN), "left": len(found), "prompts": kept}
    (ROOT / "results" / "serve_prompts.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")
    (ROOT / "results" / "serve_prompts.md").write_text(page(args, counts), encoding="utf-8")
    print(page(args, counts))


def beginnings(tokenizer, texts: list[str], number: int, batch: int = 60):
    """Batches [n, tokens] of beginnings of one length each."""
    starts = []
    for text in texts:
        lines = [line for document in read_text(text).documents for line in document.split("\n")]
        ids = [tokenizer(line).input_ids[:LENGTH] for line in lines if len(line) > 150]
        starts += random.Random(0).sample(ids, number // len(texts))
    starts = [ids for ids in starts if len(ids) == LENGTH]
    for i in range(0, len(starts), batch):
        yield torch.tensor(starts[i : i + batch])
    for text in WRITTEN:
        yield torch.tensor([tokenizer(text).input_ids])


@torch.no_grad()
def greedy(model, ids: torch.Tensor, cache=None, tokens: int = TOKENS):
    """ids [n, t] -> the likeliest tokens one after another, how far each is before the second and its
    log-probability, nats: three of [n, tokens]."""
    chosen, gaps, logp, step = [], [], [], ids
    for _ in range(tokens):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        said = out.logits[:, -1].float().log_softmax(-1).topk(2)
        step = said.indices[:, :1]
        chosen.append(step)
        gaps.append(said.values[:, :1] - said.values[:, 1:])
        logp.append(said.values[:, :1])
    return torch.cat(chosen, 1), torch.cat(gaps, 1), torch.cat(logp, 1)


def roads(model, tokenizer, ids: torch.Tensor) -> list[dict]:
    """Of a batch of beginnings the roads that count."""
    found, special = [], set(tokenizer.all_special_ids)
    for start, road, gaps, _ in zip(ids, *greedy(model, ids), strict=True):
        distinct = set(road.tolist())
        if len(distinct) >= DISTINCT and not distinct & special:
            text, goes_on = (tokenizer.decode(part) for part in (start, road))
            found.append({"ids": start.tolist(), "text": text, "goes_on": goes_on, "gap": float(gaps.min())})
    return found


def page(args, counts: dict) -> str:
    """The table."""
    names = " ".join(Path(text).name for text in args.texts)
    lines = [
        f"Printed by `python benchmarks/serve_prompts.py --texts {names}` (its first lines say how): of "
        f"{counts['candidates']} beginnings {counts['left']} count, and these are kept.",
        "",
        f"| beginning | the float model goes on | smallest gap in {TOKENS} tokens, nats |",
        "|---|---|---|",
    ]
    for road in counts["prompts"]:
        start, goes_on = (" ".join(road[key].split()).replace("|", "/") for key in ("text", "goes_on"))
        lines.append(f"| {start} | {goes_on} | {road['gap']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
