"""Processes that form a gloo group, kept for all tests of a module: what costs time is importing torch.

def work(rank, world, x):        # in the test file, at top level; returns what can be pickled
    ...
def test_it(ranks):
    first, second = ranks(2, work, x)
"""

import importlib.util
import multiprocessing as mp
import os
import tempfile
import traceback
from pathlib import Path

PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "fewbit.train.distributed",
]  # fmt: skip
LIMIT = 40  # seconds of one piece of work


def _serve(rank, world, store, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    modules = {}
    while (job := pipe.recv()) is not None:
        path, name, args = job
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            torch.manual_seed(0)
            pipe.send((True, getattr(modules[path], name)(rank, world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Call with a number of processes, a top-level function of a test file and its arguments: its results."""

    def __init__(self):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.pools = {}

    def __call__(self, world, work, *args):
        if world not in self.pools:
            store = tempfile.mktemp()
            self.pools[world] = [self._start(rank, world, store) for rank in range(world)]
        pool = self.pools[world]
        for _, pipe in pool:
            pipe.send((work.__code__.co_filename, work.__name__, args))
        found = [pipe.recv() if pipe.poll(LIMIT) else (False, "no answer") for _, pipe in pool]
        wrong = [f"rank {rank} of {world}: {value}" for rank, (good, value) in enumerate(found) if not good]
        if wrong:  # the others may still wait for the one that failed
            self._stop(world)
            raise AssertionError("\n".join(wrong))
        return [value for _, value in found]

    def _start(self, rank, world, store):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _stop(self, world):
        for process, _ in self.pools.pop(world):
            process.kill()
            process.join()

    def close(self):
        """End all processes."""
        for world in list(self.pools):
            for _, pipe in self.pools[world]:
                pipe.send(None)
            for process, _ in self.pools[world]:
                process.join(10)
            self._stop(world)
