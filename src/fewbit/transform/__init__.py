"""Transforms: invertible linear maps along one axis, and what chooses them."""

from fewbit.transform.attention import SmoothAttention
from fewbit.transform.awq import Awq
from fewbit.transform.chooser import Chooser, Kind, Reader, shared
from fewbit.transform.hadamard import Hadamard, hadamard_matrix
from fewbit.transform.incoherence import Incoherence, Spread
from fewbit.transform.kronecker import Kronecker
from fewbit.transform.maps import Diagonal, Map, Orthogonal, Permutation, Product, gram
from fewbit.transform.permute import Permute
from fewbit.transform.smooth import Smooth

CHOOSERS = (Smooth, Awq, SmoothAttention, Permute)

__all__ = [
    "CHOOSERS", "Awq", "Chooser", "Diagonal", "Hadamard", "Incoherence", "Kind", "Kronecker", "Map",
    "Orthogonal", "Permutation", "Permute", "Product", "Reader", "Smooth", "SmoothAttention", "Spread",
    "gram", "hadamard_matrix", "shared",
]  # fmt: skip
