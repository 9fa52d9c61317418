"""Checkpoints in GPTQ's and AWQ's formats from an artifact: a directory that transformers, vLLM and others load."""

from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold.errors import ExportError
from bitfold.export.directory import appearing, bytes_of, write_directory
from bitfold.export.exported import Exported, Progress, half_scales, rounded_scales
from bitfold.export.gptq import to_awq, to_gptq, unsayable
from bitfold.export.model_directory import copy_probe
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.version import VERSION

__all__ = ["export_awq", "export_gptq"]

_LEFT_OUT = "the scheme's {} are left out: the format has weights alone"


def export_gptq(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact in GPTQ's format; see `_export`. Zero-points other than the middle of the grid need its second
    version (`gptq_v2`): the first has no place for the lowest."""
    return _export(model, out, progress, "gptq")


def export_awq(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact in AWQ's format (`gemm`); see `_export`."""
    return _export(model, out, progress, "awq")


def _export(model: StoredModel, out: Path, progress: Progress, method: str) -> Exported:
    """The directory appears whole or not at all.

    Raises ExportError for what the format cannot hold, naming the layer; OutputError where it cannot be written.
    """
    scheme = _one_scheme(model, method)
    worst = 0.0

    def pack(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        nonlocal worst
        tensors = _packed(layer, weight, method, scheme)
        worst = max(worst, half_scales(weight.scale)[1])
        return tensors

    config = model.config | {"quantization_config": _settings(scheme, method)}
    config.pop("attn_implementation", None)
    with appearing(out) as partial:
        types = write_directory(model, partial, pack, config, progress)
        copy_probe(model.checkpoint.path, partial)
    return Exported(out, method, bytes_of(out), types, tuple(_notes(model, worst)))


def _one_scheme(model: StoredModel, method: str) -> TensorScheme:
    """The scheme of all weights. Raises ExportError where there are several, or maps that run."""
    path = model.checkpoint.path
    model.refuse_running(method)
    schemes = {s.weight: name for name, s in model.schemes.items() if s.weight is not None}
    if not schemes:
        raise ExportError(
            f"{path} has no quantized weights: there is nothing for {method} to hold."
        )
    if len(schemes) > 1:
        one, other = list(schemes.values())[:2]
        raise ExportError(
            f"{one} and {other} have different schemes, and {method} is written with one for all layers: export "
            "mixed bits to another format."
        )
    return next(iter(schemes))


def _packed(
    layer: str, weight: QuantizedTensor, method: str, scheme: TensorScheme
) -> dict[str, Tensor]:
    if reason := unsayable(weight, method):
        raise ExportError(f"{layer} cannot be said in {method}: {reason}.")
    if method == "awq":
        return to_awq(layer, weight)
    return to_gptq(layer, weight, less_one=scheme.symmetric)


def _settings(scheme: TensorScheme, method: str) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    shared = {"quant_method": method, "bits": scheme.bits, "group_size": scheme.group_size or -1}
    if method == "awq":
        return shared | {"version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    return shared | {
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"bitfold:{VERSION}"]},
    }


def _notes(model: StoredModel, worst: float) -> list[str]:
    notes = []
    if any(scheme.activation is not None for scheme in model.schemes.values()):
        notes.append(_LEFT_OUT.format("activations"))
    if model.quantizes_heads:
        notes.append(_LEFT_OUT.format("queries, keys and values"))
    return notes + rounded_scales(worst)
