"""GPUs as data: how much memory each has, and since which generation which arithmetic exists.

Memory is what the vendor's product page says, in GB of 10^9 bytes. Drivers report a little more (16.1e9 for a
T4 of 16 GB), so the figure is a safe one. The B200 is sold with 180 GB usable (DGX and HGX pages); 192 GB are
on its package. Compute capability decides the arithmetic: BF16 from 8.0 (Ampere), FP8 from 8.9 (Ada, Hopper).

Sources: product pages and data sheets at https://www.nvidia.com/en-us/data-center/; compute capability:
https://developer.nvidia.com/cuda-gpus and https://developer.nvidia.com/cuda-legacy-gpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.errors import InputError

RESERVE = 0.10
"""Share of a GPU that is kept free: the CUDA context (0.3 to 0.6 GB), workspaces, fragmentation."""

ANY, BF16, FP8 = (0, 0), (8, 0), (8, 9)
"""Least compute capability: anything, BF16 arithmetic, FP8 arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One product: memory in GB of 10^9 bytes, compute capability, name of the generation."""

    name: str
    memory_gb: int
    capability: tuple[int, int]
    generation: str

    def __post_init__(self):
        if self.memory_gb <= 0:
            raise InputError(f"a GPU with {self.memory_gb} GB of memory cannot be; give a positive figure")

    @property
    def usable(self) -> int:
        """Bytes that a model may take: memory less ``RESERVE``."""
        return round(self.memory_gb * 1e9 * (1 - RESERVE))

    def __str__(self) -> str:
        """Name and size: 'H100 80 GB'."""
        return f"{self.name} {self.memory_gb} GB"


GPUS: tuple[Gpu, ...] = (
    Gpu(name="P100", memory_gb=16, capability=(6, 0), generation="Pascal"),
    Gpu(name="T4", memory_gb=16, capability=(7, 5), generation="Turing"),
    Gpu(name="RTX 4090", memory_gb=24, capability=(8, 9), generation="Ada"),
    Gpu(name="V100", memory_gb=32, capability=(7, 0), generation="Volta"),
    Gpu(name="A100", memory_gb=40, capability=(8, 0), generation="Ampere"),
    Gpu(name="L40", memory_gb=48, capability=(8, 9), generation="Ada"),
    Gpu(name="L40S", memory_gb=48, capability=(8, 9), generation="Ada"),
    Gpu(name="A100", memory_gb=80, capability=(8, 0), generation="Ampere"),
    Gpu(name="H100", memory_gb=80, capability=(9, 0), generation="Hopper"),
    Gpu(name="H200", memory_gb=141, capability=(9, 0), generation="Hopper"),
    Gpu(name="B200", memory_gb=180, capability=(10, 0), generation="Blackwell"),
)
"""Ordered by memory."""


def holding(nbytes: float, least: tuple[int, int] = ANY, gpus: Sequence[Gpu] = GPUS) -> tuple[Gpu, ...]:
    """The GPUs that hold ``nbytes`` beside their reserve and have at least the capability ``least``."""
    return tuple(g for g in gpus if nbytes <= g.usable and g.capability >= least)


def how_many(nbytes: float, gpu: Gpu) -> int:
    """GPUs of one kind that hold ``nbytes`` when it is split evenly."""
    return max(1, math.ceil(nbytes / gpu.usable))
