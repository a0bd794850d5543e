"""Incoherence: random orthogonal maps on both sides of a weight, kept with the layer, run at every call.

    W' = O W T,     y = ( (x T) W'^T ) O,     T [in, in], O [out, out] orthogonal           (rows: y' = y O^T)

No entry of W' stands out, and no direction of the inputs' Gram matrix T^T H T lies along few columns, so one
step serves the whole matrix and the errors of rounding are those of a normal source. Nothing is folded: the
signs come from a seed, so a checkpoint holds no matrix, and a call costs n log n per token on each side.

QuIP, Chee, Cai, Kuleshov, De Sa 2023, https://arxiv.org/abs/2307.13304, section 4: Kronecker products. QuIP#,
Tseng et al. 2024, https://arxiv.org/abs/2402.04396, section 3: Hadamard with random signs, for any size here
(`fewbit.transform.hadamard`). HIGGS, Malinovskii et al. 2024, https://arxiv.org/abs/2411.17525: groups of
columns, inputs only.

Layers that read one tensor get one T, so their inputs are mapped alike and their Gram matrix is shared.

Road not taken: QuIP's rescaling of the columns by (H_jj / (W^T W)_jj)^(1/4) before. Its vector has to be
stored, and seams (SmoothQuant, AWQ) do the same where it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from fewbit.errors import InputError
from fewbit.transform.hadamard import Hadamard
from fewbit.transform.kronecker import Kronecker
from fewbit.transform.maps import Map


class Spread(StrEnum):
    """The kind of random orthogonal map."""

    HADAMARD = "hadamard"
    KRONECKER = "kronecker"


@dataclass(frozen=True, kw_only=True)
class Incoherence:
    """Maps of the input and, with ``output``, of the output of a layer; ``seed`` of both.

    block: columns of one block of a block-diagonal input map (HIGGS's groups), which the width of the layer
    must be a multiple of; None: one map of the whole width.
    """

    spread: Spread = Spread.HADAMARD
    output: bool = True
    block: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.block is not None and self.block < 2:
            raise InputError(f"blocks of {self.block} columns mix nothing; give 2 or more, or none")
        if self.block is not None and self.spread is not Spread.HADAMARD:
            raise InputError(f"{self.spread} maps have no blocks; use Hadamard maps, or leave the block out")

    def __str__(self) -> str:
        """'hadamard basis of both sides'."""
        sides = "both sides" if self.output else "inputs"
        return f"{self.spread} basis of {sides}" + (f" in blocks of {self.block}" if self.block else "")

    def check(self, shape: tuple[int, int], what: str) -> None:
        """Raise ``InputError`` where blocks do not tile the columns of ``what`` of ``shape`` [out, in]."""
        if self.block is not None and shape[1] % self.block:
            raise InputError(
                f"{what} has {shape[1]} columns, which blocks of {self.block} do not tile; choose a block "
                f"that divides {shape[1]}, or none"
            )

    def input_map(self, n: int) -> Map:
        """T for a layer with n inputs."""
        if self.spread is Spread.KRONECKER:
            return Kronecker(n, seed=self.seed)
        return Hadamard(n, seed=self.seed, block=self.block)

    def output_map(self, m: int) -> Map | None:
        """O^T as a map of rows: y' = y O^T, or None."""
        if not self.output:
            return None
        return (Kronecker if self.spread is Spread.KRONECKER else Hadamard)(m, seed=self.seed + 1)

    def enter(self, w: Tensor) -> Tensor:
        """W' = O W T of a weight [out, in]."""
        w, rows = self.input_map(w.shape[1]).dual(w), self.output_map(w.shape[0])
        return w if rows is None else rows.apply(w, 0)

    def leave(self, w: Tensor, *, inputs: bool = True) -> Tensor:
        """W from W'; without ``inputs`` only the rows are mapped back (the inputs are mapped at run time)."""
        rows = self.output_map(w.shape[0])
        w = w if rows is None else rows.invert(w, 0)
        return self.input_map(w.shape[1]).invert(w) if inputs else w
