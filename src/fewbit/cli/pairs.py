"""``fewbit eval --pairs``: how well an encoder still tells which sentences mean the same."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.io.source import Source

OF_TEXTS = ("data", "join", "window", "windows", "stride", "kv", "chunk")  # options of perplexity alone


def check_options(ctx: typer.Context) -> None:
    """Raise ``InputError`` for an option that means nothing for pairs of sentences."""
    for name in OF_TEXTS:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--pairs scores pairs of sentences and has no use for --{name}; leave one out")


def compare_pairs(
    source: Source, pairs_file: Path, original: Source | None, where: str, dtype, as_json: bool
) -> None:
    """Print the rank correlation of cosines with people's scores, and the change of the embeddings."""
    from fewbit.cli.options import note
    from fewbit.cli.show import print_json
    from fewbit.cli.size import bits_per_weight, parameters, size_bytes
    from fewbit.evaluate.encoder import drift, read_pairs, similarity
    from fewbit.io.load import load

    start = time.perf_counter()
    pairs = read_pairs(pairs_file)
    figures = []
    for one in (source, original):
        if one is not None:
            note(f"embedding {len(pairs.score):,} pairs with {one.name}")
            figures.append(similarity(load(one.name, where, dtype), one.tokenizer(), pairs))
    own = figures[0]
    report = {
        "spearman": own.spearman,
        "pearson": own.pearson,
        "spearman_error": own.error,
        "pairs": own.pairs,
        "data": pairs.name,
        "original_spearman": figures[1].spearman if original else None,
        "original_pearson": figures[1].pearson if original else None,
        "change": drift(own.embeddings, figures[1].embeddings) if original else None,
        "model": source.name,
        "against": original.name if original else None,
        "bits_per_weight": bits_per_weight(source),
        "size_bytes": size_bytes(source),
        "parameters": parameters(source),
        "device": where,
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict) -> None:
    """The figures, and how they were found."""
    from fewbit.cli.show import duration, facts, percent, size

    rows = [("model", report["model"])]
    rows.append(("Spearman", f"{100 * report['spearman']:.2f} +- {100 * report['spearman_error']:.2f}"))
    rows.append(("Pearson", f"{100 * report['pearson']:.2f}"))
    if report["against"] is not None:
        spearman, pearson = (100 * report[f"original_{which}"] for which in ("spearman", "pearson"))
        both = f"Spearman {spearman:.2f}, Pearson {pearson:.2f}"
        rows.append(("original", f"{both}, of {report['against']}"))
        rows.append(("change", f"{percent(report['change'])} of the embeddings, squared"))
    rows += [
        ("bits", f"{report['bits_per_weight']:.2f} per weight"),
        ("size", size(report["size_bytes"])),
        ("protocol", f"cosines of mean-pooled embeddings against scores, {report['pairs']:,} pairs"),
        ("", "+- is the standard error of one correlation; two models on the same pairs differ more surely"),
        ("pairs", report["data"]),
        ("run", f"on {report['device']}, {duration(report['seconds'])}"),
    ]
    facts(rows, sys.stdout)
