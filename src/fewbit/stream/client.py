"""A checkpoint as others see it: a fresh process loads it with transformers and sends back its logits.

The process never imports fewbit, but for fewbit's own layout, which transformers loads after ``import
fewbit``. So packing, names and configuration are judged by the client's code and not by ours. What
transformers cannot load here (GPTQ and AWQ files need packages of their own) is said, with its reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Zero
from fewbit.io.source import Source, open_source
from fewbit.stream.estimate import available
from fewbit.stream.verify import stream_logits

TOKENS = 24
SAME, CLOSE = 1e-3, 0.1  # of the largest logit; beyond the second it is another model
CLOSE_4_BITS = (
    0.4  # where inputs have 16 values, the rounding of bfloat16 in the client turns into other codes
)
# transformers 5.23 stacks packed words, steps and shapes of experts and leaves weight_zero_point out
# (integrations/compressed_tensors.py, CompressedTensorsDequantize); the file is as compressed-tensors has it
EXPERTS = (
    "it leaves out the zero points of experts; make them symmetric, or load the file with vLLM or fewbit"
)
SCRIPT = """
import sys, torch
folder, given, out, own = sys.argv[1:5]
if own == "native": import fewbit
import transformers
config = transformers.AutoConfig.from_pretrained(folder)
cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
for dtype in (torch.float32, torch.bfloat16):
    model = cls.from_pretrained(folder, dtype=dtype).eval()
    try:
        with torch.no_grad():
            torch.save(model(torch.load(given))[0].float(), out)
        break
    except RuntimeError as error:  # FP8 tiles, NVFP4 and MX are decoded to bfloat16, whatever the model is
        if "same dtype" not in str(error) or dtype == torch.bfloat16:
            raise
assert own == "native" or "fewbit" not in sys.modules
"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a fresh process made of a checkpoint. difference: of its logits from ours, over the largest; None:
    it did not load the file, and ``why``.
    """

    difference: float | None
    why: str = ""


def look(folder: Path, layout: str) -> Seen:
    """Load ``folder`` in a fresh process and compare logits on a few tokens with those of our own reader.

    Raises ``InputError`` where transformers fails for anything but a package that is not installed, and where
    its logits are another model's, or not finite.
    """
    source = open_source(folder)
    room, wanted = available("cpu"), 6 * sum(i.nbytes // i.dtype.itemsize for i in source.tensors().values())
    if wanted > room:
        return Seen(
            difference=None, why=f"it takes {wanted / 1e9:.1f} GB of memory, {room / 1e9:.1f} are free"
        )
    vocabulary = source.config().get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "ids.pt", Path(place) / "logits.pt"
        torch.save(ids, given)
        words = [sys.executable, "-c", SCRIPT, str(folder), str(given), str(out), layout]
        env = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if done.returncode:
            why = _reason(done.stderr)
            if "conversion of the weights" in why and _has_shifted_experts(source):
                return Seen(difference=None, why=EXPERTS)
            if not why.startswith(("ImportError", "ModuleNotFoundError")):
                raise InputError(
                    f"transformers cannot load the exported checkpoint ({why}); nothing was published, "
                    "please report this, or export with --no-verify"
                )
            return Seen(difference=None, why=why.partition(": ")[2])
        got = torch.load(out)
    if layout == "fp8" and not torch.cuda.is_available():  # there it decodes weights and rounds no inputs
        source.entries = {name: replace(entry, activation=None) for name, entry in source.entries.items()}
    given = [e.activation for e in getattr(source, "entries", {}).values()]
    coarse = any(a is not None and a.format.grid.bits <= 4 for a in given)
    return Seen(difference=_compare(got, stream_logits(source, ids), CLOSE_4_BITS if coarse else CLOSE))


def _has_shifted_experts(source: Source) -> bool:
    """Whether experts of a checkpoint have zero points."""
    entries = getattr(source, "entries", {}).items()
    return any(".experts." in name and entry.format.zero is not Zero.NONE for name, entry in entries)


def _compare(got: Tensor, ours: Tensor, close: float) -> float:
    """The largest difference over the largest logit."""
    difference = float((got - ours).abs().max() / ours.abs().max().clamp(min=1e-30))
    if not difference <= close:
        raise InputError(
            "transformers loads the exported checkpoint and gives other logits (they differ by "
            f"{difference:.2g} of the largest); nothing was published, please report this, or export with "
            "--no-verify"
        )
    return difference


def _reason(stderr: str) -> str:
    """The last line of a traceback."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"
