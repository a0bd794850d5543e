"""Who computes in what: the few facts that kernels are chosen by, and a table without holes."""

import pytest

from fewbit.analyze.hardware import (
    FOOTNOTES,
    GENERATIONS,
    NUMBER_TYPES,
    Generation,
    Support,
    footnotes,
    support,
)
from fewbit.errors import InputError
from fewbit.format.named import FORMATS
from fewbit.grid import by_name

TENSOR, CORES, STORED, NONE = Support.TENSOR, Support.CORES, Support.STORED, Support.NONE


def row(name: str) -> dict[str, Support]:
    of_type = next(each for each in NUMBER_TYPES if each.name == name)
    return {generation.gpu: support(of_type, generation) for generation in GENERATIONS}


def nvidia_data_center(name: str) -> list[Support]:
    """P100, V100, T4, A100, L40, H100, B200."""
    return list(row(name).values())[:7]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FP32", [CORES] * 7),
        ("TF32", [NONE, NONE, NONE, TENSOR, TENSOR, TENSOR, TENSOR]),
        ("FP16", [CORES, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR]),
        ("BF16", [STORED, STORED, STORED, TENSOR, TENSOR, TENSOR, TENSOR]),
        ("INT8", [STORED, CORES, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR]),
        ("INT4", [STORED, STORED, TENSOR, TENSOR, TENSOR, STORED, STORED]),
        ("FP8", [STORED, STORED, STORED, STORED, TENSOR, TENSOR, TENSOR]),
        ("FP6", [STORED] * 6 + [TENSOR]),
        ("FP4", [STORED] * 6 + [TENSOR]),
        ("MXFP8/6/4", [STORED] * 6 + [TENSOR]),
        ("NVFP4", [STORED] * 6 + [TENSOR]),
        ("codebooks", [STORED] * 7),
        ("1-3 bit", [STORED] * 7),
    ],
)
def test_nvidia_from_p100_to_b200(name, expected):
    assert nvidia_data_center(name) == expected


def test_amd():
    assert row("FP8")["MI300"] is TENSOR
    assert row("FP4")["MI300"] is STORED
    assert row("MXFP8/6/4")["MI350"] is TENSOR
    assert row("NVFP4")["MI350"] is STORED


def test_every_named_grid_and_format_exists():
    for each in NUMBER_TYPES:
        assert each.holds
        for name in each.holds:
            assert name in FORMATS or by_name(name)


def test_every_footnote_belongs_to_a_cell_or_a_row():
    reached = {n for t in NUMBER_TYPES for g in (None, *GENERATIONS) for n in footnotes(t, g)}
    assert reached == set(range(1, len(FOOTNOTES) + 1))


def test_a_generation_with_an_unknown_type_is_refused():
    with pytest.raises(InputError, match="FP5"):
        Generation(gpu="X", name="X", year=2030, capability="99", tensor=("FP5",), cores=())
