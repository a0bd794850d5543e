"""What a weight gets whose rows blocks of 256 do not tile: what llama.cpp takes in a K-quant's place.

    q6_k -> q8_0    q5_k -> q5_1    q4_k -> q5_0    q3_k, q2_k -> q4_0

Each is the smallest of the types with blocks of 32 that is no worse, so nothing is lost but space. llama.cpp
takes IQ4_NL for the last two, which is as large as Q4_0 (``llama_tensor_get_type`` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp).

Road not taken: padding the rows. No engine knows of the padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fewbit.format import FORMATS, Format
from fewbit.io.gguf_codes import FORMAT_OF, same_structure

INSTEAD = {"Q6_K": "q8_0", "Q5_K": "q5_1", "Q4_K": "q5_0", "Q3_K": "q4_0", "Q2_K": "q4_0"}


def fitting(format: Format, columns: int) -> Format:
    """``format``, or, of a K-quant that rows of ``columns`` cannot hold and blocks of 32 can, what is taken
    instead, by the range rule of ``format`` where that was chosen.
    """
    kind = same_structure(format)
    if kind is None or kind.name not in INSTEAD or columns % kind.size == 0 or columns % 32:
        return format
    instead = FORMATS[INSTEAD[kind.name]]
    return instead if format.range == FORMAT_OF[kind.name].range else replace(instead, range=format.range)


def said(changed: Iterable[tuple[str, int, Format, Format]]) -> tuple[str, ...]:
    """A sentence for each pair of formats: ``changed`` are layers with their columns, wanted and got."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, columns, wanted, got in changed:
        pair = same_structure(wanted).name, INSTEAD[same_structure(wanted).name]
        assert got.grid == FORMATS[pair[1]].grid
        groups.setdefault((pair[0].lower(), pair[1]), []).append((name, columns))
    return tuple(
        f"{len(found)} layers get {got} in the place of {wanted}, whose blocks of 256 cut their rows: "
        f"first {found[0][0]} with {found[0][1]} inputs"
        for (wanted, got), found in groups.items()
    )
