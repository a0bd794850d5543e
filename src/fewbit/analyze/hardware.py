"""Which GPU computes in which number type, from P100 to B200.

Three things are easily confused. A type may be an operand of the matrix units (*tensor*); it may have
arithmetic on the ordinary cores alone (*cores*); or a kernel may unpack it to a wider type before it computes
(*stored*): then it saves memory and bandwidth, and no arithmetic. Every type can be stored everywhere: a byte
is a byte.

Sources, by generation:

- Pascal (6.0): NVIDIA, "Mixed-Precision Programming with CUDA 8" (FP16 pairs on P100; dp4a from 6.1 on, so P4
  and P40 and not P100). https://developer.nvidia.com/blog/mixed-precision-programming-cuda-8/
- Volta (7.0): NVIDIA, "Programming Tensor Cores in CUDA 9" (operands are FP16); support matrix of TensorRT
  8.4 (V100: INT8 yes, INT8 tensor cores no). https://developer.nvidia.com/blog/programming-tensor-cores-cuda-9/
  https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-843/support-matrix/index.html
- Turing (7.5) to Blackwell (10.0, 12.0): CUDA Programming Guide, "Input data types supported by tensor core
  acceleration per compute capability".
  https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
- Blackwell's block scales: CUTLASS, "Blackwell SM100 GEMMs" (tcgen05.mma with kind i8, f8f6f4, mxf8f6f4, mxf4
  and mxf4nvf4) and its kernels for SM120 (mma.sync with the last three kinds). A library may lag behind: see
  https://nvidia.github.io/TransformerEngine/support_matrix.html for what one of them uses where.
- INT4 on Hopper and Blackwell: mma with .s4 is accepted and compiles to a sequence of other instructions.
  https://forums.developer.nvidia.com/t/does-blackwell-support-int4-native/326513
- CDNA 3 and 4: AMD, "Data types and precision support" of ROCm; AMD, "Matrix Core Programming on CDNA 3 and
  CDNA 4" (FP8, FP6, FP4 with E8M0 scales on CDNA 4); LLVM, where gfx942 has the feature xf32-insts (TF32) and
  gfx950 has not. https://rocm.docs.amd.com/en/latest/reference/precision-support.html

Not looked up in a document but taken as known: FP32 and FP16 among the matrix instructions of CDNA, and that
libraries emulate TF32 on CDNA 4.

Road not taken: peak rates. They depend on the board, the clock and 2:4 sparsity, which datasheets mix freely;
a table of them goes wrong sooner than it helps.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from fewbit.errors import InputError


class Support(StrEnum):
    """What a GPU does with a number type, best first."""

    TENSOR = "tensor"  # operands of the matrix units (tensor cores, matrix cores)
    CORES = "cores"  # arithmetic on the ordinary cores alone
    STORED = "stored"  # unpacked to a wider type before arithmetic
    NONE = "-"  # not a storage type, and no arithmetic either


@dataclass(frozen=True, kw_only=True)
class NumberType:
    """A row: a type as the hardware knows it, and the named grids or formats whose codes it computes with."""

    name: str
    holds: tuple[str, ...]
    stored: bool = True  # False: exists inside the matrix units only


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A column: the types that the matrix units take, and those that only the ordinary cores compute in."""

    gpu: str
    name: str
    year: int
    capability: str  # CUDA compute capability, or AMD's gfx number
    tensor: tuple[str, ...]
    cores: tuple[str, ...]

    def __post_init__(self):
        known = {each.name for each in NUMBER_TYPES}
        unknown = {*self.tensor, *self.cores} - known
        if unknown or set(self.tensor) & set(self.cores):
            raise InputError(f"{self.gpu} names {sorted(unknown)} or a type twice; known are {sorted(known)}")


@dataclass(frozen=True, kw_only=True)
class Footnote:
    """What a cell alone would say wrongly. ``gpus`` empty: the whole row."""

    type: str
    gpus: tuple[str, ...] = ()
    text: str


NUMBER_TYPES: tuple[NumberType, ...] = (
    NumberType(name="FP32", holds=("fp32",)),
    NumberType(name="TF32", holds=("tf32",), stored=False),
    NumberType(name="FP16", holds=("fp16",)),
    NumberType(name="BF16", holds=("bf16",)),
    NumberType(name="INT8", holds=("int8", "uint8", "q1.6", "q0.7", "q3.4", "mxint8")),
    NumberType(name="INT4", holds=("int4", "uint4")),
    NumberType(name="FP8", holds=("e4m3fn", "e5m2")),
    NumberType(name="FP8 fnuz", holds=("e4m3fnuz", "e5m2fnuz")),
    NumberType(name="FP6", holds=("e3m2", "e2m3")),
    NumberType(name="FP4", holds=("e2m1",)),
    NumberType(name="MXFP8/6/4", holds=("mxfp8-e4m3", "mxfp8-e5m2", "mxfp6-e3m2", "mxfp6-e2m3", "mxfp4")),
    NumberType(name="NVFP4", holds=("nvfp4",)),
    NumberType(name="codebooks", holds=("nf4", "fp4-bnb", "af4", "nf3", "nf2")),
    NumberType(name="1-3 bit", holds=("int1", "int2", "int3", "uint1", "uint2", "uint3")),
)

