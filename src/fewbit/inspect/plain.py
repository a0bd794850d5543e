"""What was seen, as plain data: the JSON of ``fewbit inspect``."""

from __future__ import annotations

from dataclasses import asdict

from fewbit.inspect.advice import Advice, advise, common_channels, mean_error
from fewbit.inspect.look import GroupReport, Inspection
from fewbit.inspect.remedies import BITS, Remedy


def as_dict(seen: Inspection) -> dict:
    """Everything but the pictures."""
    return {
        "model": seen.model,
        "text": seen.text,
        "windows": seen.windows,
        "seqlen": seen.seqlen,
        "advice": {f"w{b}a{b}": _advice(seen, advise(seen, b)) for b in BITS},
        "rotation_refused": seen.rotation or None,
        "remedies": {f"w{b}a{b}": {str(r): mean_error(seen, r, b) for r in Remedy} for b in BITS},
        "common_channels": [asdict(c) for c in common_channels(seen)],
        "groups": [_group(g) for g in seen.groups],
        "attention": [None if a is None else {"block": i} | asdict(a) for i, a in enumerate(seen.attention)],
        "residual": [asdict(d) for d in seen.depths],
        "unseen_layers": list(seen.unseen),
    }


def _advice(seen: Inspection, advice: Advice | None) -> dict | None:
    if advice is None:
        return None
    return {
        "recipe": advice.recipe,
        "settings": dict(advice.settings),
        "remedy": str(advice.remedy),
        "error": advice.error,
        "error_per_channel": advice.plain,
        "command": advice.command(seen.model),
    }


def _group(group: GroupReport) -> dict:
    return {
        "block": group.block,
        "norm": group.norm,
        "input": asdict(group.input),
        "layers": [
            {
                "layer": layer.name,
                "shape": list(layer.shape),
                "weight_largest": layer.largest,
                "weight_rms": layer.rms,
                "weight_kurtosis": layer.kurtosis,
                "errors": {
                    f"w{b}a{b}": {str(r): e for r, e in own.items()} for b, own in layer.errors.items()
                },
            }
            for layer in group.layers
        ],
    }
