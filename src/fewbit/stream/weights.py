"""Tensors of a model that is only partly in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.io.source import Source


class Rounded:
    """A Source whose floating tensors are rounded to the dtype in which the output will store them."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self._source, self._dtype = source, dtype

    def read(self, names):
        """Tensors as the output checkpoint will hold them."""
        return {
            n: t.to(self._dtype) if t.is_floating_point() else t for n, t in self._source.read(names).items()
        }

    def __getattr__(self, name):
        return getattr(self._source, name)


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def forget(model: nn.Module, names: list[str]) -> None:
    """Parameters back to the meta device one by one, ties kept (their modules may hold small ones that
    stay).
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        param = model.get_submodule(owner)._parameters.get(leaf)
        if param is not None and not param.is_meta:
            torch.utils.swap_tensors(param, nn.Parameter(param.detach().to("meta"), requires_grad=False))
