"""How well the calibration text covered the experts of a mixture: what its router sent where.

An expert that few tokens reached is solved for the most part from others of its block (``mixture.py``), and
that is worth knowing: more text, or text of another kind, may reach it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fewbit.stream.progress import LayerRow

THIN = "fewer tokens than inputs were routed to this expert: solved mostly from others of its block"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of all experts of a model. fewest: tokens of the ``rarest`` expert; unvisited: experts without any;
    thin: how many got fewer tokens than they have inputs, and were solved for the most part from others.
    """

    experts: int
    fewest: int
    rarest: str
    unvisited: tuple[str, ...]
    thin: int

    def as_dict(self) -> dict:
        """Plain data for the manifest and ``--json``."""
        return {**asdict(self), "unvisited": list(self.unvisited)}

    def __str__(self) -> str:
        said = f"{self.experts}; the rarest, {self.rarest}, got {self.fewest} tokens"
        if self.unvisited:
            said = f"{self.experts}; {len(self.unvisited)} got no token, such as {self.unvisited[0]}"
        if self.thin:
            said += f"; {self.thin} got fewer than they have inputs"
        return said


def coverage(rows: Iterable[LayerRow]) -> Coverage | None:
    """What the rows of a run say of experts; None where there are none, or no calibration."""
    tokens: dict[str, int] = {}
    thin: set[str] = set()
    for row in rows:
        if row.routed is not None:
            expert = row.layer.rpartition(".")[0]
            tokens[expert] = row.routed
            thin |= {expert} if THIN in row.notes else set()
    if not tokens:
        return None
    rarest = min(tokens, key=tokens.__getitem__)
    return Coverage(
        experts=len(tokens),
        fewest=tokens[rarest],
        rarest=rarest,
        unvisited=tuple(e for e, n in tokens.items() if not n),
        thin=len(thin),
    )
