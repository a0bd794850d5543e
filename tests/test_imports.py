"""Imports point one way, and importing fewbit stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "fewbit"
# Each tier may import from those before it, and a folder from itself.
TIERS = [
    {"errors"},
    {"viterbi"},  # a search over a table of values: the rounding of trellis grids
    {"grid"},
    {"format"},
    {"kernel"},
    {"transform", "solve", "nn"},
    {"io", "train"},
    {"recipe", "seams", "search", "analyze", "evaluate", "serve"},
    {"report"},  # HTML of what the tiers below have found; needs none of them but errors
    {"stream"},
    {"inspect", "compare", "trainer"},
    {"cli"},
]
RANK = {folder: i for i, tier in enumerate(TIERS) for folder in tier}
FOLDERS = sorted(p.name for p in SRC.iterdir() if p.is_dir() and (p / "__init__.py").exists())
MODULES = {".".join(("fewbit", *p.relative_to(SRC).with_suffix("").parts)) for p in SRC.rglob("*.py")}


def imports_of(path: Path):
    """Folders of fewbit that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fewbit."):
            yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "fewbit":
            for alias in node.names:
                if alias.name in RANK:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fewbit."):
                    yield alias.name.split(".")[1], node.lineno
        elif (
            isinstance(node, ast.Constant) and str(node.value).startswith("fewbit.") and node.value in MODULES
        ):
            yield node.value.split(".")[1], node.lineno  # by its name, as import_module takes it


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    assert folder in RANK, f"folder {folder} has no tier"
    wrong = [
        f"{path.relative_to(SRC)}:{line} imports {other}"
        for path in (SRC / folder).rglob("*.py")
        for other, line in imports_of(path)
        if other != folder and RANK[other] >= RANK[folder]
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("folder", ["grid", "format", "transform", "solve"])
def test_the_core_needs_torch_alone(folder):
    allowed = {"torch", "numpy", "fewbit", "yaml", *sys.stdlib_module_names}
    for path in (SRC / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.relative_to(SRC)} imports {name}"


def code_lines(path):
    """Lines that hold code: blank lines, comments and docstrings cost nothing."""
    text = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" for n, line in lines if n not in prose)


def test_the_core_holds_its_line_budget():
    folders = (SRC / folder for folder in ("grid", "format", "transform", "solve"))
    assert sum(code_lines(path) for folder in folders for path in folder.rglob("*.py")) < 4600


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import fewbit; "
        "print(sorted(m.split('.')[0] for m in set(sys.modules) - before)); "
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, cuda = done.stdout.splitlines()
    heavy = {
        "transformers",
        "numba",
        "scipy",
        "gguf",
        "typer",
        "rich",
        "compressed_tensors",
        "datasets",
        "triton",
    }
    assert not heavy & set(ast.literal_eval(loaded))
    assert cuda == "False"


def test_the_public_face_is_short():
    assert len((SRC / "__init__.py").read_text().splitlines()) < 40
