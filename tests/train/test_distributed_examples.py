"""The scripts of examples/ that people start with torchrun: as they stand, on two gloo processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def started(rank, world, name, steps, *where):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main(torch.device("cpu"), steps, *(Path(w) for w in where))


def falls(losses):
    return sum(losses[-3:]) < 0.92 * sum(losses[:3])


def test_ddp_goes_on_where_it_stopped(ranks, tmp_path):
    file = str(tmp_path / "ddp.pt")
    first, second = ranks(2, started, "torchrun_ddp", 12, file)
    assert falls(first)
    assert first != second  # each rank has its own text
    assert ranks(2, started, "torchrun_ddp", 3, file)[0][-1] < first[0]
    assert torch.load(file, weights_only=True)["steps"] == 15


def test_fsdp_trains_and_writes_a_checkpoint(ranks, tmp_path):
    losses, _ = ranks(2, started, "torchrun_fsdp", 12, str(tmp_path / "fsdp"))
    assert falls(losses)
    assert (tmp_path / "fsdp" / ".metadata").is_file()


def test_zero_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    losses, _ = ranks(2, started, "torchrun_zero", 12, str(tmp_path))
    assert falls(losses)
    (more,) = ranks(1, started, "torchrun_zero", 3, str(tmp_path))
    assert more[0] < losses[0]
    assert [f.name for f in tmp_path.iterdir()] == ["0.pt"]


def test_the_parallel_pair_trains(ranks):
    first, second = ranks(2, started, "torchrun_parallel", 12)
    assert falls(first)
    assert first == second


@pytest.mark.slow
def test_torchrun_starts_a_script(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(ROOT / "examples" / "torchrun_parallel.py")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "step   30  loss" in done.stdout
