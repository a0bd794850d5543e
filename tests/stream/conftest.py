"""What tests of runs share: one run in one go, and the same run that was stopped and taken up."""

import pytest

from fewbit.stream.job import Job
from fewbit.stream.quantize import quantize

FILES = ("model.safetensors", "config.json", "fewbit_manifest.json")


@pytest.fixture
def whole_and_cut(tmp_path, monkeypatch):
    """Call with a model, a recipe and a calibration: the results of both runs of two blocks or more."""

    def run(model, recipe, calibration):
        whole = quantize(model, recipe, output=tmp_path / "whole", calibration=calibration)
        store = Job.store

        def die(self, i, *rest):
            if i == 1:
                raise KeyboardInterrupt
            return store(self, i, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Job, "store", die)
            with pytest.raises(KeyboardInterrupt):
                quantize(model, recipe, output=tmp_path / "cut", calibration=calibration)
        cut = quantize(model, recipe, output=tmp_path / "cut", calibration=calibration)
        assert cut.resumed_blocks == 1
        return whole, cut

    return run


@pytest.fixture
def ends_in_the_same_file(whole_and_cut):
    """The same, and both folders hold the same bits."""

    def check(model, recipe, calibration):
        whole, cut = whole_and_cut(model, recipe, calibration)
        for name in FILES:
            assert (cut.output / name).read_bytes() == (whole.output / name).read_bytes()

    return check
