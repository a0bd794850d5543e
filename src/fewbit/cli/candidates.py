"""What a layer may get: recipes as words or files, or nothing at all, and the choices they mean for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli import options
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.recipe import Recipe, Rule
    from fewbit.search import Choice, Found

KEEP = "keep"
# Beside each other from 2 to 8 bits; all with feedback, all of them fit layers of any shape.
DEFAULT = (
    *(f"higgs:bits={b},solver=gptq" for b in ("2", "2.5", "3", "3.5", "4")),
    "higgs:bits=5,p=1,solver=gptq",
    "higgs:bits=6,p=1,solver=gptq",
    "gptq:bits=8,group_size=-1",
)
# What vLLM has kernels for and a compressed-tensors checkpoint holds; {} is a group that divides all layers.
DEFAULT_VLLM = ("gptq:bits=4,group_size={}", "gptq:bits=8,group_size=-1", "fp8", KEEP)
GROUPS = (128, 64, 32)


class Target(StrEnum):
    """Whose checkpoints a choice must fit."""

    VLLM = "vllm"


Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        "-c",
        metavar="RECIPE[:KEY=VALUE,..]",
        help="What a layer may get: a recipe of `fewbit recipes` with its settings, as in "
        "gptq:bits=3,group_size=64, or keep (as it is); give two or more.",
    ),
]
CandidateFiles = Annotated[
    list[Path] | None,
    typer.Option("--recipe-file", metavar="FILE", help="A recipe as YAML as one more candidate."),
]
For = Annotated[
    Target | None,
    typer.Option(
        "--for",
        help="vllm: only what one compressed-tensors checkpoint holds, and layers that it fuses (q, k, v; "
        "gate, up) choose alike.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """``recipe=None``: the layer stays as it is."""

    name: str
    recipe: Recipe | None

    def rule(self, layer: str) -> Rule | None:
        """What its recipe says of a layer."""
        return None if self.recipe is None else self.recipe.rule_for(layer)

    def choice(self, layer: str) -> Choice:
        """The same for the search."""
        from fewbit.search import Choice

        rule = self.rule(layer)
        if rule is None or rule.weight is None:
            return Choice(format=None, name=self.name)
        return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis, name=self.name)


def candidates(words: Sequence[str], files: Sequence[Path] = ()) -> list[Candidate]:
    """Those that were asked for. Raises ``InputError`` for what cannot be tried on each layer alone, and for
    one that is given twice.
    """
    from fewbit.recipe.entry import from_file, from_words

    found: dict[str, Candidate] = {}
    same: dict[str, str] = {}
    entries = [None if w.strip() == KEEP else from_words(w) for w in words] + [from_file(f) for f in files]
    for entry in entries:
        one = Candidate(name=entry.name if entry else KEEP, recipe=entry.recipe if entry else None)
        text = KEEP if one.recipe is None else one.recipe.to_yaml()
        if one.name in found or text in same:
            raise InputError(
                f"candidate {one.name!r} is given twice, once as {same.get(text, one.name)!r}; leave one out"
            )
        _check(one)
        found[one.name], same[text] = one, one.name
    return list(found.values())


def swept(recipe: str, choices: str, settings: Sequence[str]) -> list[Candidate]:
    """One recipe at several numbers of bits."""
    given = [part.strip() for part in choices.split(",") if part.strip()]
    if len(given) < 2 or len(set(given)) < len(given):
        raise InputError(f"--choices {choices!r} leaves nothing to choose; give numbers such as 2,3,4")
    found = []
    for bits in given:
        made = options.make_recipe(recipe, None, None, None, [*settings, f"bits={bits}"])
        found.append(Candidate(name=f"{recipe} bits={bits}", recipe=made))
        _check(found[-1])
    return found


def defaults(target: Target | None, widths: Sequence[int]) -> list[Candidate]:
    """What is tried where nobody says: of layers with so many inputs."""
    if target is None:
        return candidates(DEFAULT)
    group = next((g for g in GROUPS if all(w % g == 0 for w in widths)), -1)
    return candidates([words.format(group) for words in DEFAULT_VLLM])


def _check(one: Candidate) -> None:
    made = one.recipe
    if made is None:
        return
    if made.of_encoder or made.transforms or made.rotation is not None or made.tuning is not None:
        raise InputError(
            f"recipe {one.name!r} changes more than single layers and cannot be tried on each alone; choose "
            "another, such as higgs, gptq or qtip"
        )
    if any(r.input is not None or r.alternatives or r.split is not None for r in made.rules):
        raise InputError(
            f"recipe {one.name!r} quantizes inputs, splits columns or chooses formats itself, which the "
            "search does not weigh; give recipes of weights alone, such as higgs, gptq or qtip"
        )


def choices(
    found: Sequence[Candidate], kinds: Mapping[str, str], target: Target | None
) -> dict[str, list[Choice]]:
    """The choices of each layer; ``kinds``: class of the module by layer.

    Raises ``InputError`` for what ``target`` cannot hold.
    """
    own = {layer: [one.choice(layer) for one in found] for layer in kinds}
    if target is Target.VLLM:
        for layer, kind in kinds.items():
            for choice in own[layer]:
                _check_held(choice, kind)
    return own


def _check_held(choice: Choice, kind: str) -> None:
    from fewbit.io import compressed_tensors

    if choice.format is None:
        return
    why = "weights in a basis of their own are not written there" if choice.basis is not None else None
    why = why or compressed_tensors.refusal(choice.format, kind)
    if why:
        raise InputError(
            f"candidate {choice.name!r} does not fit one compressed-tensors checkpoint, which vLLM reads: "
            f"{why}; give others, such as gptq:bits=4,group_size=64 and int8"
        )


def as_recipe(found: Found, given: Sequence[Candidate]) -> Recipe:
    """A rule per layer."""
    from fewbit.recipe import Recipe, Rule

    rules = []
    for p in found.layers:
        rule = given[p.choice].rule(p.layer)
        rules.append(Rule(match=p.layer) if rule is None else replace(rule, match=p.layer))
    return Recipe(name="search", rules=tuple(rules))
