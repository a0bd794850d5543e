"""FP8-LM's levels as data: which tensor of the training is kept in which Format; optimizers by name.

    level   gradient   m      v            master         compute copy   bytes of gradient, m, v, master
    -       32 bit     32     32           32             16             16
    O1      E4M3       32     32           FP16, scaled   as the model   11
    O2      E4M3       E4M3   FP16, scaled FP16, scaled   as the model    6
    O3      E4M3       E4M3   FP16, scaled FP16, scaled   E4M3            6

The products of the linears are set apart (``fewbit.train.lower``), and so is what travels between processes
(``fewbit.train.distributed``): a level says only what is kept.

"As the model": the parameter, in the dtype that the model has, 2 bytes more in bfloat16; at O3 its values are
points of E4M3 under one power of two. With ``narrow`` weights are stored as in the paper: at O1 and O2 the
scaled FP16 master itself computes and nothing comes on top, at O3 one byte of E4M3.

FP8-LM: Training FP8 Large Language Models, Peng et al. 2023, https://arxiv.org/abs/2310.18313, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import FP32, Format
from fewbit.train.gradients import LEAST, covered, fp8_gradients
from fewbit.train.narrow import narrow as make_narrow
from fewbit.train.optimizer import LowAdamW
from fewbit.train.products import Products
from fewbit.train.states import STATES, States, check, one_step


@dataclass(frozen=True, kw_only=True)
class Level:
    """The Formats of the gradient, the optimizer's states and the weight that computes; None: as it is."""

    gradient: Format | None = None
    states: States = field(default_factory=States)
    weight: Format | None = None

    def __post_init__(self):
        check(self.gradient, "a gradient")
        check(self.weight, "a weight")
        if self.weight is not None and self.states.master is None:
            raise InputError(
                "weights in a Format of their own need a master: give states one, as scaled FP16"
            )

    def optimizer(
        self, model: nn.Module, *, narrow: Products | None = None, min_size: int = LEAST, **rest
    ) -> LowAdamW:
        """An optimizer of all parameters of ``model``, whose linears' gradients are from now on kept as said.

        What `covered` names is kept as the level says, everything else (norms, biases, embeddings, small
        tensors) in float32. narrow: products of linears whose weights are from now on stored as the level
        says (`fewbit.train.narrow`; ``Products()`` multiplies wide): in the weight's Format, or where the
        level has none in the master's, which then *is* the parameter. rest: other arguments of LowAdamW.
        Raises ``InputError`` where nothing is covered.
        """
        inside = covered(model, min_size=min_size)
        stored = self.weight or self.states.master
        states = self.states
        if narrow is not None and stored is None:
            raise InputError("this level keeps no weight in a Format; leave out narrow")
        if narrow is not None and self.weight is None:
            states = replace(states, master=None)
        if self.gradient is not None:
            fp8_gradients(model, self.gradient, min_size=min_size)
        ids = {id(p) for p in inside.values()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        groups = [
            {
                "params": list(inside.values()),
                **vars(states),
                "weight": self.weight,
                "min_size": min_size,
            },
            {"params": others, "master": FP32},
        ]
        optimizer = LowAdamW([g for g in groups if g["params"]], **rest)  # takes masters from wide weights
        if narrow is not None:
            make_narrow(model, stored, products=narrow, params=inside.values())
        return optimizer


_FP8_LM = STATES["fp8-lm"]
O1 = Level(gradient=one_step("e4m3fn"), states=States(master=_FP8_LM.master))
O2 = Level(gradient=one_step("e4m3fn"), states=_FP8_LM)
O3 = Level(gradient=one_step("e4m3fn"), states=_FP8_LM, weight=one_step("e4m3fn"))
LEVELS: Mapping[str, Level] = MappingProxyType({"O1": O1, "O2": O2, "O3": O3})


def stable_adamw(
    params: Iterable,
    lr: float | Tensor = 2e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    *,
    clip: float = 1.0,
    **rest,
) -> LowAdamW:
    """StableAdamW: float32 states, each tensor's update divided by its rms where that is above ``clip``."""
    return LowAdamW(params, lr, betas, clip=clip, **rest)


def low_adamw(name: str, params: Iterable, **rest) -> LowAdamW:
    """LowAdamW with the named `STATES`; ``rest`` are its other arguments, a part's Format among them."""
    if name not in STATES:
        raise InputError(f"there are no optimizer states named {name!r:.60}; known are {', '.join(STATES)}")
    return LowAdamW(params, **{**vars(STATES[name]), **rest})


OPTIMIZERS: Mapping[str, Callable[..., LowAdamW]] = MappingProxyType(
    {name: partial(low_adamw, name) for name in STATES} | {"stable-adamw": stable_adamw}
)
