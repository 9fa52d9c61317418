"""Checkpoints in GPTQ's and AWQ's formats from an artifact: a directory that transformers, vLLM and others load."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bitfold.errors import ExportError, OutputError
from bitfold.export.artifact import copy_companions, index_json, shard_name, tensor_sums
from bitfold.export.exported import Exported
from bitfold.export.gptq import to_awq, to_gptq, unsayable
from bitfold.export.reading import StoredModel
from bitfold.numerics import QuantizedTensor, TensorScheme
from bitfold.version import VERSION

__all__ = ["export_awq", "export_gptq"]

Progress = Callable[[int, int, str], None]
_LEFT_OUT = "the scheme's {} are left out: the format has weights alone"


def export_gptq(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact in GPTQ's format; see `_export`. Zero-points other than the middle of the grid need its second
    version (`gptq_v2`): the first has no place for the lowest."""
    return _export(model, out, progress, "gptq")


def export_awq(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact in AWQ's format (`gemm`); see `_export`."""
    return _export(model, out, progress, "awq")


def _export(model: StoredModel, out: Path, progress: Progress, method: str) -> Exported:
    """The directory appears whole or not at all. Tensors are written file by file, as the artifact has them.

    Raises ExportError for what the format cannot hold, naming the layer; OutputError where it cannot be written.
    """
    scheme = _one_scheme(model, method)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        shards, sums, types, worst = _write_shards(model, partial, progress, method, scheme)
        total = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        (partial / "model.safetensors.index.json").write_text(index_json(shards, total))
        (partial / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
        config = model.config | {"quantization_config": _settings(scheme, method)}
        config.pop("attn_implementation", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(model.checkpoint.path, partial)
        for name in ("verification.npz", "recipe.yaml", "provenance.json"):
            if (model.checkpoint.path / name).is_file():
                shutil.copyfile(model.checkpoint.path / name, partial / name)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error}): make room, or choose another -o."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(1, 1, "done")
    size = sum(file.stat().st_size for file in out.iterdir())
    return Exported(out, method, size, types, tuple(_notes(model, worst)))


def _one_scheme(model: StoredModel, method: str) -> TensorScheme:
    """The scheme of all weights. Raises ExportError where there are several, or maps that run."""
    path = model.checkpoint.path
    if model.runs:
        raise ExportError(
            f"{path} has maps that run at inference ({model.runs[0]}), which this format cannot say: quantize by a "
            "method that folds all of them (`bitfold recipes` says which)."
        )
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


def _write_shards(
    model: StoredModel, out: Path, progress: Progress, method: str, scheme: TensorScheme
) -> tuple[dict[str, list[str]], dict[str, str], dict[str, int], float]:
    """Tensor names by file, their sums, how many weights of each type there are, and the largest change of a scale."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in model.names:
        by_file[model.file_of(name)].append(name)
    shards: dict[str, list[str]] = {}
    sums: dict[str, str] = {}
    types: dict[str, int] = defaultdict(int)
    worst, done, count = 0.0, 0, sum(map(len, by_file.values()))
    for number, names in enumerate(by_file.values()):
        tensors: dict[str, Tensor] = {}
        for name in names:
            progress(done, count, name)
            done += 1
            value = model.read(name)
            if isinstance(value, QuantizedTensor):
                tensors |= _packed(name, value, method)
                types[f"{scheme.bits} bits"] += value.shape.numel()
                error = (
                    value.scale.half().float() - value.scale.float()
                ).abs() / value.scale.float()
                worst = max(worst, float(error.max()))
            else:
                tensors[name] = value
                types[str(value.dtype).removeprefix("torch.")] += value.numel()
        file = shard_name(number, len(by_file))
        save_file(tensors, out / file, metadata={"format": "pt"})
        shards[file] = list(tensors)
        sums |= tensor_sums(tensors)
    return shards, sums, dict(types), worst


def _packed(name: str, value: QuantizedTensor, method: str) -> dict[str, Tensor]:
    layer = name.removesuffix(".weight")
    if reason := unsayable(value, method):
        raise ExportError(f"{layer} cannot be said in {method}: {reason}.")
    if method == "awq":
        return to_awq(layer, value)
    return to_gptq(layer, value, less_one=value.scheme.symmetric)


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
    if worst:
        notes.append(f"scales are rounded to half precision, by at most {worst:.1e} of their size")
    return notes
