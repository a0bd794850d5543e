"""Which tensors of an encoder a recipe rounds, the sentences that show them, and the steps that follow.

Steps come from sentences, not from windows of a text: outliers sit at [CLS], [SEP] and punctuation
(Bondarenko, Nagel, Blankevoort 2021, https://arxiv.org/abs/2109.12948, section 3), so each sentence runs with
its own special tokens, and padding is left out. Weights are rounded by then, activations are still float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.evaluate.encoder import batches
from fewbit.io.sites import SiteEntry
from fewbit.io.text import EMBEDDED, HELD_OUT, read_text
from fewbit.nn.sites import At, Quantizer, Site, check_groups, fit, observe
from fewbit.recipe import Recipe
from fewbit.recipe.sites import Place, SiteRule, places
from fewbit.stream.blocks import linears
from fewbit.stream.data import Calibration

BATCH = 16  # sentences run together; a batch counts once in moving averages


@dataclass(frozen=True, kw_only=True)
class PlannedSite:
    """A tensor that gets a quantizer: where and what it is, its rule, its columns, and the site whose ranges
    sort these.
    """

    place: Place
    rule: SiteRule
    columns: int
    sorted_by: Site | None = None

    @property
    def entry(self) -> SiteEntry:
        """What a native checkpoint says of it."""
        return SiteEntry(site=self.place.site, activation=self.rule.activation, columns=self.columns)

    @property
    def text(self) -> str:
        """Its format in words."""
        by = "" if self.rule.sorted_by is None else f" in {self.rule.sorted_by}"
        return f"{self.rule.activation}{by}"


def plan_sites(model: nn.Module, recipe: Recipe) -> tuple[PlannedSite, ...]:
    """The tensors that the recipe rounds, in the order of the modules.

    Raises ``InputError`` for a model that is not built like BERT, groups that do not divide, and a layer
    without the tensor that its columns are to be sorted by.
    """
    every, out = places(model), []
    for p in every:
        rule = recipe.site_rule(p.role)
        if rule is None:
            continue
        columns = _columns(model, p.site)
        check_groups(rule.activation, columns)
        rule.activation.format.check((1, columns), f"the tensor {p.role} of {p.site}")
        by = None
        if rule.sorted_by is not None:
            alike = (q for q in every if q.layer == p.layer and q.role is rule.sorted_by)
            by = next((q.site for q in alike), None)
            if by is None or _columns(model, by) != columns:
                raise InputError(
                    f"recipe {recipe.name!r} sorts {p.role} by {rule.sorted_by}, which {p.site} does not "
                    "have beside it in the same width; leave that tensor out of the rule"
                )
        out.append(PlannedSite(place=p, rule=rule, columns=columns, sorted_by=by))
    return tuple(out)


def _columns(model: nn.Module, site: Site) -> int:
    """Width of a tensor, told by the module: a linear, a norm, or one that ends with a linear."""
    module = model.get_submodule(site.module)
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = list(linears(module).values())[-1].weight
    return weight.shape[1 if weight.ndim == 2 and site.at is At.INPUT else 0]


def wants_sentences(recipe: Recipe) -> bool:
    """Whether any step has to be found on sentences."""
    return any(rule.activation is not None and rule.activation.static for rule in recipe.sites)


def check_sentences(recipe: Recipe, calibration: Calibration) -> None:
    """Raise ``InputError`` when no sentences are given: the default text has none that an encoder reads."""
    if calibration.source in (None, EMBEDDED, HELD_OUT):
        raise InputError(
            f"recipe {recipe.name!r} finds its steps on sentences like those that the encoder will read; "
            "give a text with one on every line: --calibration FILE"
        )


def read_sentences(calibration: Calibration, tokenizer: Any, config: Any) -> list[dict[str, Tensor]]:
    """Batches of ``samples`` different sentences (lines that are not blank), chosen by the seed.

    A sentence is cut at ``seqlen`` tokens, or at what the model reads where that is less. Raises InputError
    for a text with fewer sentences.
    """
    text = read_text(calibration.source)
    lines = list(dict.fromkeys(s for d in text.documents if (s := d.strip())))
    if len(lines) < calibration.samples:
        raise InputError(
            f"{text.name} has {len(lines)} different sentences (lines), but {calibration.samples} are asked "
            f"for; use --samples {len(lines)}, or give a longer text"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(len(lines), generator=generator)[: calibration.samples].tolist()
    most = min(calibration.seqlen, config.max_position_embeddings, tokenizer.model_max_length)
    return batches(tokenizer, [lines[i] for i in chosen], size=BATCH, tokens=most)


def calibrate(
    model: nn.Module, sites: Sequence[PlannedSite], sentences: Sequence[Mapping[str, Tensor]]
) -> dict[Site, Quantizer]:
    """The quantizer of every site, from what the sentences show there."""
    wanted = [s.place.site for s in sites if s.rule.activation.static]
    wanted += [s.sorted_by for s in sites if s.sorted_by is not None]
    seen = observe(model, list(dict.fromkeys(wanted)), sentences) if wanted else {}
    out = {}
    for s in sites:
        order = torch.arange(s.columns)  # of groups that are not sorted
        if s.sorted_by is not None:
            order = seen[s.sorted_by].spread.argsort(stable=True)
        out[s.place.site] = fit(s.rule.activation, seen.get(s.place.site), order)
    return out
