"""GPUs as data: public figures, order, and what a size fits on."""

import pytest

from fewbit.analyze.gpus import ANY, BF16, FP8, GPUS, RESERVE, Gpu, holding, how_many
from fewbit.errors import InputError

NAMES = [str(gpu) for gpu in GPUS]


def test_the_table_is_ordered_and_complete():
    assert [gpu.memory_gb for gpu in GPUS] == sorted(gpu.memory_gb for gpu in GPUS)
    assert len(set(NAMES)) == len(GPUS)
    expected = {"P100": {16}, "V100": {32}, "T4": {16}, "RTX 4090": {24}, "A100": {40, 80}, "L40": {48},
                "L40S": {48}, "H100": {80}, "H200": {141}, "B200": {180}}  # fmt: skip
    assert {name: {g.memory_gb for g in GPUS if g.name == name} for name in expected} == expected


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_a_size_fits_up_to_the_reserve_and_not_a_byte_beyond(gpu):
    assert gpu.usable == round(gpu.memory_gb * 1e9 * (1 - RESERVE))
    assert gpu in holding(gpu.usable)
    assert gpu not in holding(gpu.usable + 1)


def test_arithmetic_decides_who_can_train():
    generations = {least: {gpu.generation for gpu in holding(0, least)} for least in (ANY, BF16, FP8)}
    assert generations[ANY] == {"Pascal", "Volta", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"}
    assert generations[ANY] - generations[BF16] == {"Pascal", "Volta", "Turing"}
    assert generations[BF16] - generations[FP8] == {"Ampere"}


def test_what_no_gpu_holds_needs_several():
    assert holding(1e12) == ()
    assert how_many(1e12, GPUS[-1]) == 7  # 162e9 bytes usable each
    assert how_many(1, GPUS[-1]) == 1


def test_a_gpu_without_memory_is_refused():
    with pytest.raises(InputError, match="0 GB"):
        Gpu(name="none", memory_gb=0, capability=(1, 0), generation="none")
