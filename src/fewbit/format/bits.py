"""Dense bit packing: fields of b bits, least significant first, as one stream per row.

Element c of a row occupies bits ``c*b .. c*b + b - 1`` of the row's stream, so fields may cross byte and word
borders (3 bits: 32 values in 3 words). Read as little-endian bytes or as little-endian int32 words it is the
same stream; a row is filled with zero bits up to a whole word. This is the layout of compressed-tensors'
``pack-quantized`` since 0.18 and of fewbit's own checkpoints.

Road not taken: padding odd widths to the next power of two (HQQ, bitsandbytes), which stores 3 bits as 3.2 or
4.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Little-endian weights of the bits in a byte.
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def row_bytes(columns: int, bits: int, word: int = 1) -> int:
    """Bytes of one packed row of ``columns`` fields of ``bits`` bits, filled to a multiple of ``word``
    bytes.
    """
    return -(-columns * bits // (8 * word)) * word


def pack(fields: Tensor, bits: int, word: int = 1) -> Tensor:
    """Fields [..., n] (any integer dtype, 0 <= u < 2**bits) -> uint8 [..., row_bytes(n, bits, word)].

    Contiguous, whatever the input's strides, so that words can be viewed as int32.
    """
    fields = fields.contiguous()
    n = fields.shape[-1]
    length = row_bytes(n, bits, word)
    if 8 % bits == 0 and n * bits % 8 == 0:
        u = fields.to(torch.uint8).unflatten(-1, (-1, 8 // bits))  # no field crosses a byte
        out = u[..., 0].clone()
        for i in range(1, 8 // bits):
            out |= u[..., i] << (i * bits)
        return _fill(out, length)
    if bits < 8:
        u = fields.to(torch.uint8)
        u = torch.nn.functional.pad(u, (0, -n % 8)).unflatten(-1, (-1, 8))  # 8 fields are ``bits`` bytes
        out = u.new_zeros(*u.shape[:-1], bits)
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            out[..., byte] |= u[..., i] << shift  # bits beyond the byte fall off
            if shift + bits > 8:
                out[..., byte + 1] |= u[..., i] >> (8 - shift)
        out = out.flatten(-2)[..., :length]
        # A row of a longer row keeps the longer stride, even where torch calls it contiguous.
        return _fill(out.clone(memory_format=torch.contiguous_format), length)
    if bits % 8 == 0:
        whole = fields.to(torch.int64)
        parts = [((whole >> (8 * i)) & 255).to(torch.uint8) for i in range(bits // 8)]
        return _fill(torch.stack(parts, -1).flatten(-2), length)
    shifts = torch.arange(bits, device=fields.device)
    stream = ((fields.to(torch.int64).unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2)
    missing = -stream.shape[-1] % 8
    stream = torch.nn.functional.pad(stream, (0, missing)).unflatten(-1, (-1, 8))
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=fields.device)
    return _fill((stream * powers).sum(-1, dtype=torch.uint8), length)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of ``pack``: uint8 [..., bytes] -> fields [..., columns], uint8 up to 8 bits and int64
    above.
    """
    if bits == 8:
        return packed[..., :columns]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :columns]
    if bits < 8:
        groups = -(-columns // 8)
        runs = _fill(packed[..., : groups * bits], groups * bits).unflatten(-1, (groups, bits))
        out = runs.new_empty(*runs.shape[:-1], 8)
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            u = runs[..., byte] >> shift
            if shift + bits > 8:
                u = u | (runs[..., byte + 1] << (8 - shift))
            out[..., i] = u & ((1 << bits) - 1)
        return out.flatten(-2)[..., :columns]
    if bits % 8 == 0:
        parts = packed[..., : columns * bits // 8].unflatten(-1, (columns, bits // 8))
        out = parts[..., 0].to(torch.int64)
        for i in range(1, bits // 8):
            out |= parts[..., i].to(torch.int64) << (8 * i)
        return out
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (
        ((packed.unsqueeze(-1) >> shifts) & 1)
        .flatten(-2)[..., : columns * bits]
        .unflatten(-1, (columns, bits))
    )
    weights = 1 << torch.arange(bits, device=packed.device)
    return (stream.to(torch.int64) * weights).sum(-1)


def _fill(packed: Tensor, length: int) -> Tensor:
    """Zero bytes up to ``length``."""
    return torch.nn.functional.pad(packed, (0, length - packed.shape[-1]))
