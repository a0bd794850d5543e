"""FakeLinear: a linear layer that trains as the quantized one computes.

    y = Q(x T) Q(O W T)^T O^-T + b        T, O: the maps of the rule's basis (QuEST), or the identity

``weight`` stays the Parameter that it was, in its own basis and dtype, so optimizers, ``state_dict`` and
whatever wraps a ``torch.nn.Linear`` see nothing new. Trained steps are Parameters beside it (``weight_step``,
``input_zero``, ...). Gradients are masked where the rounding happens, in the basis, and come back through the
inverse map: order matters (QuEST, https://arxiv.org/abs/2502.05003, Algorithm 1).

Shapes: x [..., in], weight [out, in], y [..., out].

Road not taken: ``torch.nn.utils.parametrize``. It renames the weight to ``parametrizations.weight.original``
in every file, and inputs have no place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format import Format, Params, QTensor, value_of
from fewbit.format.activation import Activation
from fewbit.nn import QLinear
from fewbit.nn.linear import Online
from fewbit.nn.stored import Stored
from fewbit.train.fake import FakeQuant, Straight, fake
from fewbit.transform.incoherence import Incoherence


class FakeLinear(Stored, nn.Linear):
    """The layer of ``linear``, whose weight and bias it takes over as they are (no copy).

    fmt, quant: Format of the weight and how its gradient passes; activation, input_quant: the same of the
    input; sample: calibration inputs [tokens, in], where the input's steps are static; basis: maps in which
    both are rounded. Raises ``InputError`` for an input that no gradient is defined for.
    """

    def __init__(
        self,
        linear: nn.Linear,
        fmt: Format,
        quant: FakeQuant,
        *,
        activation: Activation | None = None,
        input_quant: FakeQuant | None = None,
        sample: Tensor | None = None,
        basis: Incoherence | None = None,
    ):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.format, self.quant, self.basis = fmt, quant, basis
        self.activation = activation
        self.input_quant = Straight() if input_quant is None else input_quant
        shape = (self.out_features, self.in_features)
        fmt.check(shape, "the weight")
        if basis is not None:
            basis.check(shape, "the weight")
        self._learn("weight", quant, self._weight(), fmt)
        self.register_buffer("given_scale", None)
        self.register_buffer("given_zero", None)
        if activation is not None:
            self._take_input(activation, sample)
        self.train(linear.training)

    def _take_input(self, activation: Activation, sample: Tensor | None) -> None:
        if activation.outliers is not None or activation.centred or activation.momentum is not None:
            raise InputError(
                f"no gradient is defined for inputs that are '{activation}'; leave outliers, centred and "
                "momentum out"
            )
        if not activation.static:
            if self.input_quant.learns:
                raise InputError(
                    f"{type(self.input_quant).__name__} trains steps of inputs, and those of '{activation}' "
                    "are fitted at every call; use static ones"
                )
            return
        if sample is None or not len(sample):
            raise InputError(
                f"static steps of '{activation}' start from calibration inputs, of which there are none; "
                "give prepare some batches"
            )
        sample = sample.detach().float()
        if self.input_quant.learns:
            if activation.groups is not None:
                raise InputError("steps of columns grouped by range cannot be trained; leave groups out")
            self._learn("input", self.input_quant, sample, activation.format)
        else:
            params = activation.fit(sample, *torch.aminmax(sample, dim=0))
            self.given_scale, self.given_zero = params.scale, params.zero

    def _learn(self, side: str, quant: FakeQuant, x: Tensor, fmt: Format) -> None:
        with torch.no_grad():
            started = quant.initial(x, fmt)
        for name, value in started.items():
            self.register_parameter(f"{side}_{name}", nn.Parameter(value.clone()))

    @torch.no_grad()
    def start_from(self, q: QTensor) -> None:
        """Begin at what another method found: the weight becomes the values of ``q``, trained steps and zeros
        its own, so that the codes of the first forward are those of ``q`` where steps are trained.

        Raises ``InputError`` where ``q`` has another grid, other blocks or another kind of zero.
        """
        self.check_start(q)
        value = q.dequantize()
        self.weight.copy_(value if self.basis is None else self.basis.leave(value))
        found = {"step": q.scale, "zero": q.zero}
        for name, p in self._learned("weight").items():
            if name in found:
                p.copy_(value_of(found[name]))

    def check_start(self, q: QTensor) -> None:
        """``InputError`` where `start_from` would raise it."""
        same = lambda f: (f.grid, f.block, f.zero)  # noqa: E731
        if same(q.format) != same(self.format) or q.shape != self.weight.shape:
            raise InputError(
                f"a layer of {list(self.weight.shape)} that trains in {self.format} cannot start from "
                f"{list(q.shape)} in {q.format}; quantize with the format that is trained"
            )

    def _learned(self, side: str) -> dict[str, Tensor]:
        names = ("step", "zero", "alpha")
        found = {n: self._parameters.get(f"{side}_{n}") for n in names}
        return {n: p for n, p in found.items() if p is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        sides = [(s, n) for s in ("weight", "input") for n in self._learned(s)]
        before = {f"{s}_{n}": self._parameters[f"{s}_{n}"].detach() for s, n in sides}
        super()._apply(fn, recurse)
        for name, old in before.items():  # steps stay float32: updates of them are lost in bfloat16
            if self._parameters[name].dtype != old.dtype:
                self._parameters[name].data = old.to(self._parameters[name].device)
        return self

    def _weight(self) -> Tensor:
        """The weight in the basis in which it is rounded, [out, in] float32."""
        if self.basis is None:
            return self.weight.float()
        with torch.autocast(self.weight.device.type, enabled=False):  # or codes would depend on it
            return self.basis.enter(self.weight.float())

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """What the weight is in the product, in the weight's own basis: [out, in] float32."""
        value = self._fake_weight()
        return value if self.basis is None else self.basis.leave(value)

    def _fake_weight(self) -> Tensor:
        """What the weight rounds to, in the basis in which it does, with gradients: [out, in] float32."""
        return self.quant(self._weight(), self.format, self._learned("weight"))

    def _fake_input(self, x: Tensor) -> Tensor:
        if self.activation is None or x.numel() == 0:
            return x
        fmt, quant, rows = self.activation.format, self.input_quant, x.reshape(-1, x.shape[-1]).float()
        if self.given_scale is not None:
            out = fake(rows, fmt, Params(scale=self.given_scale, zero=self.given_zero), quant.surrogate)
        else:
            learned = self._learned("input")
            steps = next(iter(learned.values())).numel() if learned else 1
            out = quant(rows, fmt, learned, self.in_features // steps)
        return out.to(x.dtype).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        output = None
        if self.basis is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = self.basis.input_map(self.in_features).apply(x)
            output = self.basis.output_map(self.out_features)
        x = self._fake_input(x)
        w = self._fake_weight().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if output is None:
            return F.linear(x, w, bias)
        y = output.invert(F.linear(x, w))
        return y if bias is None else y + bias

    @torch.no_grad()
    def to_quantized(self) -> QLinear:
        """The layer on codes that computes what this one does; it shares the bias."""
        w, params = self._weight(), None
        q = self.format.encode(w, self.quant.params(w, self.format, self._learned("weight")))
        if self.given_scale is not None:
            params = Params(scale=self.given_scale, zero=self.given_zero)
        elif learned := self._learned("input"):
            like = w.new_ones(1, self.in_features)
            params = self.input_quant.params(like, self.activation.format, learned)
        online, output = self.maps()
        return QLinear(q, self.bias, activation=self.activation, params=params, online=online, output=output)

    def maps(self) -> tuple[Online | None, Online | None]:
        """Of the input and of the output, as the converted layer has them."""
        if self.basis is None:
            return None, None
        return self.basis.input_map(self.in_features), self.basis.output_map(self.out_features)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), str(self.format), f"by {self.quant}"]
        parts += [] if self.activation is None else [f"input {self.activation} by {self.input_quant}"]
        parts += [] if self.basis is None else [f"in a {self.basis}"]
        return ", ".join(parts)
