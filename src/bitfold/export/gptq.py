"""The tensors of GPTQ's and AWQ's checkpoints, as GPTQModel, vLLM and ONNX Runtime GenAI read them, and the way back.

GPTQ (GPTQModel's BaseQuantLinear): `qweight` packed along the inputs, `qzeros` along the outputs, bits without gaps; in
its first version zero-points are stored less one. AWQ (AutoAWQ's WQLinear_GEMM): 4 bits, both packed along the outputs,
the eight of a word in the order 0, 2, 4, 6, 1, 3, 5, 7. Scales are half precision.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export.exported import half_scales
from bitfold.numerics import QuantizedTensor, TensorScheme, pack, unpack

__all__ = [
    "from_awq",
    "from_gptq",
    "read_packed",
    "to_awq",
    "to_gptq",
    "unsayable",
    "unsayable_scheme",
]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unsayable(tensor: QuantizedTensor, method: str) -> str | None:
    """Why `gptq` or `awq` cannot hold a weight as it is; None where it can."""
    if reason := unsayable_scheme(tensor.scheme, tuple(tensor.shape), method):
        return reason
    try:
        half_scales(tensor.scale)
    except OverflowError as error:
        return str(error)
    return None


def unsayable_scheme(scheme: TensorScheme, shape: tuple[int, ...], method: str) -> str | None:
    """The same of any weight [out, in] of a scheme."""
    known = (4,) if method == "awq" else (2, 3, 4, 8)
    if scheme.grid != "int" or scheme.bits not in known or scheme.kept:
        bits = " or ".join(map(str, known))
        return f"it has integers of {bits} bits, not {scheme.grid} of {scheme.bits}"
    if scheme.granularity == "tensor":
        return "it has a scale for each channel or group, not one for the tensor"
    rows, columns = shape
    if rows % 32 or columns % 32:
        return f"it packs both sides in words, and {rows} by {columns} does not fill them"
    return None


def to_gptq(name: str, tensor: QuantizedTensor, *, less_one: bool) -> dict[str, Tensor]:
    """Of one weight [out, in], b bits.

    qweight: [in·b/32, out] int32. qzeros: [groups, out·b/32] int32, less one (modulo 2^b) in the first version.
    scales: [groups, out] float16. g_idx: [in] int32, the group of each input.
    """
    scheme, columns = tensor.scheme, tensor.shape[1]
    zeros = _zeros(tensor)
    if less_one:
        zeros = _wrapped(zeros.to(torch.int16) - 1, scheme.bits)
    groups = tensor.scale.shape[1]
    tensors = {
        "qweight": pack(tensor.codes, scheme.bits).T,
        "qzeros": pack(zeros.T.contiguous(), scheme.bits),
        "scales": tensor.scale.half().T,
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    return {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}


def from_gptq(
    name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme, *, less_one: bool
) -> QuantizedTensor:
    """The way back.

    Raises ValueError where groups are scattered over the inputs, or zero-points are not those of a symmetric grid.
    """
    bits = scheme.bits
    scales = tensors[f"{name}.scales"].T.contiguous()
    qweight = tensors[f"{name}.qweight"].T.contiguous()
    columns = qweight.shape[1] * 32 // bits
    groups = scales.shape[1]
    index = tensors.get(f"{name}.g_idx")
    if index is not None and not torch.equal(
        index.long(), torch.arange(columns) // (columns // groups)
    ):
        raise ValueError("groups in the order of activations lie scattered over the columns")
    zeros = unpack(tensors[f"{name}.qzeros"], bits, scales.shape[0]).T.contiguous()
    if less_one:
        zeros = _wrapped(zeros.to(torch.int16) + 1, bits)
    return _weight(unpack(qweight, bits, columns), scales, zeros, scheme)


def to_awq(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Of one weight [out, in] of 4 bits: qweight [in, out/8] and qzeros [groups, out/8] int32, scales [groups, out]
    float16."""
    tensors = {
        "qweight": pack(_shuffled(tensor.codes.T), 4),
        "qzeros": pack(_shuffled(_zeros(tensor).T), 4),
        "scales": tensor.scale.half().T.contiguous(),
    }
    return {f"{name}.{key}": value for key, value in tensors.items()}


def from_awq(name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> QuantizedTensor:
    """The way back."""
    scales = tensors[f"{name}.scales"].T.contiguous()
    rows = scales.shape[0]
    codes = _unshuffled(unpack(tensors[f"{name}.qweight"], 4, rows)).T.contiguous()
    zeros = _unshuffled(unpack(tensors[f"{name}.qzeros"], 4, rows)).T.contiguous()
    return _weight(codes, scales, zeros, scheme)


def read_packed(
    settings: Mapping[str, Any], path: Path
) -> tuple[TensorScheme, Callable[[str, Mapping[str, Tensor], TensorScheme], QuantizedTensor]]:
    """The scheme of all layers by a `quantization_config` of either method, and what makes a layer's tensors a weight.

    Raises CheckpointError for settings that bitfold cannot read.
    """
    method, version = settings["quant_method"], settings.get("checkpoint_format", "gptq")
    if settings.get("dynamic"):
        raise CheckpointError(
            f"{path} has settings of its own for some layers (dynamic), which bitfold does not read."
        )
    known = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    found = version if method == "gptq" else settings.get("version", "gemm")
    if found not in known:
        raise CheckpointError(
            f"{path} is in the version '{found}' of {method}, and bitfold reads {' and '.join(known)}."
        )
    size = settings.get("group_size", -1)
    try:
        scheme = TensorScheme(
            bits=settings.get("bits", settings.get("w_bit")),
            symmetric=method == "gptq" and bool(settings.get("sym")),
            granularity="group" if size and size > 0 else "channel",
            group_size=size if size and size > 0 else None,
        )
    except ValueError as error:
        raise CheckpointError(
            f"The quantization_config of {path} says what bitfold cannot read ({' '.join(str(error).split())})."
        ) from error
    if method == "awq":
        return scheme, from_awq
    return scheme, partial(from_gptq, less_one=version == "gptq")


def _zeros(tensor: QuantizedTensor) -> Tensor:
    """Zero-points [out, groups] int8."""
    if tensor.zero is not None:
        return tensor.zero
    return torch.zeros(tensor.scale.shape, dtype=torch.int8)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor, scheme: TensorScheme) -> QuantizedTensor:
    if not scheme.symmetric:
        return QuantizedTensor(codes, scales, zeros, scheme)
    if zeros.any():
        raise ValueError(
            "zero-points that are not in the middle of the grid, in a symmetric format"
        )
    return QuantizedTensor(codes, scales, None, scheme)


def _wrapped(values: Tensor, bits: int) -> Tensor:
    """Signed integers of b bits, beginning again at the other end."""
    half = 1 << (bits - 1)
    return ((values + half).remainder(1 << bits) - half).to(torch.int8)


def _shuffled(codes: Tensor) -> Tensor:
    """[rows, columns], each eight columns in AWQ's order."""
    return codes.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1).contiguous()


def _unshuffled(codes: Tensor) -> Tensor:
    back = [_AWQ_ORDER.index(place) for place in range(8)]
    return codes.unflatten(1, (-1, 8))[..., back].flatten(1)
