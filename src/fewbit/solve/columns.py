"""What solvers that walk a weight by columns share; all of it transposed, so that a column is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.format import Format, QTensor
from fewbit.format.format import Params
from fewbit.grid.learned import choose, decode


def steps_of(fmt: Format, params: Params, shape: tuple[int, ...], columns: Tensor):
    """Step and zero of some columns, transposed to [len(columns), out or 1]."""
    s, z = fmt.columns(params, shape, columns)
    return s.t().contiguous(), None if z is None else z.t().contiguous()


class Tables:
    """The learned tables that the rows of a column see: runs of equally many rows share one."""

    def __init__(self, fmt: Format, table: Tensor | QTensor, shape: tuple[int, ...]):
        book = fmt.codebook
        self.points = book.points(table, fmt.grid)
        ids = torch.arange(len(self.points)).view(book.block.scale_shape(shape))
        ids = book.block.take(ids, shape, torch.arange(shape[1])).t()  # [in, out or 1]
        run = int((ids[0] == ids[0, 0]).sum())
        self.ids = ids[:, ::run].to(self.points.device)

    def at(self, column: int) -> Tensor:
        """[runs, M, K, w]; a number and not a tensor, which a GPU would have to be waited for."""
        return self.points[self.ids[column]]


def round_columns(
    fmt: Format,
    rows: Tensor,
    s: Tensor,
    z: Tensor | None,
    points: Tensor | None = None,
    cost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``width`` transposed columns [width, out] -> codes [out] and their values [width, out].

    points: the tables of the rows, [runs, M, K, w], where they are learned; cost: [w, w] of an error there.
    """
    if points is not None:
        points = points.to(rows.dtype)
        code = choose((rows / s).t().reshape(len(points), -1, len(rows)), points, cost)
        return code.flatten().to(fmt.grid.code_dtype), decode(code, points).flatten(0, 1).t() * s
    if fmt.grid.width == 1:
        code = fmt.code(rows, s, z)
        return code[0], fmt.decode(code, s, z)
    code = fmt.code(rows.t(), s.t(), None if z is None else z.t())
    return code.squeeze(-1), fmt.decode(code, s.t(), None if z is None else z.t()).t()
