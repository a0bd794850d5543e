"""``train``: a folder that appears complete, interrupted runs, and what stands in it."""

import json
from dataclasses import replace

import pytest
import torch
from quantized import save_quantized

import fewbit
from fewbit.errors import InputError
from fewbit.format import FORMATS
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.nn import QLinear
from fewbit.recipe import rtn
from fewbit.trainer.run import Watch, train
from fewbit.trainer.settings import Settings
from fewbit.trainer.way import Way

INT4 = rtn(bits=4, group_size=64)


class Interrupt(Watch):
    """Somebody presses Ctrl-C after so many updates."""

    def __init__(self, after: int):
        self.after = after

    def row(self, row, total):
        if row["step"] == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "way",
    [Way(), Way(products="nvfp4", level="O3"), Way(quant="lsq", recipe=INT4)],
    ids=["bf16", "nvfp4 O3", "lsq"],
)
def test_an_interrupted_run_ends_in_the_same_files(way, text, quick, tmp_path):
    how = {"data": text, "way": way, "settings": quick}
    whole = train("tiny-llama", output=tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train("tiny-llama", output=tmp_path / "cut", watch=Interrupt(5), **how)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(InputError, match="give --resume to go on"):
        train("tiny-llama", output=tmp_path / "cut", **how)
    other = how | {"settings": replace(quick, steps=7, lr=1e-3)}
    with pytest.raises(InputError, match=r"another run \(different lr, steps\)"):
        train("tiny-llama", output=tmp_path / "cut", resume=True, **other)
    resumed = train("tiny-llama", output=tmp_path / "cut", resume=True, **how)
    assert resumed.rows == whole.rows
    for name in ("model.safetensors", "losses.jsonl", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    again = train("tiny-llama", output=tmp_path / "cut", resume=True, **how)
    assert again.finished_before


def test_what_was_trained_is_what_loads(text, quick, tmp_path):
    result = train(
        "tiny-llama", data=text, output=tmp_path / "out", settings=replace(quick, precision="float32")
    )
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["read_back"] == pytest.approx(report["held"], rel=1e-6)
    assert report["held"] < report["before"] == report["start"]
    assert report["skipped"] == 0
    assert report["optimizer_bytes"] / report["parameters"] == pytest.approx(8, abs=0.01)
    assert result.as_dict()["losses"] == [row["loss"] for row in result.rows]
    model = fewbit.load(tmp_path / "out")
    assert model(torch.arange(9)[None]).logits.shape == (1, 9, 256)


def test_o3_leaves_master_weights_and_less_state(text, quick, tmp_path):
    way = Way(products="tensorwise", level="O3")
    result = train("tiny-llama", data=text, output=tmp_path / "out", way=way, settings=quick)
    assert result.report["optimizer_bytes"] / result.report["parameters"] < 5.3
    weight = fewbit.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert len(weight.unique()) > 300  # E4M3 under one step has at most 253 values
    assert result.report["read_back"] == pytest.approx(result.report["held"], rel=0.01)


def test_training_with_the_rounding_gives_codes_and_says_what_they_were_before(folders, text, tmp_path):
    plan = Settings(steps=8, batch=2, length=32, held=3, lr=1e-3, warmup=0.0)
    way = Way(quant="learned", recipe=rtn(bits=2, group_size=32, symmetric=False))
    result = train(str(folders / "llama"), data=text, output=tmp_path / "out", way=way, settings=plan)
    report = result.report
    assert report["quantized"]
    assert report["before"] != report["start"]
    assert report["held"] < report["start"]
    model = fewbit.load(tmp_path / "out")
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 14
    assert report["read_back"] == pytest.approx(report["held"], rel=0.01)
    with pytest.raises(InputError, match="quantized already"):
        train(str(tmp_path / "out"), data=text, output=tmp_path / "twice", settings=plan)


def test_a_gguf_file_is_trained_from_its_decoded_weights(text, tmp_path):
    save_quantized("llama", tmp_path / "q", FORMATS["q4_0"])
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    plan = Settings(steps=4, batch=2, length=32, held=3, lr=1e-3, warmup=0.0)
    report = train(str(tmp_path / "m.gguf"), data=text, output=tmp_path / "out", settings=plan).report
    before, after = fewbit.load(tmp_path / "m.gguf", dequantize=True), fewbit.load(tmp_path / "out")
    assert report["parameters"] == sum(p.numel() for p in before.parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after.get_parameter(name), before.get_parameter(name))


def test_the_curve_stands_beside_another_run_of_the_same_text_alone(text, quick, tmp_path):
    one = train("tiny-llama", data=text, output=tmp_path / "bf16", settings=quick)
    two = train(
        "tiny-llama", data=text, output=tmp_path / "fp8", settings=quick, way=Way(products="rowwise"),
        beside=tmp_path / "bf16",
    )  # fmt: skip
    assert two.as_dict()["beside"] == {"name": "tiny-llama, BF16", "held": one.report["held"], "steps": 6}
    page = (tmp_path / "fp8" / "curve.html").read_text()
    for name in ("tiny-llama, BF16, held out", "tiny-llama, rowwise products, training", "beside"):
        assert name in page
    with pytest.raises(InputError, match="other tokens"):
        train(
            "tiny-llama", data=text, output=tmp_path / "x", settings=replace(quick, length=16),
            beside=tmp_path / "bf16",
        )  # fmt: skip
    (tmp_path / "bf16" / "losses.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="no finished run"):
        train("tiny-llama", data=text, output=tmp_path / "x", settings=quick, beside=tmp_path / "bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16", "fp8"]


def test_a_damaged_checkpoint_of_a_run_is_refused_in_words(text, quick, tmp_path):
    how = {"data": text, "settings": quick, "output": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        train("tiny-llama", watch=Interrupt(3), **how)
    state = tmp_path / "out.partial" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        train("tiny-llama", resume=True, **how)


def test_an_update_with_an_inf_is_counted_in_the_report(text, quick, tmp_path):
    def tamper(loop):
        if loop.done == 2:
            weight = loop.model.lm_head.weight
            handle = weight.register_hook(lambda g: (handle.remove(), g * float("inf"))[1])

    with pytest.warns(RuntimeWarning, match="left out"):
        result = train("tiny-llama", data=text, output=tmp_path / "out", settings=quick, tamper=tamper)
    assert [row["skipped"] for row in result.rows] == [False, False, True, False, False, False]
    assert result.report["skipped"] == 1
    assert "1 of 6" in (tmp_path / "out" / "curve.html").read_text()
