"""llama.cpp by itself: greedy tokens of a GGUF file. Needs llama-cpp-python, and nothing of fewbit.

    python benchmarks/llamacpp_client.py FILE.gguf [--unpack] < QUESTION > ANSWER

QUESTION: JSON, {"texts": [...]} or {"ids": [[...], ...]}, and "tokens", how many follow each. ANSWER: JSON,
{"ids": the texts' tokens by llama.cpp's tokenizer, "tokens": [[...], ...]}. Keys and values stay float32.
With --unpack llama.cpp first turns every weight into float32 with its own code, so that inputs of the linears
are not rounded to 8 bits as they are when it multiplies with quantized weights.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

F32 = 0  # of ggml_type and of llama_ftype


def main():
    path, unpack = sys.argv[1], "--unpack" in sys.argv
    question = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp talks on both
    with tempfile.TemporaryDirectory() as folder:
        if unpack:
            path = unpacked(path, Path(folder) / "f32.gguf")
        json.dump(answer(path, question), out)


def unpacked(path: str, to: Path) -> str:
    """The file with all weights in float32, made by ``llama_model_quantize``."""
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = F32, True, 1
    if llama_cpp.llama_model_quantize(path.encode(), str(to).encode(), ctypes.byref(how)):
        raise SystemExit(f"llama.cpp cannot unpack {path}")
    return str(to)


def answer(path: str, question: dict) -> dict:
    """Tokens by tokens: prompts as llama.cpp reads them and what it goes on with."""
    import llama_cpp

    model = llama_cpp.Llama(
        path, n_ctx=128, n_threads=1, verbose=False, type_k=F32, type_v=F32, flash_attn=False
    )
    prompts = question.get("ids") or [
        model.tokenize(text.encode(), add_bos=False, special=False) for text in question["texts"]
    ]
    tokens = []
    for prompt in prompts:
        model.reset()
        steps = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        with contextlib.closing(steps):
            tokens.append([next(steps) for _ in range(question["tokens"])])
    return {"ids": prompts, "tokens": tokens}


if __name__ == "__main__":
    main()
