"""Peak resident memory of the main job: SmolLM2 to W4A16 g64 by GPTQ, 32 x 512 tokens, whole process.

    python benchmarks/peak_memory.py

Writes benchmarks/results/peak_memory.md, with what `fewbit plan` predicts beside it.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from measure import FEWBIT, measured

ROOT = Path(__file__).parent
WHAT = ["smollm2", "-r", "gptq", "--group-size", "64", "--samples", "32"]


def main():
    plan = subprocess.run([FEWBIT, "plan", *WHAT, "--json"], capture_output=True, text=True, check=True)
    predicted = json.loads(plan.stdout)
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall, peak = measured([FEWBIT, "quantize", *WHAT, "-o", f"{folder}/out"], threads=1)
    text = (
        "Printed by `python benchmarks/peak_memory.py`; one thread.\n\n"
        f"peak resident {peak:.0f} MiB (predicted {predicted['peak_bytes'] / 2**20:.0f}), {cpu:.0f} CPU s, "
        f"{wall:.0f} s wall (predicted {predicted['seconds']:.0f} with the threads of the plan's process)\n"
    )
    (ROOT / "results" / "peak_memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
