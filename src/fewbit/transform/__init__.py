"""Transforms: invertible linear maps along one axis."""

from fewbit.transform.hadamard import Hadamard, hadamard_matrix
from fewbit.transform.maps import Diagonal, Map, Orthogonal, Permutation, Product, gram

__all__ = ["Diagonal", "Hadamard", "Map", "Orthogonal", "Permutation", "Product", "gram", "hadamard_matrix"]