_TURING = ("FP16", "INT8", "INT4")
_AMPERE = ("TF32", "FP16", "BF16", "INT8", "INT4")
_HOPPER = ("TF32", "FP16", "BF16", "INT8", "FP8")
_BLACKWELL = (*_HOPPER, "FP6", "FP4", "MXFP8/6/4", "NVFP4")
_MI300 = ("FP32", "TF32", "FP16", "BF16", "INT8", "FP8", "FP8 fnuz")
_MI350 = ("FP32", "FP16", "BF16", "INT8", "FP8", "FP6", "FP4", "MXFP8/6/4")
_FP32 = ("FP32",)

GENERATIONS: tuple[Generation, ...] = (
    Generation(gpu="P100", name="Pascal", year=2016, capability="6.0", tensor=(), cores=("FP32", "FP16")),
    Generation(
        gpu="V100", name="Volta", year=2017, capability="7.0", tensor=("FP16",), cores=("FP32", "INT8")
    ),
    Generation(gpu="T4", name="Turing", year=2018, capability="7.5", tensor=_TURING, cores=_FP32),
    Generation(gpu="A100", name="Ampere", year=2020, capability="8.0", tensor=_AMPERE, cores=_FP32),
    Generation(
        gpu="L40/L40S", name="Ada", year=2022, capability="8.9", tensor=(*_AMPERE, "FP8"), cores=_FP32
    ),
    Generation(gpu="H100/H200", name="Hopper", year=2022, capability="9.0", tensor=_HOPPER, cores=_FP32),
    Generation(gpu="B200", name="Blackwell", year=2024, capability="10.0", tensor=_BLACKWELL, cores=_FP32),
    Generation(gpu="RTX 50", name="Blackwell", year=2025, capability="12.0", tensor=_BLACKWELL, cores=_FP32),
    Generation(gpu="MI300", name="CDNA 3", year=2023, capability="gfx942", tensor=_MI300, cores=()),
    Generation(gpu="MI350", name="CDNA 4", year=2025, capability="gfx950", tensor=_MI350, cores=()),
)

FOOTNOTES: tuple[Footnote, ...] = (
    Footnote(
        type="TF32",
        text="a compute type: float32 in memory, of which the matrix units read 19 bits; nothing is saved",
    ),
    Footnote(
        type="TF32",
        gpus=("MI350",),
        text="CDNA 3 has matrix instructions for it, CDNA 4 none; libraries emulate it with BF16",
    ),
    Footnote(
        type="FP16", gpus=("P100",), text="pairs of FP16 at twice the rate of FP32, without tensor cores"
    ),
    Footnote(
        type="INT8",
        gpus=("P100",),
        text="dp4a, four INT8 products at once, came with compute capability 6.1: P4 and P40 have it",
    ),
    Footnote(type="INT8", gpus=("V100",), text="dp4a; the tensor cores of V100 take FP16 alone"),
    Footnote(
        type="INT4",
        gpus=("H100/H200", "B200", "RTX 50"),
        text="tensor cores for INT4 existed from Turing to Ada; here INT4 instructions are emulated, and "
        "kernels for 4-bit weights unpack to 16 or 8 bits",
    ),
    Footnote(
        type="FP8",
        gpus=("MI300",),
        text="as e4m3fnuz and e5m2fnuz, in which a byte means half of what it means in e4m3fn and e5m2: "
        "checkpoints are converted when they are loaded, the scale doubled",
    ),
    Footnote(
        type="MXFP8/6/4",
        text="with the scales of blocks of 32 applied inside the matrix units; MXINT8 is INT8 with scales "
        "applied by the kernel",
    ),
    Footnote(
        type="NVFP4",
        gpus=("MI350",),
        text="its FP4 is the same, but the hardware knows only blocks of 32 with power-of-two scales",
    ),
    Footnote(type="codebooks", text="NF4, FP4 of bitsandbytes, learned tables: looked up, then 16 bit"),
)


def support(number_type: NumberType, generation: Generation) -> Support:
    """What the GPUs of a generation do with a type."""
    if number_type.name in generation.tensor:
        return Support.TENSOR
    if number_type.name in generation.cores:
        return Support.CORES
    return Support.STORED if number_type.stored else Support.NONE


def type_of(name: str) -> NumberType:
    """The row for a named grid or block format; a row of its own where no GPU computes with its codes.

    What a name ends in ("-even", "-dq", "-narrow") changes how codes are chosen, not how they multiply.
    """
    stem = re.sub(r"-(even|ceil|rceil|nearest|dq|narrow)$", "", name)
    return next((each for each in NUMBER_TYPES if stem in each.holds), NumberType(name=name, holds=(name,)))


def footnotes(number_type: NumberType, generation: Generation | None = None) -> tuple[int, ...]:
    """Numbers, from 1, of the footnotes to a cell; without a generation those to the whole row."""
    return tuple(
        number
        for number, note in enumerate(FOOTNOTES, 1)
        if note.type == number_type.name and (generation.gpu in note.gpus if generation else not note.gpus)
    )
