"""Loading the packaged GGUF in a fresh process: open, config, tokenizer, all tensors to float32.

    python benchmarks/load_gguf.py

Writes benchmarks/results/load_gguf.md.
"""

import statistics
import sys
from pathlib import Path

from measure import measured

ROOT = Path(__file__).parent
LOAD = """
from fewbit.io.source import open_source
source = open_source("smollm2")
source.config(), source.tokenizer()
assert sum(t.numel() for t in source.read(source.tensors()).values()) > 134e6
"""


def main():
    runs = [measured([sys.executable, "-c", LOAD]) for _ in range(5)]
    cpu, wall, peak = (statistics.median(column) for column in zip(*runs, strict=True))
    text = (
        "Printed by `python benchmarks/load_gguf.py`: median of five fresh processes, imports included.\n\n"
        f"{wall:.1f} s wall, {cpu:.1f} CPU s, peak resident {peak:.0f} MB\n"
    )
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "load_gguf.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
