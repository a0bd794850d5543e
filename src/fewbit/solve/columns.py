"""What solvers that walk a weight by columns share; all of it transposed, so that a column is contiguous."""

from __future__ import annotations

from torch import Tensor

from fewbit.format import Format
from fewbit.format.format import Params


def steps_of(fmt: Format, params: Params, shape: tuple[int, ...], columns: Tensor):
    """Step and zero of some columns, transposed to [len(columns), out or 1]."""
    s, z = fmt.columns(params, shape, columns)
    return s.t().contiguous(), None if z is None else z.t().contiguous()


def round_columns(fmt: Format, rows: Tensor, s: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """``width`` transposed columns [width, out] -> codes [out] and their values [width, out]."""
    if fmt.grid.width == 1:
        code = fmt.code(rows, s, z)
        return code[0], fmt.decode(code, s, z)
    code = fmt.code(rows.t(), s.t(), None if z is None else z.t())
    return code.squeeze(-1), fmt.decode(code, s.t(), None if z is None else z.t()).t()
