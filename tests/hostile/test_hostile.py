"""Claims: whatever is wrong with a checkpoint, it is read as it was or refused in one sentence that names it.

No mutation ends in another exception, a crash, 10 s of work, memory beyond twice the file and a constant, or
a file outside the output folder. All run in processes of their own (``reading``), so each of these shows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = (
    "plain",
    "sharded",
    "native",
    "compressed-tensors-int",
    "compressed-tensors-fp8",
    "compressed-tensors-nvfp4",
    "gptq",
    "awq",
    "bitsandbytes",
    "bitsandbytes-int8",
    "fp8",
    "gguf",
)
CONSTANT = 128 * 2**20  # bytes: what libraries import and keep when they are first used


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, str(HERE / "reading.py"), str(root), *KINDS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_harmless_or_refused_in_one_sentence(outcomes, kind):
    lines = [json.loads(line) for line in (outcomes / f"{kind}.jsonl").read_text().splitlines()]
    begun = [line["begin"] for line in lines if "begin" in line]
    done = [line for line in lines if "name" in line]
    status = int((outcomes / f"{kind}.status").read_text())
    assert status == 0, f"ended with {status} in {begun[-1]!r}"
    assert len(done) == len(begun) >= 50
    assert len(set(begun)) == len(begun)
    for line in done:
        name, words = line["name"], line["words"]
        assert line["result"] in ("same", "refused") or (line["result"] == "changed" and line["values"]), line
        if line["result"] == "refused":
            assert "\n" not in words, name
            assert 20 < len(words) < 400, (name, words)
        assert line["grew"] < CONSTANT, (name, line["grew"])
        assert not line["written"], (name, line["written"])
    assert sum(line["result"] == "refused" for line in done) >= 25


def test_code_that_a_configuration_names_is_never_run(outcomes):
    """A name with a slash in ``_attn_implementation`` makes transformers fetch a kernel from the hub."""
    lines = [json.loads(line) for line in (outcomes / "plain.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("name", "").startswith("_attn_implementation")]
    assert [line["result"] for line in found] == ["same"]
