"""K-quants beside those that llama.cpp's own code makes of the same numbers, without importances and with.

    python benchmarks/k_quants.py --library PATH/libggml-base.so

The library comes with `pip install llama-cpp-python` (llama_cpp/lib). Numbers: 256 x 1024, Gauss and Laplace;
importances of columns: exp of N(0,1), given to both. Mean squared errors, those with importances weighted by
them. `mse` is the range that only shrinks the interval (range mse), `refitted` the one that refits to
the codes (least-squares).
"""

import argparse
import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fewbit.format import FORMATS, MSE, LeastSquares, MinMax

NAMES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1")
FLOATS = ctypes.POINTER(ctypes.c_float)


def llama_cpp(library: ctypes.CDLL, x: torch.Tensor, name: str, importance: torch.Tensor | None):
    """x [rows, columns] as llama.cpp rounds it."""
    kind = GGMLQuantizationType[name.upper()]
    block, size = GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(x.numpy())
    out = np.zeros((len(values), values.shape[1] // block * size), np.uint8)
    weights = None if importance is None else importance.numpy().ctypes.data_as(FLOATS)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    data, to = values.ctypes.data_as(FLOATS), ctypes.c_void_p(out.ctypes.data)
    sizes = (ctypes.c_int64(n) for n in (0, *values.shape))
    library.ggml_quantize_chunk(ctypes.c_int(kind), data, to, *sizes, weights)
    return torch.from_numpy(dequantize(out, kind))


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    library = ctypes.CDLL(parser.parse_args().library)
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    x, h = torch.randn(256, 1024, generator=g), torch.randn(1024, generator=g).exp()
    both = torch.rand(2, 256, 1024, generator=g).clamp(min=1e-9).log()
    numbers = {"Gauss": x, "Laplace": both[0] - both[1]}
    lines = [
        "Printed by `python benchmarks/k_quants.py --library libggml-base.so`. Errors over llama.cpp's own.",
        "",
        "| type | numbers | llama.cpp | min-max | mse | refitted | weighted: llama.cpp | mse | refitted |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in NAMES:
        for what, values in numbers.items():

            def error(y, by=1.0, values=values):
                return float(((y - values).square() * by).mean())

            def ours(range, by=None, values=values, name=name):
                y = replace(FORMATS[name], range=range).quantize(values, by).dequantize()
                return error(y, 1.0 if by is None else by)

            plain = error(llama_cpp(library, values, name, None))
            cells = [f"{plain:.6g}"]
            cells += [f"{ours(r) / plain:.3f}" for r in (MinMax(), MSE(), LeastSquares())]
            theirs = error(llama_cpp(library, values, name, h), h)
            cells += [f"{theirs:.6g}"] + [f"{ours(r, h) / theirs:.3f}" for r in (MSE(), LeastSquares())]
            lines.append(f"| {name} | {what} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "k_quants.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
