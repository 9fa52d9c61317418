"""What a user may ask of the training of adapters and biases, and what comes out of it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bitfold.errors import RecipeError
from bitfold.training.loop import LoopOptions

__all__ = ["AdapterOptions", "AdapterResult"]

_LORA_RATE, _BIAS_RATE = 2e-4, 1e-3
_WIDTH = 4096
_LONGEST = 256


@dataclass(frozen=True)
class AdapterOptions:
    """steps, batch (windows in a step), accumulate, warmup, decay, clip, seed, precision: as in `LoopOptions`.

    rate: of LoRA's matrices; None: 2e-4, QLoRA's for LLaMA-7B, times 4096 / the model's width, since the best rate
    falls with the width (arXiv 2203.03466). bias_rate: of biases; None: 1e-3 in the same way. sequence_length: tokens
    of a window; None: the model's, at most 256. hold_back: the share of the training windows, at most 16 of them, that
    the best state is chosen by; 0 keeps the last one. evaluate_windows: only the first so many of the evaluation text.

    rank, alpha, dropout: of LoRA, y = Wx + alpha/rank · BA · dropout(x) (arXiv 2106.09685). targets: the last parts of
    the names of the layers that have one; empty: all linear layers but the head. bitfit: biases beside it.

    scheme: in which an original is rounded as it is loaded; None: nf4 in groups of 64; w16a16 leaves it. double:
    whether its scales are quantized too. teacher_weight: of the KL to a teacher, where there is one, beside the text's
    own likelihood.

    Raises RecipeError for what cannot be.
    """

    steps: int = 100
    batch: int = 4
    accumulate: int = 1
    rate: float | None = None
    bias_rate: float | None = None
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    sequence_length: int | None = None
    hold_back: float = 0.05
    evaluate_windows: int | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    bitfit: bool = False
    scheme: str | None = None
    double: bool = True
    teacher_weight: float = 0.5
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be, by name."""
        if self.rank < 1:
            raise RecipeError(f"A rank of {self.rank} trains nothing: give at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise RecipeError(
                f"alpha={self.alpha:g} keeps the adapter at zero: give a number above 0"
            )
        for name in ("dropout", "hold_back"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"{name} is a share, from 0 to below 1, not {getattr(self, name)}"
                )
        if not 0 <= self.teacher_weight <= 1:
            raise RecipeError(f"teacher_weight is a share, from 0 to 1, not {self.teacher_weight}")
        if self.bias_rate is not None and not self.bias_rate > 0:
            raise RecipeError(f"A rate of {self.bias_rate} trains nothing: give a number above 0")
        if self.evaluate_windows is not None and self.evaluate_windows < 1:
            raise RecipeError("evaluate_windows must be at least 1: ask for more")
        self.loop(_WIDTH)

    def rates(self, width: int) -> tuple[float, float]:
        """Of LoRA's matrices, and of biases, for a model of this width."""
        lora = _LORA_RATE * _WIDTH / width if self.rate is None else self.rate
        bias = _BIAS_RATE * _WIDTH / width if self.bias_rate is None else self.bias_rate
        return lora, bias

    def length(self, default: int) -> int:
        """Tokens of a window, where a model's default is known."""
        return min(default, _LONGEST) if self.sequence_length is None else self.sequence_length

    def loop(self, width: int) -> LoopOptions:
        """Of the training loop, for a model of this width."""
        return LoopOptions(
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            rate=self.rates(width)[0],
            warmup=self.warmup,
            decay=self.decay,
            clip=self.clip,
            seed=self.seed,
            keep="best" if self.hold_back else "last",
            precision=self.precision,
        )


@dataclass(frozen=True)
class AdapterResult:
    """What a training made, and what it took.

    kinds: `lora`, `bitfit` or both. trained: parameters; share: of them in all parameters of the base, counted as if
    it were not packed. perplexity_before, _after: on the evaluation text, None without one. held_back_before, _after:
    loss in nats on the training windows that were held back, None without. kept: the step whose state was kept.
    resumed: the step that an earlier, killed run had reached. base_bytes: what the base's packed layers hold in memory.
    size_bytes: of the directory. peak_rss_mb: of the whole process up to the end of training. seconds: of training
    alone.
    """

    out: Path
    base: str
    kinds: tuple[str, ...]
    trained: int
    share: float
    steps: int
    kept: int
    resumed: int
    first_loss: float | None
    last_loss: float | None
    held_back_before: float | None
    held_back_after: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    base_bytes: int
    size_bytes: int
    peak_rss_mb: float
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; figures that are not finite are null."""
        found = asdict(self) | {"out": str(self.out), "kinds": list(self.kinds)}
        found["notes"] = list(self.notes)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }
