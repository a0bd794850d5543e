"""Quantizers of tensors that no linear reads, in a native checkpoint: an encoder's sums, norms and outputs.

The steps of a site (``fewbit.nn.sites``) are ``X.output_site.scale`` and ``X.output_site.zero`` in the file,
or ``X.input_site...``, in their own dtypes; a step for the whole tensor is written as [1]. The configuration
has

    "activations": [{"type": "Activation", ...}],
    "sites": [{"module": "encoder.layer.0.output.LayerNorm", "at": "input", "activation": 0, "columns": 384}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fewbit.format.activation import Activation
from fewbit.format.codec import FORMAT_CLASSES, from_plain, to_plain
from fewbit.io import inputs
from fewbit.io.typed import check_types
from fewbit.nn.sites import At, Site


@dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """What the configuration says of a quantized tensor that no linear reads: its columns, its Activation."""

    site: Site
    activation: Activation
    columns: int

    @property
    def name(self) -> str:
        """Where its steps are stored."""
        return f"{self.site.module}.{self.site.child}"

    @property
    def nbytes(self) -> int:
        """Bytes of its steps in the file."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout().values())

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name of every stored tensor (scale, zero) -> shape and dtype."""
        stored = inputs.layout(self.activation, self.columns)
        return {name.removeprefix("input_"): kind for name, kind in stored.items()}


def to_config(sites: Sequence[SiteEntry]) -> dict:
    """Their part of a ``quantization_config``; empty without sites."""
    if not sites:
        return {}
    kinds = list(dict.fromkeys(s.activation for s in sites))
    listed = [
        {
            "module": s.site.module,
            "at": str(s.site.at),
            "activation": kinds.index(s.activation),
            "columns": s.columns,
        }
        for s in sites
    ]
    return {"activations": [to_plain(kind) for kind in kinds], "sites": listed}


def from_config(config: Mapping) -> tuple[SiteEntry, ...]:
    """Inverse of ``to_config``. Raises what broken data raises: KeyError, IndexError, TypeError..."""
    kinds = [from_plain(kind) for kind in config.get("activations", ())]
    found = tuple(
        SiteEntry(
            site=Site(s["module"], At(s["at"])), activation=kinds[s["activation"]], columns=s["columns"]
        )
        for s in config.get("sites", ())
    )
    for entry in found:
        check_types(entry, FORMAT_CLASSES)
    return found
