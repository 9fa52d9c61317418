"""The probe: a few windows of tokens whose simulated logits travel with the artifact, so that anyone can verify it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import VerificationError
from bitfold.evaluate.statistics import mean_and_error, token_statistics

__all__ = ["PROBE_FILE", "Probe", "probe_bytes", "probe_report"]

PROBE_FILE = "verification.npz"
# What is kept: logits at so many positions of each window, for so many tokens of the vocabulary.
_POSITIONS = 16
_VOCABULARY = 1024


@dataclass(frozen=True)
class Probe:
    """tokens [windows, length] int64 as given to the model; logits [windows, positions, vocabulary] float32 of the
    simulation at some positions and for some tokens, evenly spread; dtype in which the simulation ran."""

    tokens: Tensor
    positions: Tensor
    vocabulary: Tensor
    logits: Tensor
    dtype: str

    @classmethod
    def of(cls, tokens: Tensor, logits: Tensor, dtype: torch.dtype) -> "Probe":
        """Keep a part of the simulation's logits [windows, length, vocabulary]."""
        positions = _spread(logits.shape[1], _POSITIONS)
        vocabulary = _spread(logits.shape[2], _VOCABULARY)
        kept = logits.cpu()[:, positions][..., vocabulary].float()
        return cls(tokens, positions, vocabulary, kept, str(dtype).removeprefix("torch."))

    def pick(self, logits: Tensor) -> Tensor:
        """The part of a model's logits [windows, length, vocabulary] that was kept of the simulation's."""
        return logits.cpu()[:, self.positions][..., self.vocabulary].float()

    def save(self, path: Path) -> None:
        """Write `verification.npz` (no `.safetensors`, which engines would take for weights)."""
        with path.open("wb") as stream:
            np.savez(
                stream,
                tokens=self.tokens.numpy(),
                positions=self.positions.numpy(),
                vocabulary=self.vocabulary.numpy(),
                logits=self.logits.numpy(),
                dtype=np.array(self.dtype),
            )

    @classmethod
    def load(cls, path: Path | BinaryIO) -> "Probe":
        """Read it back, from a file or its bytes; raises VerificationError when it is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(
                    torch.from_numpy(stored["tokens"]),
                    torch.from_numpy(stored["positions"]),
                    torch.from_numpy(stored["vocabulary"]),
                    torch.from_numpy(stored["logits"]),
                    str(stored["dtype"]),
                )
        except Exception as error:  # zip, NumPy and the operating system each have their own
            reason = getattr(error, "strerror", None) or error
            raise VerificationError(
                f"{path} is missing or damaged ({reason}): the artifact cannot be verified; quantize again."
            ) from error


def _spread(extent: int, count: int) -> Tensor:
    """At most `count` indices spread evenly over 0 … extent − 1, both ends included."""
    return torch.linspace(0, extent - 1, min(extent, count)).round().long()


def probe_bytes(windows: int, length: int, vocabulary: int) -> int:
    """About the size of the file that `Probe.save` writes."""
    kept = min(vocabulary, _VOCABULARY)
    logits = windows * min(length, _POSITIONS) * kept
    return 4 * logits + 8 * (windows * length + kept) + 1500


def probe_report(tokens: Tensor, logits: Tensor, original: Tensor) -> dict[str, Any]:
    """Mean KL and top-token agreement on the probe, from logits [windows, length, vocabulary] of both models."""
    vocabulary = logits.shape[-1]
    statistics = token_statistics(
        logits[:, :-1].reshape(-1, vocabulary),
        original[:, :-1].reshape(-1, vocabulary),
        tokens[:, 1:].reshape(-1).to(logits.device),
    )
    assert statistics.kl is not None
    assert statistics.agree is not None
    return {
        "tokens": statistics.nll.numel(),
        "kl_mean": mean_and_error(statistics.kl.unsqueeze(0))[0],
        "top1_agreement": mean_and_error(statistics.agree.unsqueeze(0))[0],
        "kl_by_window": statistics.kl.unflatten(0, (len(tokens), -1)).mean(dim=1).tolist(),
    }
