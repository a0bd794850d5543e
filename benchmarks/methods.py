"""Every method on one model, one calibration and one evaluation: the table of docs/results.md.

    python benchmarks/methods.py [--data FOLDER] [--device cuda] [--only TEXT ...] [--model FOLDER_OR_GGUF]
                                 [--workers N]

SmolLM2-135M, written as float32 first so that every device computes in float32. Calibration: 32 windows of
512 tokens of WikiText-2 validation, seed 0. Evaluation of the checkpoint as it was saved: WikiText-2 raw
test, solid join, 12 windows of 512, against the float model. Table "planted" is the same function with
outliers: in every norm of a block six channels get 20 to 100 times their gain, and the columns of the linears
that read them are divided by the same. Peak memory is what torch had allocated on a GPU, or the largest size
of the process on a CPU.

A row is quantized in a process of its own, and its seconds are CPU seconds of all threads, imports included
(the clock on the wall is in the JSON), or seconds by the clock on a GPU.

Rows are written to benchmarks/results/methods.json as they come, and are not run again; the tables are those
of docs/results.md.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote

import torch
from int8_ladder import plant

import fewbit
from fewbit.evaluate import Protocol, windows
from fewbit.format import FORMATS
from fewbit.format.activation import Activation
from fewbit.io.source import open_source
from fewbit.io.text import read_text
from fewbit.recipe import Recipe, Rule, named
from fewbit.solve import Aimed, Ldlq

ROOT = Path(__file__).parent
MARKS = ("<!-- printed by benchmarks/methods.py -->", "<!-- end -->")
G64 = {"group_size": "64"}
SYM, ASYM = {**G64, "symmetric": "true"}, {**G64, "symmetric": "false"}


def gptq_onto(name: str) -> Recipe:
    """LDLQ onto a block format, the range that the format has."""
    return Recipe(name=f"gptq-{name}", rules=(Rule(weight=FORMATS[name], solver=Ldlq()),))


def quarot_mxfp4() -> Recipe:
    """Weights by GPTQ, aimed, and centred inputs in MXFP4, in a rotated basis."""
    base = named("quarot", {})
    mx = FORMATS["mxfp4-even"]
    return replace(
        base, name="quarot-mxfp4",
        rules=(Rule(weight=mx, input=Activation(format=mx, centred=True), solver=Aimed()),),
    )  # fmt: skip


def both(name: str) -> Recipe:
    """Weights and inputs in a block format, rounded to nearest."""
    rule = Rule(weight=FORMATS[name], input=Activation(format=FORMATS[name]))
    return Recipe(name=f"{name}-w4a4", rules=(rule,))


def w4a4() -> Recipe:
    """int4 weights per row and int4 inputs per token, rounded to nearest."""
    plain = {"solver": "rtn", "input_clip": "1", "input_zero": "none"}
    rule = named("quarot", plain).rules[0]
    return Recipe(name="w4a4", rules=(rule,))


def qtip_rows(bits: str, codes: tuple[str, ...] = ("mad",)):
    """QTIP at the state bits of a CPU and of a GPU."""
    for code in codes:
        for state_bits in ("12", "16"):
            settings = {"bits": bits, "code": code, "state_bits": state_bits}
            yield f"{bits} bit", f"QTIP, {code}, L = {state_bits}", named("qtip", settings)


def table_rows():
    """Learned tables: k-means, GPTVQ, AQLM."""
    for bits in ("2", "3", "4"):
        yield f"{bits} bit", "k-means, rows", named("kmeans", {"bits": bits})
        yield f"{bits} bit", "k-means, rows, GPTQ", named("kmeans", {"bits": bits, "solver": "gptq"})
    own = {"basis": "hadamard"}
    for d in ("1", "2", "4"):
        yield "2 bit", f"GPTVQ, d = {d}", named("gptvq", {"d": d})
    yield "2 bit", "GPTVQ, d = 2, spread", named("gptvq", own)
    yield "2 bit", "GPTVQ, d = 4, spread", named("gptvq", {"d": "4", **own})
    yield "2 bit", "GPTVQ, d = 4, a step per row", named("gptvq", {"d": "4", "scale": "true"})
    yield "3 bit", "GPTVQ, d = 2", named("gptvq", {"bits": "3"})
    yield "2 bit", "AQLM 2x8", named("aqlm", {})
    yield "2 bit", "AQLM 2x8, spread", named("aqlm", own)
    yield "2 bit", "AQLM 2x8, spread, 15 steps", named("aqlm", {"tune": "15", **own})


def rows():
    """(table, name, recipe)."""
    r = named
    for bits in ("2", "3", "4"):
        yield f"{bits} bit", "HIGGS, p = 2", r("higgs", {"bits": bits})
        yield f"{bits} bit", "HIGGS, p = 2, GPTQ", r("higgs", {"bits": bits, "solver": "gptq"})
        yield f"{bits} bit", "QuIP", r("quip", {"bits": bits})
        yield f"{bits} bit", "QuIP#", r("quip-sharp", {"bits": bits, "passes": "3"})
        yield from qtip_rows(bits, ("mad", "inst", "hyb") if bits == "2" else ("mad",))
    yield from table_rows()
    yield "2 bit", "rtn, asymmetric", r("rtn", {**ASYM, "bits": "2"})
    yield "2 bit", "GPTQ, asymmetric", r("gptq", {**ASYM, "bits": "2"})
    yield "8 bit", "int8, weights", r("int8", {})
    yield "8 bit", "fp8, weights", r("fp8", {})
    yield "8 bit", "W8A8 int8, absmax per token", r("w8a8", {})
    yield "8 bit", "LLM.int8()", r("llm-int8", {})
    yield "8 bit", "SmoothQuant O1", r("smoothquant", {"level": "O1"})
    yield "8 bit", "SmoothQuant O2", r("smoothquant", {"level": "O2"})
    yield "8 bit", "SmoothQuant O3", r("smoothquant", {"level": "O3"})
    yield "8 bit", "SmoothQuant O1 + GPTQ", r("smoothquant", {"solver": "gptq"})
    yield "8 bit", "FP8 W8A8, dynamic", r("fp8-dynamic", {})
    yield "8 bit", "FP8 W8A8, static", r("w8a8", {"grid": "e4m3fn", "input": "tensor", "static": "true"})
    yield "8 bit", "Quanto qint8, qint8 inputs", r("quanto", {"activations": "qint8"})
    yield "8 bit", "MoFQ W8A8", r("mofq", {"bits": "8"})
    yield "4 bit", "rtn, symmetric", r("rtn", SYM)
    yield "4 bit", "rtn, asymmetric", r("rtn", ASYM)
    yield "4 bit", "rtn, asymmetric, MSE range", r("rtn", {**ASYM, "range": "mse"})
    yield "4 bit", "Quanto qint4", r("quanto", {"weights": "qint4", **G64})
    yield "4 bit", "MoFQ", r("mofq", G64)
    yield "4 bit", "NF4, double quantization", r("nf4", {})
    yield "4 bit", "NF4, double quantization, MSE range", r("nf4", {"range": "mse"})
    yield "4 bit", "NVFP4", r("rtn", {"format": "nvfp4"})
    yield "4 bit", "MXFP4", r("rtn", {"format": "mxfp4"})
    yield "4 bit", "HQQ", r("hqq", {"bits": "4", **G64})
    yield "4 bit", "AWQ", r("awq", G64)
    yield "4 bit", "OmniQuant (LWC)", r("omniquant", G64)
    yield "4 bit", "GPTQ, symmetric", r("gptq", SYM)
    yield "4 bit", "GPTQ, asymmetric", r("gptq", ASYM)
    yield "4 bit", "AWQ + GPTQ", r("awq", {**G64, "solver": "gptq"})
    yield "4 bit", "AutoRound", r("autoround", G64)
    yield "3 bit", "rtn, asymmetric", r("rtn", {**ASYM, "bits": "3"})
    yield "3 bit", "HQQ", r("hqq", {"bits": "3", **G64})
    yield "3 bit", "AWQ", r("awq", {**G64, "bits": "3"})
    yield "3 bit", "OmniQuant (LWC)", r("omniquant", {**G64, "bits": "3"})
    yield "3 bit", "GPTQ, asymmetric", r("gptq", {**ASYM, "bits": "3"})
    yield "3 bit", "AWQ + GPTQ", r("awq", {**G64, "bits": "3", "solver": "gptq"})
    yield "3 bit", "AutoRound", r("autoround", {**G64, "bits": "3"})
    yield "compositions", "GPTQ onto NF4-DQ", gptq_onto("nf4-dq")
    yield "compositions", "GPTQ onto E2M1, g64", r("gptq", {"grid": "e2m1", **G64})
    yield "compositions", "GPTQ onto MXFP4 (even)", gptq_onto("mxfp4-even")
    yield "compositions", "GPTQ onto NVFP4", gptq_onto("nvfp4")
    yield "compositions", "AWQ + HQQ", r("awq", {**G64, "solver": "hqq", "zero": "float", "scale": "fp16"})
    yield "compositions", "MXFP4 W4A4, rtn", both("mxfp4")
    yield "compositions", "MXFP4 (even) W4A4, rtn", both("mxfp4-even")
    yield "compositions", "QuaRot + MXFP4 W4A4", quarot_mxfp4()
    yield "planted", "W8A8 int8, per tensor", r("w8a8", {"weight": "tensor", "input": "tensor"})
    yield "planted", "W8A8 int8, per token", r("w8a8", {})
    yield "planted", "LLM.int8()", r("llm-int8", {})
    yield "planted", "SmoothQuant O1", r("smoothquant", {"level": "O1"})
    yield "planted", "SmoothQuant O3", r("smoothquant", {"level": "O3"})
    yield "planted", "QuaRot W8A8", r("quarot", {"bits": "8", "input_bits": "8"})
    yield "planted", "W4A4 int4, rtn", w4a4()
    yield "planted", "QuaRot W4A16", r("quarot", {"input_bits": "16"})
    yield "planted", "QuaRot W4A4", r("quarot", {})
    yield "planted", "QuaRot W4A4, rtn", r("quarot", {"solver": "rtn"})
    yield "planted", "QuaRot W4A8", r("quarot", {"input_bits": "8"})
    yield "planted", "SpinQuant W4A4", r("spinquant", {})
    yield "planted", "QoQ W4A8 g64", r("qoq", G64)
    peg = {"groups": "96", "solver": "gptq"}
    yield "planted", "PEG W8A8, K = 96, GPTQ", r("peg", peg)
    yield "planted", "PEG W8A8, K = 96, GPTQ, down per token", r("peg", {**peg, "per_token": "*down_proj"})
    yield "4 bit", "QoQ W4A8 g64", r("qoq", G64)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="rows that are left out")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time; OMP_NUM_THREADS is of each")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "methods.json")
    args = parser.parse_args()
    protocol, stop = Protocol(), time.time() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp())
    source = open_source(args.model)
    tokens = windows(source.tokenizer(), read_text(args.data / "wikitext2_raw_test.txt"), protocol)
    original = fewbit.load(args.model, dtype=torch.float32)
    for name, change in (("plain", lambda m: None), ("planted", plant)):
        change(original)
        original.save_pretrained(folder / name)
        source.tokenizer().save_pretrained(folder / name)
    calibration = fewbit.Calibration(
        source=str(args.data / "wikitext2_raw_valid.txt"), samples=32, seqlen=512, seed=0
    )
    done = json.loads(args.results.read_text()) if args.results.exists() else {}
    reference = fewbit.load(folder / "plain", device=args.device, dtype=torch.float32)
    floats = fewbit.evaluate(reference, tokens, protocol)
    done["float"] = {"perplexity": floats.perplexity}
    del original, reference
    wanted = {f"{table}/{name}": recipe for table, name, recipe in rows()}
    wanted = {
        k: r
        for k, r in wanted.items()
        if k not in done and any(o in k for o in args.only) and not any(x in k for x in args.skip)
    }
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {
            pool.submit(one, folder, key, recipe, args.device, calibration, tokens, protocol, stop): key
            for key, recipe in wanted.items()
        }
        for job in as_completed(jobs):
            key = jobs[job]
            try:
                row = job.result()
            except Exception:
                print(key, traceback.format_exc(), flush=True)
                continue
            if row is None:
                print("no time for", key, flush=True)
                continue
            done[key] = row
            print(key, json.dumps(row), flush=True)
            args.results.write_text(json.dumps(done, indent=1))
    shutil.rmtree(folder)
    if args.results.parent == ROOT / "results":
        publish(done)


def publish(done: dict) -> None:
    """Put the tables between their marks in docs/results.md."""
    page = ROOT.parent / "docs" / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    page.write_text(
        f"{before}{MARKS[0]}\n\n{markdown(done)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8"
    )


def one(folder, key, recipe, device, calibration, tokens, protocol, stop: float) -> dict | None:
    """Quantize, in a process that did nothing before, and evaluate what was saved; None after ``stop``."""
    if time.time() > stop:
        return None
    model, out = folder / ("planted" if key.startswith("planted/") else "plain"), folder / quote(key, "")
    start = time.perf_counter()
    result = fewbit.quantize(model, recipe, output=out, calibration=calibration, device=device)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "bits": result.plan.bits_per_weight, "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime, "device": device_name(device),
        "peak_bytes": largest_size() if device == "cpu" else torch.cuda.max_memory_allocated(),
    }  # fmt: skip
    reference = fewbit.load(folder / "plain", device=device, dtype=torch.float32)
    loaded = fewbit.load(out, device=device, dtype=torch.float32)
    got = fewbit.evaluate(loaded, tokens, protocol, against=reference)
    shutil.rmtree(out)
    return row | {"kl": got.kl, "kl_error": got.kl_error, "top1": got.top1, "perplexity": got.perplexity}


def largest_size() -> int:
    """Bytes this process had resident at its peak. getrusage counts what it was forked from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def device_name(device: str) -> str:
    """What the figures were taken on."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device).split()[1]


def markdown(done: dict) -> str:
    """The tables."""
    lines = []
    order = [(table, name) for table, name, _ in rows() if f"{table}/{name}" in done]
    for table in dict.fromkeys(table for table, _ in order):
        lines += [f"### {table[0].upper()}{table[1:]}", ""]
        lines += ["| method | bits / weight | KL | ± | top-1 % | perplexity | s | MB | on |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|---|"]
        for name in (name for of, name in order if of == table):
            r = done[f"{table}/{name}"]
            seconds = r["cpu_seconds" if r["device"] == "CPU" else "wall_seconds"]
            lines.append(
                f"| {name} | {r['bits']:.3f} | {r['kl']:.4f} | {r['kl_error']:.4f} | {100 * r['top1']:.1f} | "
                f"{r['perplexity']:.2f} | {seconds:.0f} | {r['peak_bytes'] / 1e6:.0f} | {r['device']} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
