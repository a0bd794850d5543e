"""Recipe: which tensor gets which Format by which solver, as frozen data.

A recipe is an ordered tuple of rules; the first rule whose pattern matches a layer's name decides. Named
methods are functions that return one (``fewbit.recipe.RECIPES``); a variant calls the function with other
settings, or replaces a field. The data round-trips to YAML and is saved beside every checkpoint, so that one
run's recipe is another run's input.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

import yaml

from fewbit.errors import InputError
from fewbit.format import Format
from fewbit.format.activation import Activation
from fewbit.format.codec import FORMAT_CLASSES, from_plain, to_plain
from fewbit.format.split import Split
from fewbit.nn.kvcache import KVFormat, is_static
from fewbit.recipe.sites import Role, SiteRule
from fewbit.solve import SOLVERS, Need, Rtn, Solver
from fewbit.solve.blocktune import BlockTuning
from fewbit.solve.tune import Tuner
from fewbit.transform import CHOOSERS
from fewbit.transform.chooser import Chooser
from fewbit.transform.incoherence import Incoherence
from fewbit.transform.rotation import Rotation


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another pair of formats that a layer may get instead of its rule's, where the error is less."""

    weight: Format
    input: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Layers whose full name matches ``match`` (shell pattern: *, ?, [..]) get ``weight``, solved by
    ``solver``, and read their ``input`` quantized.

    ``weight=None`` leaves them as they are; ``input=None`` leaves the input in the model's dtype; ``split``
    keeps columns of the weight that meet outliers in float, and inputs there as they are. With
    ``alternatives`` each layer gets the formats with the least error of its output (of the weight alone where
    nothing asks for calibration); on a tie the rule's own. basis: random orthogonal maps on both sides of the
    weight, in which it is quantized and kept.
    """

    match: str = "*"
    weight: Format | None = None
    solver: Solver = Rtn()
    input: Activation | None = None
    alternatives: tuple[Alternative, ...] = ()
    basis: Incoherence | None = None
    split: Split | None = None

    def __post_init__(self):
        if self.split is not None:
            self._check_split()
        if isinstance(self.solver, Tuner) and self.input is not None and self.input.centred:
            raise InputError(
                f"rule {self.match!r} centres inputs of layers that are tuned by the block, before their "
                "means are known; use another solver, or inputs that are not centred"
            )
        for one in self.alternatives:
            self.solver.check(one.weight)
        if self.basis is not None and Need.CROSS in self.solver.needs:
            raise InputError(
                f"rule {self.match!r} aims weights at rounded inputs in a basis of their own, which is not "
                "built; use a solver that does not aim, or a rotation of the model"
            )
        if self.basis is not None and self.input is not None and self.input.static:
            raise InputError(
                f"rule {self.match!r} has static steps for inputs in a basis of their own; use dynamic ones"
            )
        if self.weight is not None:
            self.solver.check(self.weight)
        elif self.input is not None:
            raise InputError(
                f"rule {self.match!r} quantizes the input of layers whose weight stays as it is; give it a "
                "weight format too"
            )

    def _check_split(self) -> None:
        if self.weight is None or self.alternatives or isinstance(self.solver, Tuner):
            raise InputError(
                f"rule {self.match!r} keeps columns apart, which goes with one weight format and a solver of "
                "single layers, such as Rtn() or Ldlq(); leave the split out"
            )
        if self.input is not None and self.input.momentum is not None:
            raise InputError(
                f"rule {self.match!r} keeps columns apart and has a moving average of ranges, which counts "
                "them; leave momentum out"
            )
        if self.basis is not None:
            raise InputError(
                f"rule {self.match!r} keeps columns apart in a basis that mixes them; leave one out"
            )
        self.split.check(self.weight)

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration statistics that this rule's solver or range rule uses."""
        if self.weight is None:
            return frozenset()
        needs = set(self.solver.needs) | ({Need.SAMPLE} if self.split is not None else set())
        for weight, input in self.choices:
            if (weight.scale or weight.codebook) and weight.range.wants_importance:
                needs.add(Need.GRAM)
            if input is not None and (input.static or self.alternatives):
                needs |= {Need.COLUMNS, Need.SAMPLE}
            if input is not None and input.centred:
                needs.add(Need.MEAN)
        return frozenset(needs)

    @property
    def choices(self) -> tuple[tuple[Format, Activation | None], ...]:
        """Formats of weight and input that a layer may get, the rule's own first."""
        return ((self.weight, self.input), *((a.weight, a.input) for a in self.alternatives))

    def chosen(self, choice: int) -> Rule:
        """The rule with one of its ``choices`` made."""
        weight, input = self.choices[choice]
        return replace(self, weight=weight, input=input, alternatives=())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules under a name; the first match wins, a layer that none matches stays as it is.

    rotation: QuaRot's maps of the whole model, done first; transforms: what chooses maps at the seams of each
    block before its layers are solved, in this order; tuning: what is still float in a block learns to make
    up for each group of layers that was quantized; None for no such thing. sites: what tensors of an encoder
    that no linear reads are rounded to, the first that names a tensor's role decides; embedding: the Format
    of its token table. kv: keys and values whose fixed steps calibration finds and the checkpoint keeps.
    """

    name: str
    rules: tuple[Rule, ...]
    transforms: tuple[Chooser, ...] = ()
    rotation: Rotation | None = None
    tuning: BlockTuning | None = None
    sites: tuple[SiteRule, ...] = ()
    embedding: Format | None = None
    kv: KVFormat | None = None

    def __post_init__(self):
        if self.kv is not None:
            self._check_kv()
        if self.of_encoder:
            self._check_encoder()
        elif not self.rules:
            raise InputError(
                f"recipe {self.name!r} has no rules; give at least one, such as Rule(match='*', weight=...)"
            )
        if self.rotation is not None and self.rotation.online and any(rule.basis for rule in self.rules):
            raise InputError(
                f"recipe {self.name!r} maps the inputs of layers twice at every call; give the rotation "
                "online=false, or the rules no basis"
            )
        if self.tuning is not None:
            self._check_tuning()

    @property
    def of_encoder(self) -> bool:
        """Whether it speaks of tensors that only encoders have quantized: sums, outputs, the token table."""
        return bool(self.sites) or self.embedding is not None

    def _check_kv(self) -> None:
        if self.of_encoder:
            raise InputError(
                f"recipe {self.name!r} is of an encoder, which keeps no keys and values; leave kv out"
            )
        if not all(part.format is not None and is_static(part.format) for part in self.kv.parts()):
            raise InputError(
                f"recipe {self.name!r} keeps keys and values in a format that finds its steps as they come, "
                "so a checkpoint has nothing to store; give fp8-tensor, fp8-head, int8-tensor or int8-head, "
                "or --kv to eval and generate alone"
            )

    def _check_encoder(self) -> None:
        for rule in self.rules:
            if rule.needs or rule != Rule(match=rule.match, weight=rule.weight, solver=rule.solver):
                raise InputError(
                    f"recipe {self.name!r} rounds sums and outputs of an encoder or its token table, which "
                    "goes with rules of a weight format and a solver that needs no calibration, such as "
                    f"Rtn(); leave the rest out of rule {rule.match!r}"
                )
        if self.transforms or self.rotation is not None or self.tuning is not None:
            raise InputError(
                f"recipe {self.name!r} rounds sums and outputs of an encoder or its token table, which goes "
                "without transforms, rotation and tuning; leave them out"
            )

    def site_rule(self, role: Role) -> SiteRule | None:
        """The first rule that names the role of a tensor and gives it bits, or None."""
        rule = next((r for r in self.sites if role in r.roles), None)
        return None if rule is None or rule.activation is None else rule

    def _check_tuning(self) -> None:
        for rule in self.rules:
            if isinstance(rule.solver, Tuner):
                raise InputError(
                    f"recipe {self.name!r} tunes between groups, and {type(rule.solver).__name__} of rule "
                    f"{rule.match!r} learns from the whole block at once; give a solver of single layers, "
                    "such as Ldlq(), or no tuning"
                )
            if any(input is not None and input.static for _, input in rule.choices):
                raise InputError(
                    f"recipe {self.name!r} tunes norms after rule {rule.match!r} has fitted static steps to "
                    "what comes out of them; use dynamic ones, or no tuning"
                )

    def rule_for(self, layer: str) -> Rule | None:
        """The first rule that matches the layer's full name, or None."""
        return next((r for r in self.rules if fnmatch.fnmatchcase(layer, r.match)), None)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return yaml.safe_dump(to_plain(self), sort_keys=False)


def from_yaml(text: str, where: str = "recipe file") -> Recipe:
    """Inverse of ``Recipe.to_yaml``. Raises ``InputError`` for anything that is not a recipe."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where} holds no recipe; expected the YAML that fewbit writes beside a checkpoint")
    own = (Recipe, Rule, SiteRule, Alternative, Incoherence, Rotation, BlockTuning, KVFormat)
    recipe = from_plain(data, (*own, *SOLVERS, *CHOOSERS, *FORMAT_CLASSES))
    if not isinstance(recipe, Recipe):
        raise InputError(f"{where} holds a {type(recipe).__name__}, expected a Recipe")
    return recipe
