"""The command line, called in this process through its entry point, on a tiny model."""

import sys
from dataclasses import dataclass

import pytest
from tiny import save_tiny

from fewbit.cli import main


@dataclass(frozen=True)
class Ran:
    """Exit code and what came out."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


@pytest.fixture
def fewbit(monkeypatch, capsys, tmp_path):
    """``fewbit(*words) -> Ran``: what the installed command does with these words, in an empty folder."""
    for name in (
        "TRANSFORMERS_VERBOSITY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_HUB_VERBOSITY",
        "TORCH_CPP_LOG_LEVEL",
    ):
        monkeypatch.setenv(name, "error")  # the command sets what is not set; monkeypatch takes it back
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*words) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fewbit", *(str(word) for word in words)])
        with pytest.raises(SystemExit) as left:
            main.run()
        said = capsys.readouterr()
        return Ran(left.value.code or 0, said.out, said.err)

    return call
