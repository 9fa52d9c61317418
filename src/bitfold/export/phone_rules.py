"""What XNNPACK, the library of kernels that ExecuTorch and LiteRT run on a phone's processor, multiplies in integers.

It rounds the inputs of such a layer to 8 bits itself, each token in a range of its own with a zero-point (`qd8` in
XNNPACK's src/configs/gemm-config.c), and has weights of 8 bits with a scale for each row (`qc8w`), and of 4 bits with a
scale for each row (`qc4w`) or for groups of 32 inputs and multiples of that (`qb4w`). None has zero-points.
"""

from collections.abc import Iterator

import torch

from bitfold.errors import ExportError
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme

__all__ = [
    "block_of",
    "check_phone",
    "expected_inputs",
    "half_of",
    "input_notes",
    "unsuitable_input",
    "unsuitable_weight",
]

_INPUT_BITS = 8
_BLOCK = 32


def unsuitable_weight(scheme: TensorScheme) -> str | None:
    """Why XNNPACK has no kernel for a weight, with what to do; None where it has one."""
    if scheme.grid != "int" or scheme.kept:
        return "it multiplies integers alone: choose a scheme such as w4a8g32 or w8a8"
    if not scheme.symmetric:
        return "its weights have no zero-points: set weight.symmetric=true"
    if scheme.granularity != "group":
        return None
    if scheme.bits > 4:
        return (
            "its weights of more than 4 bits have a scale per row: set weight.granularity=channel"
        )
    if (scheme.group_size or 0) % _BLOCK:
        return f"its groups are multiples of {_BLOCK} inputs: set weight.group_size={_BLOCK}"
    return None


def unsuitable_input(scheme: TensorScheme | None) -> str | None:
    """Why inputs would be rounded otherwise than was asked, and not only more finely; None where they would not."""
    if scheme is None:
        return None
    same = scheme.grid == "int" and scheme.bits == _INPUT_BITS and not scheme.narrow
    if same and scheme.granularity == "token" and not scheme.clipped:
        return None
    return (
        "it rounds inputs to 8 bits, each token in its own range: choose a8 with activation.static=false and "
        "activation.clipped=false"
    )


def check_phone(model: StoredModel, engine: str) -> None:
    """Raises ExportError for the first layer that the engine would compute otherwise than was simulated, or not in
    integers."""
    for name, scheme in model.schemes.items():
        if scheme.weight is None:
            if scheme.activation is not None:
                raise ExportError(
                    f"{name} has quantized inputs and a weight that is not, for which {engine} has no kernel: quantize "
                    "both, or use another --to."
                )
            continue
        path = model.checkpoint.path
        why = unsuitable_weight(scheme.weight)
        if why is not None:
            raise ExportError(
                f"{name} of {path} has {scheme.weight.describe()} weights, for which {engine} has no kernel, for "
                f"{why}; or use another --to."
            )
        why = unsuitable_input(scheme.activation)
        if why is not None:
            assert scheme.activation is not None
            raise ExportError(
                f"{name} of {path} has {scheme.activation.describe()} inputs, which {engine} would round otherwise, "
                f"for {why}; or use another --to."
            )


def block_of(value: QuantizedTensor) -> int | None:
    """Inputs that share a scale; None where all of a row do."""
    groups = value.scale.shape[1]
    return None if groups == 1 else value.shape[1] // groups


def expected_inputs(model: StoredModel) -> bool:
    """Whether every quantized layer's inputs were simulated as XNNPACK rounds them: with zero-points."""
    kinds = {scheme.activation for scheme in model.schemes.values() if scheme.weight is not None}
    return all(kind is not None and not kind.symmetric for kind in kinds)


def input_notes(model: StoredModel, engine: str) -> Iterator[str]:
    """What the user should read of how inputs are rounded."""
    kinds = {scheme.activation for scheme in model.schemes.values() if scheme.weight is not None}
    if None in kinds:
        yield f"{engine} rounds the inputs of these layers to 8 bits, each token in its own range"
    if any(kind is not None and kind.symmetric for kind in kinds):
        yield (
            f"{engine} rounds inputs with zero-points, in steps that are no longer than the scheme's symmetric ones; "
            "with activation.symmetric=false they are the same"
        )


def half_of(scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Scales in bfloat16 or half precision as float32, and the largest change relative to one.

    Raises OverflowError for those that are out of its range.
    """
    exact = scale.float()
    half = exact.to(dtype).float()
    if not torch.isfinite(half).all() or (half == 0).logical_and(exact != 0).any():
        raise OverflowError("a scale is out of the range")
    tiny = torch.finfo(torch.float32).tiny
    return half, float(((half - exact).abs() / exact.abs().clamp(min=tiny)).max())
