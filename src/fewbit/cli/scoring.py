"""What sensitivity and search share: a float model, a text that says what matters, scores that are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fewbit.cli.progress import Windows
    from fewbit.search import Choice, Row

SAMPLES, KL_WINDOWS, KL_TOKENS = 32, 4, 256
RANDOM = "random"
HEADER, PARTS = 120, 3  # bytes that name a tensor in a file, and tensors of a quantized weight, about


class ScoreName(StrEnum):
    """As `fewbit.search.Score`."""

    WEIGHT = "weight"
    OUTPUT = "output"
    FISHER = "fisher"
    NOISE = "noise"
    KL = "kl"


Data = Annotated[
    str,
    typer.Option(
        "--data",
        "--calibration",
        metavar="FILE|NAME",
        help="Text that says what matters: as --calibration of quantize, or random (random tokens: no data "
        "at all).",
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        metavar="N", help="Windows of it; solvers see three quarters, and errors are judged on the last."
    ),
]
KlWindows = Annotated[
    int, typer.Option(metavar="N", help="Windows that kl and noise run, a forward for each layer and format.")
]
KlTokens = Annotated[int, typer.Option(metavar="L", help="Tokens of each of those.")]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A float model and the tokens [w, l]; ``kinds``: class of each layer in the blocks by its name."""

    source: Any
    model: nn.Module
    tokens: Tensor
    kl_tokens: Tensor
    seed: int

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layers in the blocks."""
        from fewbit.search import block_linears

        return block_linears(self.model)

    @property
    def kinds(self) -> dict[str, str]:
        """Class of each of them."""
        return {name: type(module).__name__ for name, module in self.modules.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each of them."""
        from fewbit.nn.blocks import weight_of

        return {name: tuple(weight_of(module).shape) for name, module in self.modules.items()}

    def rest_bytes(self) -> int:
        """Bytes on disk of what is no layer in the blocks: embeddings, norms, head, and headers of files."""
        import math

        from fewbit.io.skeleton import build_skeleton, parameter_map

        mapping, _ = parameter_map(self.source, build_skeleton(self.source))
        info, layers = self.source.tensors(), {mapping.get(f"{n}.weight") for n in self.shapes}
        rest = {stored for stored in mapping.values() if stored in info and stored not in layers}
        elements = sum(math.prod(info[name].shape) for name in rest)
        return elements * self.source.dtype.itemsize + HEADER * (len(rest) + PARTS * len(self.shapes) + 1)

    def identity(self) -> dict[str, object]:
        """Plain data, equal for equal scores."""
        import torch

        import fewbit
        from fewbit.stream.data import token_hash

        return {
            "model": self.source.fingerprint(),
            "tokens": [token_hash(self.tokens), token_hash(self.kl_tokens)],
            "seed": self.seed,
            "device": next(self.model.parameters()).device.type,
            "versions": [fewbit.__version__, torch.__version__],
        }

    def measure(
        self, own: Mapping[str, Sequence[Choice]], scores: Collection[ScoreName], folder: Path | None
    ) -> dict[str, tuple[Row, ...]]:
        """Rows of every layer; those that ``folder`` holds are taken from there, the others go there."""
        from fewbit.cli.show import some
        from fewbit.search import Kept, Score, Texts, measure

        kept = Kept(folder, self.identity() if folder else None)
        asked = [Score(s.value) for s in scores]
        wanted = {s.value for s in asked}
        known = sum(wanted <= kept.get(n, c).keys() for n, cs in own.items() for c in cs)
        total = sum(len(cs) for cs in own.values())
        if folder is not None:
            options.note(f"{known} of {total} scores of a layer under a format are in {folder}")
        if known < total:
            options.note(f"{len(own)} layers under {some([c.name for c in next(iter(own.values()))], 12)}")
        texts = Texts.split(self.tokens, self.kl_tokens)
        return measure(self.model, own, texts, asked, kept=kept, seed=self.seed, phase=_phase)


def _phase(text: str, counted: str) -> Windows:
    from fewbit.cli.progress import Windows

    options.note(text)
    return Windows(counted)


def open_subject(
    model: str,
    data: str,
    samples: int,
    seqlen: int,
    kl_windows: int,
    kl_tokens: int,
    seed: int,
    device: str | None,
) -> Subject:
    """The model in float32 and its tokens. Raises ``InputError`` for whatever cannot be read or cut so."""
    import torch

    from fewbit.cli.options import imported
    from fewbit.errors import InputError
    from fewbit.io.load import load
    from fewbit.io.source import open_source

    for name, value in (("--kl-windows", kl_windows), ("--kl-tokens", kl_tokens)):
        if value < 1:
            raise InputError(f"{name} {value} is no number of windows or tokens; give 1 or more")
    source = open_source(model)
    tokens = _tokens(source, data, samples, seqlen, seed)
    where = options.device_name(device)
    options.note(f"loading {model}")
    subject = load(model, where, torch.float32)
    imported()
    judging = tokens[-max(1, len(tokens) // 4) :]
    return Subject(
        source=source, model=subject, tokens=tokens, kl_tokens=judging[:kl_windows, :kl_tokens], seed=seed
    )


def _tokens(source: Any, data: str, samples: int, seqlen: int, seed: int) -> Tensor:
    """Token windows [samples, seqlen]."""
    from fewbit.errors import InputError
    from fewbit.stream.data import Calibration, sample_tokens

    if samples < 2:
        raise InputError(
            f"--samples {samples} cannot be split into what solvers see and what judges them; give 2 or more"
        )
    if data != RANDOM:
        text = Calibration(source=data, samples=samples, seqlen=seqlen, seed=seed)
        return sample_tokens(text, source.tokenizer())
    from fewbit.search import random_tokens

    Calibration(samples=samples, seqlen=seqlen, seed=seed)  # refuses what is impossible
    return random_tokens(source.config().get_text_config().vocab_size, samples, seqlen, seed)
