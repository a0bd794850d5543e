"""Solvers: pure functions that choose codes."""

from fewbit.solve.aim import Aimed
from fewbit.solve.aqlm import Aqlm
from fewbit.solve.gptvq import Gptvq
from fewbit.solve.hqq import Hqq
from fewbit.solve.ldlq import Ldlq, ldlq
from fewbit.solve.lwc import Lwc
from fewbit.solve.rtn import Rtn
from fewbit.solve.signround import SignRound
from fewbit.solve.solver import Need, Solver, SolverWarning, Stats

SOLVERS = (Rtn, Ldlq, Hqq, Lwc, SignRound, Aimed, Gptvq, Aqlm)

__all__ = [
    "SOLVERS", "Aimed", "Aqlm", "Gptvq", "Hqq", "Ldlq", "Lwc", "Need", "Rtn", "SignRound", "Solver",
    "SolverWarning", "Stats", "ldlq",
]  # fmt: skip
