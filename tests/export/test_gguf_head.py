"""The head of a GGUF file against the reader of the package gguf."""

import struct
from pathlib import Path

import numpy as np
import pytest

from bitfold.export.gguf_head import read_head
from bitfold.export.gguf_reading import open_gguf

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Every type of setting, and tensors of several types and dimensions."""
    out = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_custom_alignment(64)
    kinds = gguf.GGUFValueType
    numbers = {
        kinds.UINT8: 200, kinds.INT8: -100, kinds.UINT16: 60_000, kinds.INT16: -30_000,
        kinds.UINT32: 4_000_000_000, kinds.INT32: -2_000_000_000, kinds.FLOAT32: 0.1,
        kinds.BOOL: True, kinds.UINT64: 2**60, kinds.INT64: -(2**60), kinds.FLOAT64: 0.1,
    }  # fmt: skip
    for kind, value in numbers.items():
        writer.add_key_value(f"a.{kind.name}", value, kind)
    writer.add_string("a.text", "日本語 🙂")
    writer.add_array("a.texts", ["a", "", "\n"])
    writer.add_array("a.floats", [0.5, -0.25])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(12, dtype=np.float16).reshape(3, 4))
    writer.add_tensor("three", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    blocks = np.arange(4 * 36, dtype=np.uint8).reshape(4, 36)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_it_is_what_the_package_reads(file: Path) -> None:
    reader, found = gguf.GGUFReader(file), open_gguf(file)
    theirs = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert found.settings == theirs
    assert len(theirs) > 15
    assert list(found.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert ours.type == tensor.tensor_type.name
        assert ours.shape == tuple(reversed([int(size) for size in tensor.shape]))
        assert np.asarray(ours.data).tobytes() == np.asarray(tensor.data).tobytes()


def test_wherever_it_ends_it_is_said(file: Path) -> None:
    content = file.read_bytes()
    end = read_head(content).end
    for length in range(0, end - 64, 11):
        with pytest.raises(ValueError, match=r"ends within its head|begin with GGUF"):
            read_head(content[:length])


@pytest.mark.parametrize(
    ("place", "number", "sentence"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 2**60), "ends within|dimensions"),
        (16, struct.pack("<Q", 2**60), "ends within|type|decode"),
    ],
)
def test_numbers_that_cannot_be(file: Path, place: int, number: bytes, sentence: str) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + len(number)] = number
    with pytest.raises(ValueError, match=sentence):
        read_head(bytes(content))


def test_an_array_longer_than_the_file(file: Path) -> None:
    content = file.read_bytes()
    place = content.index(b"a.texts") + len(b"a.texts") + 8
    with pytest.raises(ValueError, match="ends within its head"):
        read_head(content[:place] + struct.pack("<Q", 2**61) + content[place + 8 :])
