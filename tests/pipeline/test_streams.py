"""The activation streams start as the model's embedding, are kept verbatim, and move on block by block."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline import streams as module
from bitfold.pipeline.streams import Streams, advance, batches
from models_zoo import TOKENS, Zoo

CPU = torch.device("cpu")


def random_streams(dtype: torch.dtype) -> Streams:
    generator = torch.Generator().manual_seed(0)

    def stream() -> Tensor:
        return torch.randn(3, 5, 8, generator=generator).to(dtype)

    return Streams(stream(), stream(), stream(), stream())


@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("with_text", [True, False])
def test_start(
    with_text: bool, keep_original: bool, checkpoint: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 30)  # a window at a time
    skeleton = Skeleton(Checkpoint(checkpoint("opt-350m", torch.float32)))
    outer = skeleton.load_outer()
    with torch.no_grad():
        expected = skeleton.embed(outer, TOKENS)
        tokens = TOKENS if with_text else None
        found = Streams.start(skeleton, outer, tokens, TOKENS[:1], keep_original=keep_original)
    assert torch.equal(found.probe_original, expected[:1])
    assert torch.equal(found.probe_quantized, expected[:1])
    assert (found.quantized is not None) == with_text
    assert (found.original is not None) == (with_text and keep_original)
    if with_text:
        assert torch.equal(found.quantized, expected)
    # Moving one on leaves the others.
    found.probe_quantized.zero_()
    assert torch.equal(found.probe_original, expected[:1])
    if found.original is not None:
        found.quantized.zero_()
        assert torch.equal(found.original, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("left_out", [(), ("original",), ("original", "quantized")])
def test_save_and_restore_verbatim(
    left_out: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    streams = replace(random_streams(dtype), **dict.fromkeys(left_out))
    streams.probe_original[0, 0, :3] = torch.tensor([-0.0, 1e-40, torch.finfo(dtype).max])
    streams.save(tmp_path / "streams")
    found = Streams.restore(tmp_path / "streams")
    for name, value in vars(streams).items():
        other = getattr(found, name)
        assert (other is None) == (value is None)
        if value is not None:
            assert other.dtype == dtype
            assert torch.equal(value.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("windows", [1, 2, 7])
@pytest.mark.parametrize("batch_tokens", [1, 10, 11, 10**6])
def test_advance(windows: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", batch_tokens)
    stream = torch.arange(windows * 5 * 2.0).reshape(windows, 5, 2)
    before, sizes = stream.clone(), []

    def block(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return 2 * hidden + 1

    advance(stream, block, CPU)
    assert torch.equal(stream, 2 * before + 1)
    assert sum(sizes) == windows
    assert max(sizes) == min(windows, max(1, batch_tokens // 5))


def test_batches_are_views() -> None:
    stream = torch.zeros(4, 5, 2)
    for batch in batches(stream):
        batch += 1
    assert (stream == 1).all()
