"""Claims: a user of a damaged checkpoint sees one sentence and exit code 2, and no output folder."""

import re
import sys
from shutil import copytree

import pytest
from hostile import mutations as m
from hostile.shards import INDEX
from quantized import int_format, save_quantized
from tiny import save_tiny

from fewbit.cli import main

DAMAGE = {
    "cut": (m.cut(m.WEIGHTS, lambda n, h: n - 1), "is not a complete safetensors file"),
    "offsets": (m.patch(m.WEIGHTS, 0, b"\xff" * 8), "is not a complete safetensors file"),
    "wide": (m.said("hidden_size", value=10**9), "asks for a model far larger|transformers cannot"),
    "deep": (m.text("config.json", "[" * 100_000), "is not valid JSON"),
    "path": (m.text(INDEX, '{"weight_map": {"a": "../../etc/passwd"}}'), "no plain name of a file"),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    save_tiny("llama", root / "quantize")
    save_quantized("llama", root / "export", int_format(4))
    return root


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_commands_refuse_damage(wholes, tmp_path, monkeypatch, capsys, command, damage):
    change, said = DAMAGE[damage]
    change(copytree(wholes / command, tmp_path / "in"))
    words = ["-r", "rtn"] if command == "quantize" else ["--to", "native", "--no-verify"]
    words = [command, str(tmp_path / "in"), *words, "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fewbit", *words])
    with pytest.raises(SystemExit) as ended:
        main.app()
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, last), last
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
