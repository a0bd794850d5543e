"""Tensors of a model that is only partly in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.io.source import Source


class Rounded:
    """A Source whose floating tensors are rounded to the dtype in which the output will store them: that of
    the file, so that what is not quantized stays as it is, byte for byte.
    """

    def __init__(self, source: Source):
        self._source = source

    def read(self, names):
        """Tensors as the output checkpoint will hold them."""
        kept = self._source.kept_dtype
        return {n: t.to(kept(n)) if t.is_floating_point() else t for n, t in self._source.read(names).items()}

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """A parameter of a block as the output holds it, on the CPU, from its ``value`` in the run.

        A run in half precision has narrowed a float32 tensor: where nothing else changed it, the source's.
        """
        if not value.is_floating_point():
            return value.detach().to("cpu")
        kept, dtype = self._source.kept_dtype(name), self._source.dtype
        wide = kept if kept.itemsize > dtype.itemsize else dtype
        out = value.detach().to("cpu", wide)
        if wide.itemsize > value.dtype.itemsize:
            original = self._source.read([name])[name]
            return original.to(wide) if torch.equal(original.to(value.dtype), value.cpu()) else out
        return out

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
