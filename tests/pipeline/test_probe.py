"""The probe keeps a part of the simulation's logits, and gives it back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitfold.errors import VerificationError
from bitfold.pipeline.probe import PROBE_FILE, Probe, probe_bytes, probe_report


def logits(windows: int, length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(windows, length, vocabulary, generator=generator)


@pytest.mark.parametrize(
    ("length", "vocabulary"), [(5, 40), (16, 1024), (64, 1500), (17, 1025), (64, 5000)]
)
def test_keeps_ends_and_what_is_evenly_between(
    length: int, vocabulary: int, tmp_path: Path
) -> None:
    x = logits(2, length, vocabulary)
    probe = Probe.of(torch.zeros(2, length, dtype=torch.long), x, torch.bfloat16)
    assert len(probe.positions) == min(length, 16)
    assert len(probe.vocabulary) == min(vocabulary, 1024)
    for kept, extent in ((probe.positions, length), (probe.vocabulary, vocabulary)):
        assert (int(kept[0]), int(kept[-1])) == (0, extent - 1)
        steps = kept.diff()
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1
    for i, position in enumerate(probe.positions.tolist()):
        for j in (0, len(probe.vocabulary) // 2, -1):
            token = int(probe.vocabulary[j])
            assert probe.logits[1, i, j] == x[1, position, token]
    assert torch.equal(probe.pick(x), probe.logits)
    probe.save(tmp_path / PROBE_FILE)
    size = (tmp_path / PROBE_FILE).stat().st_size
    assert size <= 1.02 * probe_bytes(2, length, vocabulary) + 2000


def test_saved_and_loaded(tmp_path: Path) -> None:
    probe = Probe.of(torch.arange(20).view(2, 10), logits(2, 10, 50), torch.bfloat16)
    probe.save(tmp_path / PROBE_FILE)
    found = Probe.load(tmp_path / PROBE_FILE)
    assert found.dtype == "bfloat16"
    for name in ("tokens", "positions", "vocabulary", "logits"):
        assert torch.equal(getattr(found, name), getattr(probe, name))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_missing_or_damaged(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PROBE_FILE).write_bytes(content)
    with pytest.raises(VerificationError, match="missing or damaged"):
        Probe.load(tmp_path / PROBE_FILE)


def test_report_against_plain_loops() -> None:
    original, quantized = logits(2, 9, 30), logits(2, 9, 30) + 0.5 * logits(2, 9, 30, seed=1)
    found = probe_report(torch.zeros(2, 9, dtype=torch.long), quantized, original)

    def chances(x: torch.Tensor) -> np.ndarray:
        e = np.exp(x.double().numpy())
        return e / e.sum(-1, keepdims=True)

    p, q = chances(original), chances(quantized)
    divergences, agreements = [], []
    for window in range(2):
        for position in range(8):  # the last one predicts nothing
            pairs = zip(p[window, position], q[window, position], strict=True)
            divergences.append(sum(a * np.log(a / b) for a, b in pairs))
            agreements.append(p[window, position].argmax() == q[window, position].argmax())
    assert found["tokens"] == 16
    assert found["kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(np.mean(agreements))
