"""The command line, called in this process through its entry point, on a tiny model."""

import itertools
import json
import sys
from dataclasses import dataclass

import pytest
from tiny import save_tiny, tiny, tiny_tokenizer

from fewbit.cli import main

LINES = ("the cat sat on the mat", "a dog", "rain is on the way to the town", "he sings", "the", "it is warm")

# The command sets these where they are not set; monkeypatch takes them back.
LEFT_BEHIND = (
    "TRANSFORMERS_VERBOSITY",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_VERBOSITY",
    "TORCH_CPP_LOG_LEVEL",
    "GOMP_SPINCOUNT",
)


@dataclass(frozen=True)
class Ran:
    """Exit code and what came out."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one object on standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny BERT without a head in a folder that no test changes; sentences.txt and pairs.tsv beside it."""
    from transformers import BertModel

    root, source = tmp_path_factory.mktemp("encoder"), tiny("bert")
    encoder = BertModel(source.config).eval()  # with a pooler, which the headed one lacks
    encoder.load_state_dict(source.bert.state_dict(), strict=False)
    encoder.save_pretrained(root / "bert")
    tiny_tokenizer().save_pretrained(root / "bert")
    (root / "sentences.txt").write_text("\n".join(LINES) + "\n")
    rows = [f"{a}\t{b}\t{i}.5" for i, (a, b) in enumerate(itertools.pairwise(LINES))]
    (root / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    return root / "bert"


@pytest.fixture(scope="session")
def checkpoint(llama, tmp_path_factory):
    """A checkpoint of it that this command line wrote: W4A16, groups of 32."""
    out = tmp_path_factory.mktemp("checkpoints") / "w4a16"
    words = ("quantize", str(llama), "-r", "gptq", "--group-size", "32", "--samples", "4", "--seqlen", "32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewbit", *words, "-o", str(out)])
        with pytest.raises(SystemExit):
            main.app()
    return out


@pytest.fixture
def fewbit(monkeypatch, capsys, tmp_path):
    """``fewbit(*words) -> Ran``: what the installed command does with these words, in an empty folder."""
    for name in LEFT_BEHIND:
        monkeypatch.setenv(name, "1000" if name == "GOMP_SPINCOUNT" else "error")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*words) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fewbit", *(str(word) for word in words)])
        with pytest.raises(SystemExit) as left:
            main.app()
        said = capsys.readouterr()
        return Ran(left.value.code or 0, said.out, said.err)

    return call
