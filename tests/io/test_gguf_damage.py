"""Claims: no damage to a GGUF makes reading it crash, hang or grow: it is read or refused in one sentence."""

import random
import re
import struct
import tracemalloc

import pytest
from quantized import save_quantized
from tiny import save_tiny

from fewbit.errors import InputError
from fewbit.format import FORMATS
from fewbit.io.gguf_file import read_container
from fewbit.io.gguf_write import write
from fewbit.io.skeleton import build_skeleton, parameter_map
from fewbit.io.source import open_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_quantized("llama", folder / "q", FORMATS["q4_1"])
    write(open_source(folder / "q"), folder / "m.gguf")
    return (folder / "m.gguf").read_bytes()


def read_all(path):
    """Everything that a user's command would ask of the file."""
    source = open_source(path)
    model = build_skeleton(source)
    parameter_map(source, model)
    source.tokenizer()
    source.read(source.tensors())
    for module in source.formats:
        source.read_qtensor(module)


def outcome(path, data):
    """What became of reading: the word "read" or the sentence of the refusal; its memory is bounded."""
    path.write_bytes(data)
    tracemalloc.start()
    said = "read"
    try:
        read_all(path)
    except InputError as error:
        said = str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32e6
    assert "\n" not in said
    return said


def mutations(data, header, count=50):
    """Cuts, flipped bits, and lengths and sizes that are huge, mostly in the header, where they do harm."""
    rng = random.Random(0)
    for i in range(count):
        out, at = bytearray(data), rng.randrange(4, header - 8)
        if i % 5 == 0:
            out = out[: rng.randrange(len(out))]
        elif i % 5 == 1:
            struct.pack_into("<Q", out, at, rng.choice([0, 2**31, 2**62, 2**64 - 1]))
        elif i % 5 == 2:
            struct.pack_into("<I", out, at, rng.choice([0, 8, 9, 255, 2**32 - 1]))
        elif i % 5 == 3:
            out[at] ^= 1 << rng.randrange(8)
        else:
            for _ in range(20):
                out[rng.randrange(header, len(out))] = rng.randrange(256)
        yield bytes(out)


def test_fifty_mutations(whole, tmp_path):
    path = tmp_path / "m.gguf"
    assert outcome(path, whole) == "read"
    header = read_container(path).header
    got = [outcome(path, data) for data in mutations(whole, header)]
    refused = [text for text in got if text != "read"]
    assert len(got) == 50
    assert len(refused) >= 15
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def entry(data, key, old, new):
    """The file with the value behind a metadata key changed."""
    at = data.index(key.encode()) + len(key)
    assert data[at : at + len(old)] == old, data[at : at + 16]
    return data[:at] + new + data[at + len(old) :]


def number(value):
    return struct.pack("<II", 4, value)  # uint32


@pytest.mark.parametrize(
    ("key", "old", "new", "said"),
    [
        ("llama.block_count", 2, 2**31, "says it has 2147483648 blocks and holds tensors for 2"),
        ("llama.embedding_length", 64, 2**30, "says it has 1073741824 columns and holds tensors for 64"),
        ("llama.attention.key_length", 16, 2**28, "query rows and holds tensors for 64"),
        ("llama.attention.head_count", 4, 0, "from which no configuration can be built|says it has 0"),
        ("llama.attention.head_count_kv", 2, 3, r"stores .*k_proj.weight with shape \[32, 64\]"),
    ],
)
def test_sizes_that_the_tensors_contradict(whole, tmp_path, key, old, new, said):
    """A model of the stated size would take all memory before a tensor is compared."""
    text = outcome(tmp_path / "m.gguf", entry(whole, key, number(old), number(new)))
    assert re.search(said, text), text


def test_hostile_headers(whole, tmp_path):
    """Nested arrays, huge counts, a name twice, an alignment of zero, rows that are no whole blocks."""

    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    def header(*, tensors=0, entries=1):
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)

    info = string("a") + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
    bad = {
        "nested": header() + string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000,
        "count": header() + string("k") + struct.pack("<IIQ", 9, 0, 2**62),
        "tensors": header(tensors=2**63, entries=0),
        "entries": header(entries=2**63),
        "string": header() + struct.pack("<Q", 2**63) + b"abc",
        "dimensions": header(tensors=1, entries=0) + string("a") + struct.pack("<I", 2**32 - 1),
        "twice": header(tensors=2, entries=0) + info + info + bytes(4096),
        "alignment": header(tensors=1) + string("general.alignment") + number(0) + info + bytes(4096),
    }
    for name, data in bad.items():
        assert "is cut short or damaged" in outcome(tmp_path / "m.gguf", data), name
    tiles = header(tensors=1, entries=0) + string("a") + struct.pack("<IQQIQ", 2, 33, 2, 2, 0) + bytes(4096)
    assert "which blocks of 32 do not tile" in outcome(tmp_path / "m.gguf", tiles)
    wide = header(tensors=1, entries=0) + string("a") + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0)
    assert "ends before its tensor a does" in outcome(tmp_path / "m.gguf", wide + bytes(4096))


def test_steps_that_are_nan_are_said(whole, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    stored = read_container(path).tensors["blk.0.ffn_up.weight"]
    broken = bytearray(whole)
    broken[stored.offset : stored.offset + 2] = b"\x00\x7e"
    text = outcome(path, bytes(broken))
    assert text.startswith("Tensor model.layers.0.mlp.up_proj.weight holds 1 values")


def test_a_float_file_is_no_quantized_source(tmp_path):
    save_tiny("llama", tmp_path / "f")
    write(open_source(tmp_path / "f"), tmp_path / "f.gguf")
    assert open_source(tmp_path / "f.gguf").formats == {}
    with pytest.raises(KeyError):
        open_source(tmp_path / "f.gguf").read_qtensor("model.layers.0.mlp.up_proj")
