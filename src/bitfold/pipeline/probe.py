"""The probe: a few windows of tokens whose simulated logits travel with the artifact, so that anyone can verify it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import VerificationError
from bitfold.evaluate.statistics import mean_and_error, token_statistics

__all__ = ["PROBE_FILE", "Probe", "probe_report"]

PROBE_FILE = "verification.npz"
# Logits of a large vocabulary are big: about 8 MB of them are kept.
_LARGEST = 2_000_000


@dataclass(frozen=True)
class Probe:
    """tokens [windows, length] int64; logits [positions, vocabulary] float32 of the simulation at `positions` of each
    window, window after window; dtype in which the simulation ran."""

    tokens: Tensor
    positions: Tensor
    logits: Tensor
    dtype: str

    @classmethod
    def of(cls, tokens: Tensor, logits: Tensor, dtype: torch.dtype) -> "Probe":
        """Keep what fits of the simulation's logits [windows, length, vocabulary]."""
        count = max(1, min(tokens.shape[1], _LARGEST // (logits.shape[-1] * tokens.shape[0])))
        positions = torch.linspace(0, tokens.shape[1] - 1, count).round().long()
        return cls(tokens, positions, cls.pick(logits, positions), str(dtype).removeprefix("torch."))

    @staticmethod
    def pick(logits: Tensor, positions: Tensor) -> Tensor:
        """The logits at the kept positions."""
        return logits[:, positions].flatten(0, 1).float().cpu()

    def save(self, path: Path) -> None:
        """Write `verification.npz` (no `.safetensors`, which engines would take for weights)."""
        with path.open("wb") as stream:
            np.savez(
                stream,
                tokens=self.tokens.numpy(),
                positions=self.positions.numpy(),
                logits=self.logits.numpy(),
                dtype=np.array(self.dtype),
            )

    @classmethod
    def load(cls, path: Path) -> "Probe":
        """Read it back; raises VerificationError when it is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(
                    torch.from_numpy(stored["tokens"]),
                    torch.from_numpy(stored["positions"]),
                    torch.from_numpy(stored["logits"]),
                    str(stored["dtype"]),
                )
        except Exception as error:
            raise VerificationError(
                f"{path} is missing or damaged ({error}): the artifact cannot be verified; quantize again."
            ) from error


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
    }
