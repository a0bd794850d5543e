"""Solvers: pure functions that choose codes."""

from fewbit.solve.hqq import Hqq
from fewbit.solve.ldlq import Ldlq, ldlq
from fewbit.solve.rtn import Rtn
from fewbit.solve.solver import Need, Solver, SolverWarning, Stats

SOLVERS = (Rtn, Ldlq, Hqq)

__all__ = ["SOLVERS", "Hqq", "Ldlq", "Need", "Rtn", "Solver", "SolverWarning", "Stats", "ldlq"]
