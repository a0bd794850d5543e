"""A look at a model over a text: where outliers are, what they cost, and which recipe deals with them."""

from fewbit.inspect.advice import Advice, advise, common_channels
from fewbit.inspect.look import GroupReport, Inspection, LayerReport, look
from fewbit.inspect.remedies import Remedy

__all__ = [
    "Advice",
    "GroupReport",
    "Inspection",
    "LayerReport",
    "Remedy",
    "advise",
    "common_channels",
    "look",
]
