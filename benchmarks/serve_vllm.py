"""What vLLM makes of our checkpoints: its tokens and log-probabilities beside ours, road by road.

    python benchmarks/serve_vllm.py --vllm PYTHON [--device cuda] [--jobs 6] [--only TEXT ...] [--keep FOLDER]

PYTHON is the interpreter of an environment that has vLLM and what fewbit needs; fewbit itself is this tree's,
its entry point included. A road (``serve_roads.py``) is a recipe, and a layout it is exported to where one is
named. The model is quantized on the text that ships with Python, 16 windows; both sides run in one dtype.
Ours is transformers on what ``fewbit.load`` gives. Two comparisons:

- greedy: both continue the same prompts for 24 tokens; those that agree are counted up to the first that
  differs. There our two likeliest tokens are a gap of nats apart, which says whether rounding alone explains
  it. Eight prompts are those of ``serve_prompts.py``, at which the float model is decided; three are not
  chosen.
- teacher-forced: both read our continuation and say how likely each of its tokens is; mean and largest
  difference of the log-probabilities, nats. Beside it stands what rounding is worth: the same difference
  between our model reading at once and token by token (other orders of sums, nothing else), and between it
  and itself in another dtype (float32; of float32: float16).

A road runs in processes of its own, --jobs of them at a time, and none stops another. On a CPU a road that
vLLM refuses is loaded by transformers instead, in a process without fewbit. Rows are written to
benchmarks/results/serve_vllm.json (of CUDA serve_vllm_cuda.json) as they come, and are not run again.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from serve_prompts import TOKENS
from serve_roads import PLAIN, ROADS, slug

ROOT = Path(__file__).parent

SERVE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams, __version__
    given = json.load(open(sys.argv[1]))
    exec(given["mend"])
    llm = LLM(given["model"], dtype=given["dtype"], max_model_len=256, max_num_seqs=16, enforce_eager=True,
              enable_prefix_caching=False, **given["more"])
    def run(ids, **how):
        return llm.generate([{"prompt_token_ids": i} for i in ids], SamplingParams(temperature=0, **how))
    out = run(given["prompts"], max_tokens=given["tokens"], ignore_eos=True)
    found = [{"ids": list(o.outputs[0].token_ids), "text": o.outputs[0].text} for o in out]
    found[0]["version"] = __version__
    print("FOUND" + json.dumps(found), flush=True)
    whole = [p + o for p, o in zip(given["prompts"], given["ours"])]
    for o, prompt, row in zip(run(whole, max_tokens=1, prompt_logprobs=1), given["prompts"], found):
        each = list(zip(o.prompt_token_ids, o.prompt_logprobs))[len(prompt):]
        row["logp"] = [said[token].logprob for token, said in each]
    print("FOUND" + json.dumps(found), flush=True)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", default=sys.executable, help="interpreter of an environment with vLLM")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="smollm2", help="or a folder or file of it")
    parser.add_argument("--only", nargs="*", default=[""], help="roads whose names hold one of these")
    parser.add_argument("--keep", type=Path, help="where checkpoints stay")
    parser.add_argument("--jobs", type=int, default=1, help="roads at a time")
    parser.add_argument("--timeout", type=int, help="seconds of an engine; 1200 on a CPU, else 150")
    parser.add_argument("--logs", type=Path, help="a file for the last lines of what failed")
    parser.add_argument("--results", type=Path, help="a JSON file of rows")
    args = parser.parse_args()
    if not any(o in name for name in ROADS for o in args.only):
        parser.error(f"no road holds {' or '.join(args.only)}; there are {'; '.join(ROADS)}")
    args.timeout = args.timeout or (1200 if args.device == "cpu" else 150)
    args.keep = (args.keep or Path(tempfile.mkdtemp())).absolute()
    args.model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    tail = "" if args.device == "cpu" else f"_{args.device}"
    results = args.results or ROOT / "results" / f"serve_vllm{tail}.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    wanted = [name for name in ROADS if name not in done and any(o in name for o in args.only)]
    if args.device == "cuda":
        wanted = [name for name in wanted if not ROADS[name].mend and not ROADS[name].cut]
    args.keep.mkdir(parents=True, exist_ok=True)
    entry_point(args.keep)
    (args.keep / "serve.py").write_text(SERVE)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(travel, args, name): name for name in wanted}
        for future in as_completed(running):
            name = running[future]
            done[name] = future.result()
            print(name, json.dumps(done[name]), flush=True)
            results.write_text(json.dumps({n: done[n] for n in ROADS if n in done}, indent=1))
            results.with_suffix(".md").write_text(markdown(done, args), encoding="utf-8")
    print(markdown(done, args))


def entry_point(folder: Path) -> None:
    """fewbit as vLLM looks for plugins, whatever is installed: the metadata of this tree."""
    metadata = folder / "site" / "fewbit-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fewbit\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfewbit = fewbit.serve.vllm:register\n"
    )


def travel(args, name: str) -> dict:
    """A road from the model to its row; what goes wrong becomes the row."""
    start, own = time.time(), args.keep / slug(name)
    try:
        words = ["--device", args.device, "--model", args.model, "--keep", str(args.keep)]
        script = str(ROOT.absolute() / "serve_roads.py")
        status, said = run([sys.executable, script, name, *words], args, 2 * args.timeout)
        if status:
            return failed(args, f"{name}: quantize", said, "not made: ")
        ours = json.loads(own.with_suffix(".json").read_text())
        given = {key: ours[key] for key in ("model", "dtype", "prompts")} | {"tokens": TOKENS}
        given |= {"ours": [row["ids"] for row in ours["rows"]], "more": {}}
        given["mend"] = ROADS[name].mend if args.device == "cpu" else ""
        if args.device == "cuda":  # several engines share a GPU: a fixed cache, no look at what is free
            given["more"] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 29}
        own.with_suffix(".given").write_text(json.dumps(given))
        made = time.time()
        status, said = run([args.vllm, "serve.py", f"{own}.given"], args, args.timeout)
        found = [line for line in said.splitlines() if line.startswith("FOUND")]
        if not found:
            late = f"took more than {args.timeout} s; " if status == -9 else ""
            row = failed(args, f"{name}: serve", said, late)
            return row | (in_transformers(ours) if args.device == "cpu" else {})
        row = beside(ours, json.loads(found[-1].removeprefix("FOUND")))
        return row | {"seconds": [round(made - start), round(time.time() - made)]}
    except Exception as error:  # a road that breaks this script, too, is a row
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def run(words: list[str], args, seconds: int) -> tuple[int, str]:
    """(status, output) of a process in a group of its own; -9 when it was ended after ``seconds``."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [ROOT.parent / "src", args.keep / "site", *(Path(p) for p in own if p)]
    least = {"OMP_NUM_THREADS": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if args.device == "cuda":
        least |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}
    alone = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": "fewbit",
    }
    env = least | alone | dict(os.environ) | quiet
    env["PYTHONPATH"] = os.pathsep.join(str(p.absolute()) for p in paths)
    child = subprocess.Popen(
        words, env=env, cwd=args.keep, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = child.communicate(timeout=seconds)[0]
        return child.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return -9, child.communicate()[0]


def failed(args, what: str, said: str, before: str) -> dict:
    """A row that says why."""
    if args.logs is not None:
        with args.logs.open("a", encoding="utf-8") as file:
            file.write(f"\n===== {what}\n{said[-6000:]}\n")
    found = re.findall(r"\b(\w*(?:Error|Exception): .+(?:\n.*\S.*)*)", said.replace("[rank0]:", ""))
    found = [r for r in found if "Engine core initialization failed" not in r] or ["no reason given"]
    return {"failed": before + " ".join(found[-1].split())[:400]}


def in_transformers(ours: dict) -> dict:
    """What transformers makes of the file in a process without fewbit."""
    if "transform_config" in (Path(ours["model"]) / "config.json").read_text():
        return {
            "transformers": "ignores transform_config; compressed-tensors itself: tests/io/test_matrix.py"
        }
    from fewbit.errors import InputError
    from fewbit.stream.client import look

    try:
        seen = look(Path(ours["model"]), ours["layout"])
    except InputError as error:
        return {"transformers": str(error)}
    if seen.difference is None:
        return {"transformers": seen.why}
    return {"transformers": f"loads it, logits differ by {seen.difference:.1g} of the largest"}


def beside(ours: dict, theirs: list[dict]) -> dict:
    """The row: tokens that agree from the start and the gap at the first that does not, by prompt; how far
    log-probabilities are apart, and how far ours are in another dtype."""
    agree, gaps, apart, step, noise = [], [], [], [], []
    for own, other, t in zip(ours["rows"], ours["noise"] or [[]] * len(theirs), theirs, strict=True):
        parts = [i for i, (a, b) in enumerate(zip(own["ids"], t["ids"], strict=True)) if a != b]
        agree.append(parts[0] if parts else len(own["ids"]))
        gaps.append(own["gaps"][parts[0]] if parts else None)
        apart += [abs(a - b) for a, b in zip(own["logp"], t.get("logp", []), strict=False)]
        step += [abs(a - b) for a, b in zip(own["logp"], own["step"], strict=True)]
        noise += [abs(a - b) for a, b in zip(own["logp"], other, strict=False)]
    return {
        "dtype": ours["dtype"],
        "agree": agree,
        "gaps": gaps,
        "least": [min(own["gaps"]) for own in ours["rows"]],
        "apart": mean_and_max(apart),
        "step": mean_and_max(step),
        "noise": mean_and_max(noise),
        "text": theirs[-len(PLAIN)]["text"],
        "engine": theirs[0]["version"],
    }


def mean_and_max(values: list[float]) -> list[float] | None:
    """None of none."""
    return [sum(values) / len(values), max(values)] if values else None


def markdown(done: dict, args) -> str:
    """The table."""
    where = "a CPU" if args.device == "cpu" else "a GPU"
    if torch.cuda.is_available() and args.device == "cuda":
        where = torch.cuda.get_device_name()
    engines = sorted({r["engine"] for r in done.values() if "engine" in r})
    lines = [
        f"Printed by `python benchmarks/serve_vllm.py --device {args.device}` (its first lines say how), "
        f"vLLM {', '.join(engines)} on {where}.",
        "",
        f"| road | dtype | of {TOKENS} tokens agree: most decided prompts | most decided paragraphs | "
        "not chosen | gaps where they part, nats | log-probabilities apart, mean and largest | "
        f"ours token by token | ours in another dtype | after {PLAIN[0]!r} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in ROADS if n in done):
        r = done[name]
        if "failed" in r:
            also = f"; transformers: {r['transformers']}" if "transformers" in r else ""
            lines.append(f"| {name} | | refused | | | | | | | {r['failed']}{also} |".replace("\n", " "))
            continue
        half = (len(r["agree"]) - len(PLAIN)) // 2
        parts = (r["agree"][:half], r["agree"][half : 2 * half], r["agree"][2 * half :])
        agree = [", ".join(map(str, part)) for part in parts]
        gaps = ", ".join(f"{gap:.3f}" for gap in r["gaps"] if gap is not None)
        apart = " | ".join(
            "" if pair is None else f"{pair[0]:.1g}, {pair[1]:.1g}"
            for pair in (r["apart"], r["step"], r["noise"])
        )
        text = " ".join(r["text"].split())[:60].replace("|", "/")
        lines.append(f"| {name} | {r['dtype']} | {' | '.join(agree)} | {gaps} | {apart} | {text} |")
    lines += [
        "",
        "[The prompts](serve_prompts.md). [What rounding is worth](serve_noise.md).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
