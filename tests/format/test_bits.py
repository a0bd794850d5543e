"""Packing: any width round-trips, the stream is dense and little-endian, rows end on the border asked for."""

import pytest
import torch

from fewbit.format.bits import pack, row_bytes, unpack

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 19, 32)
COLUMNS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 65)


def fields(bits: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int64)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("word", [1, 4])
def test_unpack_inverts_pack_for_every_width_and_length(bits, word):
    for n in COLUMNS:
        u = fields(bits, (3, n))
        packed = pack(u, bits, word)
        assert packed.dtype == torch.uint8
        assert packed.shape == (3, row_bytes(n, bits, word))
        assert torch.equal(unpack(packed, bits, n).long(), u)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stream_is_the_fields_as_one_little_endian_number(bits):
    """Element c occupies bits c*b .. c*b+b-1: the row, read as one integer, is the sum of u_c * 2**(c*b)."""
    for n in COLUMNS:
        u = fields(bits, (n,), seed=n)
        number = sum(int(v) << (c * bits) for c, v in enumerate(u))
        for word in (1, 4):
            packed = pack(u, bits, word)
            assert int.from_bytes(bytes(packed.tolist()), "little") == number


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_fields_survive(bits):
    for value in (0, 1, 2**bits - 1):
        u = torch.full((2, 33), value, dtype=torch.int64)
        assert torch.equal(unpack(pack(u, bits), bits, 33).long(), u)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_the_same(dtype):
    for bits in (1, 3, 4, 5, 8):
        u = fields(bits, (2, 40))
        assert torch.equal(pack(u.to(dtype), bits, 4), pack(u, bits, 4))


def test_row_bytes_counts_exact_bits():
    assert row_bytes(32, 3) == 12
    assert row_bytes(33, 3) == 13
    assert row_bytes(33, 3, word=4) == 16
    assert row_bytes(0, 4) == 0


def test_leading_axes_are_kept_and_the_input_is_not_changed():
    for bits in (2, 3, 8, 16):
        u = fields(bits, (2, 3, 16))
        before = u.clone()
        packed = pack(u, bits)
        assert packed.shape[:2] == (2, 3)
        assert torch.equal(unpack(packed, bits, 16).long(), u)
        assert torch.equal(u, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_transposed_input_packs_like_its_copy_and_words_can_be_viewed(bits):
    u = fields(bits, (33, 5)).T
    packed = pack(u, bits, word=4)
    assert torch.equal(packed, pack(u.clone(memory_format=torch.contiguous_format), bits, word=4))
    assert packed.view(torch.int32).shape[0] == 5
    assert pack(fields(bits, (1, 5)), bits, word=4).view(torch.int32).shape[0] == 1
