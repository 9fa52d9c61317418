"""GGUF, the file of llama.cpp, from an artifact: the integers, scales and zero-points as they are.

What a block type of ggml cannot hold as it is, is written in the floating point dtype of the artifact and said to be.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.errors import ExportError, OutputError
from bitfold.export.artifact import tensor_sum
from bitfold.export.exported import Exported, Progress, rounded_scales, unstored
from bitfold.export.ggml_blocks import smallest, store
from bitfold.export.gguf_model import (
    ROPE_FACTORS,
    Dialect,
    dialect_of,
    gguf_package,
    has_factors,
    llama3_factors,
    row_order,
    settings,
    with_rows,
    without_offset,
)
from bitfold.export.gguf_tokenizer import add_tokenizer
from bitfold.export.reading import StoredModel
from bitfold.models.config import read_config
from bitfold.models.family import head_counts

__all__ = ["export_gguf"]

_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# llama.cpp's name for what most of a file is in, by its number (`enum llama_ftype`).
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 11},
    **{"Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "MXFP4": 38},
}


@dataclass(frozen=True)
class _Part:
    """A tensor as it lies in the file: its type and bytes [rows, bytes of a row]. note: why it is not in few bits;
    scale_error: the largest change of a scale, relative to it; change: of a value, relative to the largest."""

    name: str
    type: str
    data: NDArray[Any]
    weights: int
    note: str | None = None
    scale_error: float = 0.0
    change: float = 0.0


def export_gguf(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact as one GGUF file; it appears whole or not at all.

    Tensors are gone through twice, one at a time: the file's head says how long each is, and its sum.
    Raises ExportError for what llama.cpp would run differently, OutputError where the file cannot be written.
    """
    gguf = gguf_package()
    model.refuse_running("llama.cpp")
    config = read_config(model.checkpoint)
    dialect = dialect_of(model.checkpoint.config["model_type"])
    names = _names(model, dialect, gguf, config)
    partial = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(partial, dialect.architecture)
    try:
        spoken = _add_head(writer, model, config, dialect)
        sums, types, notes = {}, Counter[str](), []
        worst = change = 0.0
        for done, (name, place) in enumerate(names.items()):
            progress(done, 2 * len(names), name)
            part = _part(model, name, place, dialect, config)
            kind = gguf.GGMLQuantizationType[part.type]
            writer.add_tensor_info(
                place, part.data.shape, np.dtype(np.uint8), part.data.nbytes, kind
            )
            sums[place] = tensor_sum(torch.from_numpy(part.data))
            types[part.type] += part.weights
            worst = max(worst, part.scale_error)
            notes += [part.note] if part.note else []
            change = max(change, part.change)
        writer.add_file_type(_FILE_TYPES[_most(types)])
        writer.add_array("bitfold.sums", [f"{place} {found}" for place, found in sums.items()])
        _add_probe(writer, model.checkpoint.path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, place) in enumerate(names.items()):
            progress(len(names) + done, 2 * len(names), name)
            writer.write_tensor_data(_part(model, name, place, dialect, config).data)
        writer.close()
        os.replace(partial, out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error}): make room, or choose another -o."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    progress(1, 1, "done")
    said = (
        *unstored(notes, "16 bits or more", change),
        *_notes(model),
        *rounded_scales(worst),
        *spoken,
    )
    return Exported(out, "gguf", out.stat().st_size, dict(types), said)


def _names(model: StoredModel, dialect: Dialect, gguf: Any, config: Any) -> dict[str, str]:
    """Every parameter's name there, by its name here. Raises ExportError for one that has no place there."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == dialect.architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    result: dict[str, str] = {}
    for name in model.names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        place = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ExportError(f"llama.cpp has no place for {name} in a {dialect.architecture}.")
        result[name] = place
    if has_factors(config):
        result[ROPE_FACTORS] = ROPE_FACTORS
    return result


def _add_head(writer: Any, model: StoredModel, config: Any, dialect: Dialect) -> tuple[str, ...]:
    """Everything before the tensors; returns notes."""
    gguf = gguf_package()
    writer.add_name(model.checkpoint.path.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by("bitfold")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings(config, dialect).items():
        add[type(value)](f"{dialect.architecture}.{key}", value)
    return add_tokenizer(writer, model.checkpoint.path, config.vocab_size)


def _add_probe(writer: Any, directory: Path) -> None:
    """The simulation's logits travel with the file, as the bytes of the artifact's own."""
    file = directory / "verification.npz"
    if file.is_file():
        writer.add_array("bitfold.verification", file.read_bytes())


def _part(model: StoredModel, name: str, place: str, dialect: Dialect, config: Any) -> _Part:
    """A parameter as it lies in the file."""
    if name == ROPE_FACTORS:
        return _plain(place, llama3_factors(config.rope_parameters, head_counts(config)[2]))
    value, order = model.read(name), row_order(name, dialect, config)
    if isinstance(value, Tensor):
        value = value if order is None else value[order]
        return _plain(place, without_offset(name, value, dialect))
    if order is not None:
        value = with_rows(value, order)
    kind = smallest(value)
    if kind is None:
        dtype = value.scale.dtype if value.scale.dtype in _PLAIN else torch.bfloat16
        exact = value.dequantize(torch.float32)
        rounded = exact.to(dtype)
        change = float((rounded.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        note = f"{name} ({value.scheme.grid}, {value.scheme.bits} bits) has no block type that holds it"
        return replace(_plain(place, rounded), note=note, change=change)
    try:
        stored = store(value, kind)
    except OverflowError as error:
        raise ExportError(f"{name} cannot be written as {kind.name}: {error}.") from error
    return _Part(place, kind.name, stored.data, value.shape.numel(), None, stored.scale_error)


def _plain(place: str, value: Tensor) -> _Part:
    """A matrix in the dtype it has, a vector in float32."""
    value = value.float() if value.ndim == 1 or value.dtype not in _PLAIN else value
    data = value.contiguous().view(torch.uint8).numpy()
    return _Part(place, _PLAIN[value.dtype], data, value.numel())


def _most(types: Counter[str]) -> str:
    """The type of most weights, of those in few bits if there are any."""
    few = Counter({name: count for name, count in types.items() if name not in _PLAIN.values()})
    return (few or types).most_common(1)[0][0]


def _notes(model: StoredModel) -> Iterator[str]:
    if any(scheme.activation is not None for scheme in model.schemes.values()):
        yield "the scheme's activations are left out: llama.cpp quantizes inputs its own way, 8 bits in blocks of 32"
    if model.quantizes_heads:
        yield "the scheme's queries, keys and values are left out: llama.cpp has a cache of its own (-ctk, -ctv)"
