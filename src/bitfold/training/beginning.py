"""What quantization-aware training of a language model begins with: PTQ's codes, windows that it writes itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitfold.data.data_free import generated_windows
from bitfold.errors import RecipeError
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor
from bitfold.pipeline.quantize import quantize
from bitfold.pipeline.workdir import finished_request
from bitfold.recipe import Recipe
from bitfold.training.estimators import LsqWeight
from bitfold.training.loop import Progress
from bitfold.training.prepare import prepared_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["begin_from", "rounded_before", "with_written"]

_SAMPLES = 128


def rounded_before(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    rows: Tensor,
    device: torch.device,
    progress: Progress | None,
) -> Path:
    """The model quantized by PTQ on the first rows [n, tokens] of the text, at `out`.

    What is there from a killed run is taken.
    """
    if finished_request(out) is None:
        tokens = out.with_suffix(".npy")
        np.save(tokens, rows[:_SAMPLES].numpy())
        quantize(
            model, out, recipe=recipe, calibration=tokens, samples=min(_SAMPLES, len(rows)),
            sequence_length=rows.shape[1], device=device, overwrite=True, progress=progress,
        )  # fmt: skip
    return out


@torch.no_grad()
def begin_from(model: PreTrainedModel, artifact: Path) -> None:
    """Give the layers in training by LSQ the scales, zero-points and codes of an artifact; weights move as little as
    that takes.

    Raises RecipeError where the artifact's method changed more than it rounded: its codes are of other weights.
    """
    stored, layers = read_model(artifact), prepared_layers(model)
    parameters = dict(model.named_parameters())
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    for name in [name for name in stored.names if name in parameters and name not in weights]:
        if not _same(stored.read(name), parameters[name]):
            raise _not_rounded(name)
    for name in [name for name in stored.names if name in weights]:
        start, layer = stored.read(name), weights[name]
        estimator = layer.weights
        assert isinstance(estimator, LsqWeight)
        if not isinstance(start, QuantizedTensor) or start.scheme != estimator.scheme:
            raise _not_rounded(name)
        start = _on(start, layer.weight.device)
        begun = LsqWeight(layer.weight, estimator.scheme, estimator.storage, start=start)
        estimator.load_state_dict(begun.state_dict())
        layer.weight.copy_(estimator.settled(layer.weight, start))


def _on(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """Of the grids that are trained: codes, scales and zero-points."""
    zero = None if tensor.zero is None else tensor.zero.to(device)
    return replace(tensor, codes=tensor.codes.to(device), scale=tensor.scale.to(device), zero=zero)


def _not_rounded(name: str) -> RecipeError:
    return RecipeError(
        f"What training begins with did more than round, as {name} shows: choose a --start that only rounds, gptq say."
    )


def _same(one: QuantizedTensor | Tensor, parameter: Tensor) -> bool:
    return isinstance(one, Tensor) and torch.equal(one.to(parameter), parameter)


def with_written(
    rows: Tensor, teacher: PreTrainedModel, count: int, seed: int, progress: Progress | None
) -> Tensor:
    """Rows [n, tokens], and as many, or more, of `count` different ones that the teacher writes itself (LLM-QAT, arXiv
    2305.17888): a text is of one kind, and what the model knows of others would be lost on it."""
    told = progress or (lambda done, total, what: None)
    written = generated_windows(
        teacher,
        count,
        rows.shape[1],
        seed,
        lambda done, total: told(done, total, "writing windows"),
    ).tokens.to(rows)
    return torch.cat([rows, *[written] * -(-len(rows) // count)])
