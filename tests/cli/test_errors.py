"""Bad input: one clear sentence, exit code 2, nothing half-written, the input as it was."""

import collections
import errno
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer

from fewbit.stream import job, quantize

CALIBRATION = ("--samples", 4, "--seqlen", 32)
GPTQ = ("-r", "gptq", "--group-size", 32, *CALIBRATION)


def fingerprint(folder):
    """Every file below a folder, with its content."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def refused(ran, *words, early=True):
    """One sentence and nothing else on standard error; ``early=False``: after the plan and the progress."""
    assert ran.code == 2
    lines = ran.err.splitlines()
    assert lines[-1].startswith("fewbit: ")
    assert sum(line.startswith("fewbit:") for line in lines) == 1
    assert len(lines) == 1 or not early, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    for word in words:
        assert str(word) in lines[-1]


def text(folder, content, name="text.txt"):
    path = folder / name
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-r", "gptqq"), ("unknown recipe 'gptqq'", "did you mean 'gptq'")),
        (("-r", "gptq", "--group-size", 48), ("48", "64")),
        (("-r", "gptq", "--set", "bitz=3"), ("no setting 'bitz'", "group_size")),
        (("-r", "gptq", "--set", "bits"), ("--set 'bits'", "key=value")),
        (("-r", "gptq", "--set", "bits=three"), ("bits='three'", "int")),
        (("-r", "gptq", "--bits", 3, "--set", "bits=4"), ("'bits' is given twice",)),
        (("-r", "nf4", "--bits", 3), ("'nf4'", "'bits'")),
        (("-r", "rtn", "--bits", 17), ("int17",)),
        ((), ("no recipe is given", "--recipe-file")),
        (("--recipe-file", "nothing.yaml"), ("nothing.yaml", "No such file")),
        (("-r", "rtn", "--recipe-file", "a.yaml"), ("both -r rtn and --recipe-file a.yaml",)),
        (("-r", "rtn", "--group-size", 32, "--device", "tpu7"), ("'tpu7'", "cpu")),
        (("-r", "rtn", "--group-size", 32, "--device", "meta"), ("'meta'", "cpu")),
        ((*GPTQ, "--samples", 0), ("samples", "0")),
        ((*GPTQ, "--calibration", "nothing.txt"), ("no text file nothing.txt",)),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_bad_options_are_refused_before_anything_is_written(fewbit, llama, tmp_path, command, words, says):
    before = fingerprint(llama)
    ran = fewbit(command, llama, "-o", "out", *words)
    late = command == "quantize" and "nothing.txt" in words  # the plan comes before the text is read
    refused(ran, *says, early=not late)
    assert list(tmp_path.iterdir()) == []
    assert fingerprint(llama) == before


def test_a_cuda_device_that_is_not_there(fewbit, llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(fewbit("plan", llama, "-r", "rtn", "--device", "cuda:3"), "'cuda:3'", "torch sees 1")


def test_settings_do_not_change_a_recipe_file(fewbit, llama, tmp_path):
    path = text(tmp_path, fewbit("recipes", "rtn").out, "mine.yaml")
    refused(fewbit("plan", llama, "--recipe-file", path, "--bits", 3), "complete", "'bits'")
    refused(fewbit("plan", llama, "--recipe-file", text(tmp_path, "- [", "bad.yaml")), "bad.yaml")
    refused(fewbit("plan", llama, "--recipe-file", text(tmp_path, "a: 1", "other.yaml")))


@pytest.mark.parametrize(
    "command", [("quantize", "-o", "out", "-r", "rtn"), ("plan", "-r", "rtn"), ("eval",)]
)
def test_a_missing_model(fewbit, tmp_path, command):
    refused(fewbit(command[0], tmp_path / "nothing", *command[1:]), tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_linear_layers(fewbit, tmp_path):
    import transformers

    folder = tmp_path / "hollow"
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=64, num_hidden_layers=0, num_attention_heads=4, intermediate_size=128
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    refused(fewbit("quantize", folder, "-r", "rtn", "-o", "out"), "linear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hollow"]


@pytest.mark.parametrize(("content", "says"), [("\n \n\n", "no text"), ("Too short.", "tokens")])
def test_calibration_text_that_is_empty_or_too_short(fewbit, llama, tmp_path, content, says):
    path = text(tmp_path, content)
    refused(
        fewbit("quantize", llama, *GPTQ, "--calibration", path, "-o", "out"), "text.txt", says, early=False
    )
    refused(fewbit("plan", llama, *GPTQ, "--calibration", path), "text.txt", says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_an_evaluation_text_that_is_empty_or_shorter_than_a_window(fewbit, llama, tmp_path):
    refused(fewbit("eval", llama, "--data", text(tmp_path, " \n")), "no text")
    refused(fewbit("eval", llama, "--data", text(tmp_path, "Too short.")), "fewer than one window of 512")
    refused(fewbit("eval", llama, "--data", "nothing.txt"), "no text file nothing.txt")
    refused(fewbit("eval", llama, "--window", 1), "1")


def test_a_window_longer_than_the_model(fewbit, llama):
    refused(fewbit("eval", llama), "512", "128", early=False)


def test_a_disk_too_small_for_the_plan(fewbit, llama, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 0))
    for command in ("plan", "quantize"):
        refused(fewbit(command, llama, *GPTQ, "-o", "out"), "0 MB free")
    assert list(tmp_path.iterdir()) == []


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("safetensors.torch", "save_file"),
        ("fewbit.stream.job", "write_text"),
        ("fewbit.stream.quantize", "write_text"),
    ],
)
def test_a_disk_that_fills_up_during_the_run_and_the_run_after_it(
    fewbit, llama, tmp_path, monkeypatch, owner, name
):
    before = fingerprint(llama)
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", full)
        refused(fewbit("quantize", llama, *GPTQ, "-o", "out"), "free", early=False)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.rglob("*tmp*") if p.is_file()]
    assert fingerprint(llama) == before
    assert fewbit("quantize", llama, *GPTQ, "-o", "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_shard_with_a_nan(fewbit, tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path / "sick", max_shard_size="50KB")
    name = "model.layers.1.mlp.up_proj.weight"
    shard = next(p for p in (tmp_path / "sick").glob("*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    refused(fewbit("quantize", tmp_path / "sick", *GPTQ, "-o", "out"), name, "1 value", early=False)
    assert [p.name for p in tmp_path.iterdir()] == ["sick"]


@pytest.mark.parametrize(
    "command", [("quantize", "-o", "out", *GPTQ), ("plan", *GPTQ), ("eval",), ("generate", "Hi")]
)
def test_a_truncated_file(fewbit, tmp_path, command):
    save_tiny("llama", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    before = fingerprint(tmp_path)
    refused(fewbit(command[0], tmp_path / "cut", *command[1:]), "model.safetensors")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    "kind", ["file in a folder", "file", "another run's checkpoint", "another run's blocks"]
)
def test_an_output_that_holds_something_else(fewbit, llama, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    match kind:
        case "file in a folder":
            out.mkdir()
            text(out, "mine", "diary.txt")
        case "file":
            text(tmp_path, "mine", "out")
        case "another run's checkpoint":
            assert fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "-o", "out").code == 0
        case "another run's blocks":
            with monkeypatch.context() as patch:
                patch.setattr(job.Job, "commit", full)
                fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "-o", "out")
    before = fingerprint(tmp_path)
    refused(fewbit("quantize", llama, *GPTQ, "-o", "out"), "out", early=False)
    assert fingerprint(tmp_path) == before


def test_an_original_with_another_tokenizer(fewbit, llama, tmp_path):
    save_tiny("llama", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["Q"] = vocabulary["Q"], vocabulary["q"]
    path.write_text(json.dumps(tokenizer))
    refused(fewbit("eval", llama, "--against", tmp_path / "other", "--window", 32), "same tokenizer")


def test_what_cannot_be_generated(fewbit, llama, tmp_path):
    save_tiny("bert", tmp_path / "bert")
    refused(fewbit("generate", tmp_path / "bert", "Hi"), "BertForMaskedLM", "does not generate")
    refused(fewbit("generate", llama, ""), "prompt is empty")
    refused(fewbit("generate", llama, "Hi", "--max-new-tokens", 200), "128 positions")


def test_usage_errors_and_defects_have_their_own_codes(fewbit, llama, monkeypatch):
    for words, said in (
        (("quantize", llama, "-r", "rtn"), "Missing option '--output' / '-o'; `fewbit quantize --help`"),
        (("quantise", llama), "No such command 'quantise'"),
        (("--quiet", "formats"), "No such option: --quiet; `fewbit --help` says"),
        (("eval", llama, "--join", "glue"), "'glue'"),
        (("memory", llama, "--context", "nan"), "--context"),
        (("memory", ""), "The name of the model is empty"),
        (("memory", "/no/such/folder"), "There is no model at /no/such/folder"),
    ):
        ran = fewbit(*words)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert said in ran.err

    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(quantize, "quantize", broken)
    with pytest.raises(RuntimeError):  # Python prints the traceback and leaves with 1
        fewbit("quantize", llama, "-r", "rtn", "-o", "out")


def test_an_interrupt_says_how_to_go_on_and_the_same_command_does(fewbit, llama, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    command = ("quantize", llama, "-r", "rtn", "--group-size", 32, "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "assemble", interrupted)
        ran = fewbit(*command)
    assert ran.code == 130
    assert ran.err.splitlines()[-1].startswith("fewbit: interrupted; the same command")
    assert not (tmp_path / "out").exists()
    ran = fewbit(*command)
    assert ran.code == 0
    assert ran.err.count("taken over from the interrupted run") == 2
    assert "2 blocks were taken over" in ran.out


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "fewbit.cli.main", "formats", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        ran.stdout.readline()
        ran.stdout.close()
        assert ran.stderr.read() == ""
    assert ran.returncode == 0


def test_the_real_process_says_one_sentence(tmp_path):
    command = [sys.executable, "-m", "fewbit.cli.main", "plan", str(tmp_path / "nothing"), "-r", "rtn"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("fewbit: ")
