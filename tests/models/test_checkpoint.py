"""A checkpoint is read lazily, by name, from one file or many; bad inputs are in tests/e2e."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitfold.errors import CheckpointError
from bitfold.models import checkpoint as module
from bitfold.models.checkpoint import Checkpoint, tensor_bytes
from models_zoo import Zoo

BFLOAT16 = torch.bfloat16


@pytest.fixture
def sharded(checkpoint: Zoo, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama", BFLOAT16), dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def plain(path: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_headers(checkpoint: Zoo) -> None:
    path = checkpoint("qwen2", BFLOAT16)
    found, tensors = Checkpoint(path), plain(path)
    assert found.config["model_type"] == "qwen2"
    assert found.tensors.keys() == tensors.keys()
    for name, info in found.tensors.items():
        assert (info.file, info.dtype) == ("model.safetensors", BFLOAT16)
        assert info.shape == tuple(tensors[name].shape)
        assert info.nbytes == 2 * math.prod(info.shape)
    assert found.nbytes == tensor_bytes(tensors)
    assert found.files == [path / "model.safetensors"]


def test_shards(sharded: Path, checkpoint: Zoo) -> None:
    one, many = Checkpoint(checkpoint("llama", BFLOAT16)), Checkpoint(sharded)
    assert len(many.files) > 2
    assert many.tensors.keys() == one.tensors.keys()
    names = list(one.tensors)[::-1]
    left, right = one.read(names), many.read(names)
    assert list(left) == list(right) == names
    assert all(torch.equal(left[name], right[name]) for name in names)


def test_only_what_is_asked_for_is_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, got = [], []

    class Recording:
        def __init__(self, file: Path, **options: Any) -> None:
            opened.append(Path(file).name)
            self.inner = original(file, **options)

        def __enter__(self) -> "Recording":
            self.handle = self.inner.__enter__()
            return self

        def __exit__(self, *exception: object) -> None:
            self.inner.__exit__(*exception)

        def get_tensor(self, name: str) -> Tensor:
            got.append(name)
            return self.handle.get_tensor(name)

    found = Checkpoint(sharded)
    original = module.safe_open
    monkeypatch.setattr(module, "safe_open", Recording)
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    found.read(names)
    assert got == names
    assert sorted(opened) == sorted({found.tensors[name].file for name in names})


def test_dtypes(tmp_path: Path, checkpoint: Zoo) -> None:
    path = tmp_path / "mixed"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {"a": torch.randn(3, dtype=torch.float16), "b": torch.arange(4), "c": torch.ones(2)}
    save_file(tensors, path / "model.safetensors")
    as_stored = Checkpoint(path).read(tensors)
    assert all(torch.equal(as_stored[name], tensor) for name, tensor in tensors.items())
    assert [t.dtype for t in as_stored.values()] == [t.dtype for t in tensors.values()]
    converted = Checkpoint(path).read(tensors, dtype=torch.float32)
    assert [t.dtype for t in converted.values()] == [torch.float32, torch.int64, torch.float32]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {"good": torch.ones(4, 4), "bad": torch.ones(4, 4)}
    tensors["bad"][2, 1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).read(["good"])
    with pytest.raises(
        CheckpointError, match=r"bad in .*model.safetensors is NaN or infinite in 1 of 16"
    ):
        Checkpoint(tmp_path).read(["good", "bad"])


def test_large_finite_values_are_no_infinities(tmp_path: Path) -> None:
    """Their sum is infinite, they are not."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": torch.full((4,), 3e38)}, tmp_path / "model.safetensors")
    assert torch.isfinite(Checkpoint(tmp_path).read(["x"])["x"]).all()


def test_fingerprint(sharded: Path) -> None:
    before = Checkpoint(sharded).fingerprint()
    assert Checkpoint(sharded).fingerprint() == before
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert Checkpoint(sharded).fingerprint() != before
