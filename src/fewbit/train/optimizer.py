"""LowAdamW: AdamW whose states and master weight are kept in any Format; StableAdamW; the named ones.

    read:   m, v, w in float32 from what is kept, g from its QTensor
    update: float32 (``fewbit.train.adamw``), from the fresh m and v, never from the stored ones
    keep:   m, v, w each in its Format, with steps fitted to this step's values; the parameter <- w

Two passes over a tensor, because the new step depends on the new values; one tensor at a time is wide. The
parameter that the model computes with is the rounding of the fresh w to its own dtype (or to ``weight``), not
of the stored master.

FP8-LM (FP8 Adam at 6 bytes a parameter): https://arxiv.org/abs/2310.18313, section 2.2; 8-bit Optimizers:
https://arxiv.org/abs/2110.02861; StableAdamW: https://arxiv.org/abs/2304.13013.

Sharded parameters (DTensor: FSDP2, tensor parallel): each rank keeps its shard, with steps of its own, and
the rms of the clip is that of the whole tensor. One Format per part covers every published optimizer, so
there is one class; ``fewbit.train.levels`` names them.

Road not taken: states as tensor subclasses (torchao). They pass through torch's own AdamW and compile to one
kernel, and need a class for every format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import BF16, FP16, FP32, Format, QTensor
from fewbit.train.adamw import Rule, adamw, adamw_many
from fewbit.train.gradients import clear, gradient, wide
from fewbit.train.narrow import is_narrow, put, value
from fewbit.train.shards import like, local, mean
from fewbit.train.states import Held, check, quantize

PARTS = ("first", "second", "master")
_FORMATS = (*PARTS, "weight")
_TORCH_ONLY = (
    "amsgrad",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)
_NARROW = {torch.bfloat16: BF16, torch.float16: FP16}


class LowAdamW(torch.optim.Optimizer):
    """AdamW with its states in Formats; with all of them None it is AdamW in float32.

    first, second: Formats of m and v; master: Format of the master weight, None where the parameter is the
    master; weight: Format to whose points the parameter itself is rounded. Tensors of fewer than ``min_size``
    elements keep float32. clip: d of StableAdamW (infinity: measure the rms and clip nothing). stochastic:
    round the master, and parameters in 16 bits without one, at random with the right mean, from ``seed``. All
    of them may differ between parameter groups. lr may be a tensor.

    Gradients are read through ``fewbit.train.gradients``, so they may be quantized. ``rms`` holds that of
    each parameter at the last step. Raises ``InputError`` for numbers or Formats that mean nothing.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master: Format | None = None,
        first: Format | None = None,
        second: Format | None = None,
        weight: Format | None = None,
        clip: float | None = None,
        stochastic: bool = False,
        seed: int = 0,
        min_size: int = 4096,
    ):
        self.rms: dict[Tensor, Tensor] = {}
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)
        self.store()

    def add_param_group(self, param_group: dict) -> None:
        """A further group; its own settings come before the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in _FORMATS:
            check(group[name], f"'{name}' of LowAdamW")
        (b1, b2), lr = group["betas"], group["lr"]
        if not (0 <= b1 < 1 and 0 <= b2 < 1 and group["eps"] >= 0 and group["weight_decay"] >= 0 and lr >= 0):
            raise InputError(
                f"LowAdamW needs betas in [0, 1) and lr, eps and weight decay of at least 0, got betas {b1} "
                f"and {b2}, lr {lr}, eps {group['eps']}, weight decay {group['weight_decay']}"
            )
        if group["clip"] is not None and not group["clip"] > 0:
            raise InputError(
                f"clip {group['clip']} would stop every update; 1.0 is usual, None clips nothing"
            )
        if group["weight"] is not None and group["master"] is None:
            raise InputError(
                "weights in a Format of their own need a master: give master, such as scaled FP16"
            )

    # -- one step

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> object:
        """Update every parameter that has a gradient; returns what ``closure`` does.

        A gradient with NaN or Inf damages states for good, as in any Adam: ``fewbit.train.Guard`` skips such
        steps before they begin.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0  # of the parameter, for the seed
        for group in self.param_groups:
            rule = Rule(**{k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "clip")})
            together = []
            for p in group["params"]:
                number += 1
                if (g := gradient(p)) is None:
                    continue
                state = self._state(p, group)
                state["step"] += 1
                if _float32(p, state, g):
                    together.append((p, wide(g), state))
                else:
                    self._update(p, wide(g), state, group, rule, number)
            self._update_float32(together, rule)
        return loss

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict, rule: Rule, number: int) -> None:
        t, master = state["step"].item(), state.get("master")
        m, v = state["first"].read(), state["second"].read()
        w = value(p) if master is None else master.read()
        rms = adamw(g, m, v, w, t, rule, partial(mean, p))
        if rms is not None:
            self.rms[p] = rms
        state["first"].write(m)
        state["second"].write(v)
        generator = None
        if group["stochastic"]:
            seed = (group["seed"] * 65537 + number) << 32 | int(t)
            generator = torch.Generator(w.device).manual_seed(seed % 2**63)
        if master is not None:
            master.write(w, generator)
        self._place(p, w, group, generator if master is None else None)

    def _place(self, p: Tensor, w: Tensor, group: dict, generator: torch.Generator | None = None) -> None:
        """The parameter from float32 ``w``: in its Format, or in its dtype."""
        own = local(p)
        if is_narrow(p):
            pass  # it has one Format, see `put`
        elif group["weight"] is not None and own.numel() >= max(1, group["min_size"]):
            w = quantize(w, group["weight"]).dequantize()
        elif generator is not None and own.dtype in _NARROW:
            w = quantize(w, _NARROW[own.dtype], generator=generator).dequantize()
        put(p, w, generator)

    def _update_float32(self, together: list[tuple[Tensor, Tensor, dict]], rule: Rule) -> None:
        if not together:
            return
        params, gs, states = zip(*together, strict=True)
        ms, vs = ([s[part].read() for s in states] for part in ("first", "second"))
        rms = adamw_many(gs, ms, vs, params, [s["step"].item() for s in states], rule)
        if rms is not None:
            self.rms.update(zip(params, rms, strict=True))

    def _state(self, p: Tensor, group: dict) -> dict[str, Tensor | Held]:
        state = self.state[p]
        if not state:
            own = local(p).detach()
            low = own.numel() >= max(1, group["min_size"])
            zeros = torch.zeros_like(own, dtype=torch.float32)
            state["step"] = torch.zeros(())
            state["first"] = Held(zeros, group["first"] if low else None)
            state["second"] = Held(zeros, group["second"] if low else None, positive=True)
            narrower = low and group["master"] != FP32
            if group["master"] is not None and (narrower or own.dtype != torch.float32):
                state["master"] = Held(value(p), group["master"] if low else None)
        return state

    @torch.no_grad()
    def store(self) -> None:
        """Make master weights of parameters that have a Format of their own, and round these, once."""
        for group in self.param_groups:
            for p in group["params"] if group["weight"] is not None else ():
                if not self.state[p]:
                    state = self._state(p, group)
                    self._place(p, state["master"].read() if "master" in state else value(p), group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, quantized ones as well."""
        quantized = [p for g in self.param_groups for p in g["params"] if isinstance(gradient(p), QTensor)]
        clear(quantized)
        super().zero_grad(set_to_none)

    # -- files

    def state_dict(self) -> dict:
        """Tensors, numbers and text alone; `load_state_dict` gives the same bits back."""
        saved = super().state_dict()
        saved["state"] = {
            i: {k: v.to_dict() if isinstance(v, Held) else v for k, v in state.items()}
            for i, state in saved["state"].items()
        }
        groups = saved["param_groups"]
        saved["param_groups"] = [{k: v for k, v in g.items() if k not in _FORMATS} for g in groups]
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping) -> None:
        """Take the states of a LowAdamW, bit for bit where a Format is the same and by value where it is not,
        or of a torch.optim.AdamW. The Formats stay those of this optimizer; the numbers become those saved.

        A saved master that has no place here goes into the parameter. Raises ``InputError`` for other
        parameters or shapes and for AMSGrad.
        """
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            raise InputError(
                f"saved states of {[len(g['params']) for g in saved]} parameters (by group) do not belong to "
                f"{[len(g['params']) for g in own]}; build the optimizer over the same parameters"
            )
        if any(g.get("amsgrad") for g in saved):
            raise InputError(
                "states of AMSGrad have a third part that LowAdamW does not keep; save without it"
            )
        groups = [
            {**mine, **{k: v for k, v in g.items() if k not in (*_TORCH_ONLY, *_FORMATS)}}
            for mine, g in zip(own, saved, strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for mine, g in zip(self.param_groups, saved, strict=True):
            for p, i in zip(mine["params"], g["params"], strict=True):
                if found := state_dict["state"].get(i):
                    self._load(p, mine, found)

    def _load(self, p: Tensor, group: dict, saved: Mapping) -> None:
        state = self._state(p, group)
        state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu").clone()
        for part, torchs in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            kept = saved[part] if part in saved else local(saved[torchs])
            state[part].load(kept)
        if "master" not in saved:
            return
        if "master" in state:
            state["master"].load(saved["master"])
        else:
            held = Held(value(p), None)
            held.load(saved["master"])
            put(p, held.read())

    @torch.no_grad()
    def to_adamw(self) -> dict:
        """The states as torch.optim.AdamW over the same parameters loads them: float32, DTensors where the
        parameters are. Where there is a master, `restore` puts it into the parameters.
        """
        keep = ("params", "lr", "betas", "eps", "weight_decay")
        plain = torch.optim.AdamW([{k: g[k] for k in keep} for g in self.param_groups])
        params = [p for g in self.param_groups for p in g["params"]]
        for p in params:
            if state := self.state.get(p):
                m, v = (like(p, state[part].read()) for part in ("first", "second"))
                plain.state[p] = {"step": state["step"].clone(), "exp_avg": m, "exp_avg_sq": v}
        return plain.state_dict()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the master weights into the parameters, in their dtype: to go on without this optimizer."""
        for p, state in self.state.items():
            if "master" in state:
                put(p, state["master"].read())


def _float32(p: Tensor, state: dict, g: Tensor | QTensor) -> bool:
    plain = (
        p.dtype == torch.float32 and local(p) is p and not isinstance(g, QTensor) and "master" not in state
    )
    return plain and state["first"].format is None and state["second"].format is None
