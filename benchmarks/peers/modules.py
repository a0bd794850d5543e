"""What importing costs: run a script and list the modules it had loaded, or load a list and do nothing else.

python modules.py run LIST.json SCRIPT.py [ARGUMENTS]        python modules.py load LIST.json
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import sys


def write(path: str, before: set[str]) -> None:
    """The names of the modules that were loaded since, in their order."""
    with open(path, "w") as f:
        json.dump([name for name in sys.modules if name not in before], f)


if __name__ == "__main__":
    action, path = sys.argv[1:3]
    if action == "run":
        atexit.register(write, path, set(sys.modules))
        sys.argv = sys.argv[3:]
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        with open(path) as f:
            names = json.load(f)
        if "fewbit.cli.options" in names:  # as its commands begin
            importlib.import_module("fewbit.cli.options").prepare(False)
        for name in names:
            with contextlib.suppress(Exception):  # made at run time, or meant for a place within another
                importlib.import_module(name)
        os._exit(0)  # what a script spends on leaving is its own
