"""Every mutation of a format in one process of its own: ``python reading.py ROOT`` for all formats.

For each format a process is forked, so that libraries are imported once. It takes no more address space than
1 GiB on top, is killed after 10 s of work on one mutation, and writes a line for each into
``ROOT/FORMAT.jsonl`` before and after: a crash or a hang so leaves the name of what did it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

SECONDS = 10  # of work
SPACE = 2**30


def look(path: Path) -> dict:
    """Everything that a file holds, by name, as the loop and the exporter read it."""
    from fewbit.io.skeleton import build_skeleton, parameter_map
    from fewbit.io.source import open_source

    source = open_source(path)
    mapping, unused = parameter_map(source, build_skeleton(source))
    source.fingerprint()
    out = {}
    for name in [*mapping.values(), *unused]:
        out[name] = source.read([name])[name]
        assert tuple(out[name].shape) == tuple(source.tensors()[name].shape), name
    for module in getattr(source, "entries", {}):
        out[f"{module}.weight"] = source.read_qtensor(module).dequantize()
        if hasattr(source, "read_input") and (steps := source.read_input(module)) is not None:
            out[f"{module}.input"] = steps.scale
    return out


def use(path: Path, out: Path) -> None:
    """Load, run a token through it, and where it is quantized export it."""
    import torch

    import fewbit
    from fewbit.io.source import open_source
    from fewbit.stream.export import export

    model = fewbit.load(path)
    model(torch.tensor([[5, 6]]))
    if path.is_dir() and getattr(open_source(path), "entries", None):
        export(path, "native", out, verify=False)


def judge(path: Path, out: Path, before: dict) -> tuple[str, str]:
    """What became of a mutation: "same", "changed", "refused" with the words, or "broken" with the trace."""
    import torch

    from fewbit.errors import InputError

    try:
        got = look(path)
        use(path, out)
    except InputError as error:
        return "refused", str(error)
    except BaseException:
        return "broken", traceback.format_exc(limit=-4)
    if any(n not in got or got[n].shape != t.shape for n, t in before.items()):
        return "broken", "read, with other names or shapes"
    same = len(got) == len(before) and all(
        torch.equal(got[n].double(), t.double()) for n, t in before.items()
    )
    return ("same" if same else "changed"), ""


def snapshot(root: Path, apart: Path) -> set:
    """Names and sizes of files outside a folder."""
    files = (p for p in root.rglob("*") if not p.is_relative_to(apart))
    return {(str(p), p.lstat().st_size) for p in files if not p.name.endswith(".jsonl")}


def run(kind: str, whole: Path, mutations: list, root: Path) -> None:
    """All mutations of a format; lines go to ``ROOT/KIND.jsonl``."""
    own = root / f"work-{kind}"
    own.mkdir()
    (own / "cwd").mkdir()
    os.chdir(own / "cwd")
    at, out = own / "in" / whole.name, own / "out"
    size = sum(p.stat().st_size for p in whole.rglob("*")) if whole.is_dir() else whole.stat().st_size
    before = look(whole)
    use(whole, out)
    shutil.rmtree(out, ignore_errors=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (root / f"{kind}.jsonl").open("w", buffering=1) as log:
        for mutation in mutations:
            shutil.rmtree(own / "in", ignore_errors=True)
            at.parent.mkdir()
            (shutil.copytree if whole.is_dir() else shutil.copyfile)(whole, at)
            mutation.change(at)
            print(json.dumps({"begin": mutation.name}), file=log)
            outside, most = snapshot(own, own / "in"), _peak()
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
            result, words = judge(at, out, before)
            signal.setitimer(signal.ITIMER_PROF, 0)
            done = {"name": mutation.name, "result": result, "words": words, "values": mutation.values}
            done |= {"grew": _peak() - most - 2 * size, "seconds": time.process_time() - started}
            if result == "refused" and out.exists():
                done |= {"result": "broken", "words": "refused, and left an output folder"}
            shutil.rmtree(out, ignore_errors=True)
            done["written"] = sorted(str(p) for p, _ in snapshot(own, own / "in") ^ outside)
            print(json.dumps(done), file=log)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(root: Path) -> None:
    """Formats one after the other."""
    sys.path[0] = str(Path(__file__).parent.parent)  # tests, not this folder
    import torch
    from hostile.checkpoints import FORMATS

    torch.set_num_threads(1)
    wanted = sys.argv[2:] or list(FORMATS)
    made = {kind: make(root / "whole" / kind) for kind in wanted for make, _ in [FORMATS[kind]]}
    for kind, path in made.items():
        child = os.fork()
        if not child:
            code = 1
            try:
                run(kind, path, FORMATS[kind][1](), root)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        (root / f"{kind}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
