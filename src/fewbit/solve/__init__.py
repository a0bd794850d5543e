"""Solvers: pure functions that choose codes."""

from fewbit.solve.ldlq import Ldlq, ldlq
from fewbit.solve.rtn import Rtn
from fewbit.solve.solver import Need, Solver, SolverWarning, Stats

SOLVERS = (Rtn, Ldlq)

__all__ = ["SOLVERS", "Ldlq", "Need", "Rtn", "Solver", "SolverWarning", "Stats", "ldlq"]
