"""A GGUF file as a checkpoint in bitfold's own format: the same integers, and config and tokenizer out of its head.

Rows of queries and keys go back to their own order, and norms get back what their family does not store. What stands
in ggml's integers is stored in them (`ggml_unpacking`); embeddings, a head tied to them, and types that have no
counterpart here, in floating point wide enough to be exact.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bitfold.errors import BitfoldError, CheckpointError
from bitfold.export import native
from bitfold.export.directory import appearing, bytes_of, write_shards
from bitfold.export.exported import Exported, Progress
from bitfold.export.gguf_config import config_of
from bitfold.export.gguf_model import (
    ROPE_FACTORS,
    Dialect,
    dialect_of,
    gguf_package,
    row_order,
    with_rows,
)
from bitfold.export.gguf_reading import GgufFile, GgufTensor, open_gguf
from bitfold.export.gguf_vocabulary import UnknownTokenizerError, write_tokenizer
from bitfold.export.layout import Choice, LayerEntry, Layout, WeightFormat
from bitfold.models.config import said_of
from bitfold.numerics import QuantizedTensor, Scheme

__all__ = ["import_gguf"]

_FORMAT = WeightFormat(native.NAME, "")
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the file, its shape in the model, and whether it is the weight of a linear layer."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    linear: bool


def import_gguf(source: Path, out: Path, progress: Progress) -> Exported:
    """Write the model of a GGUF file as a directory, which appears whole or not at all.

    Raises CheckpointError for a file that is no model of a family that bitfold reads, or damaged, naming the tensor;
    OutputError where it cannot be written; MissingExtraError without the package gguf.
    """
    file = open_gguf(source)
    try:
        settings = config_of(file)
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except BitfoldError:
        raise
    except Exception as error:
        # Numbers that cannot be: Python, transformers and huggingface_hub raise a dozen classes here.
        raise CheckpointError(
            f"{source} says of its model what cannot be ({said_of(error)}): make or download it again."
        ) from error
    places = _places(file, model, config)
    dialect = dialect_of(settings["model_type"])
    types, kept, notes = Counter[str](), Counter[str](), []
    schemes: dict[str, Scheme] = {}
    dtypes: set[torch.dtype] = set()

    def read(name: str) -> QuantizedTensor | Tensor:
        place = places[name]
        types[place.tensor.type] += prod(place.shape)
        value = _ours(file, name, place, dialect, config)
        if isinstance(value, QuantizedTensor) and place.linear:
            schemes[name.removesuffix(".weight")] = Scheme(weight=value.scheme)
            kept[place.tensor.type] += 1
            dtypes.add(value.scale.dtype)
            return value
        if isinstance(value, QuantizedTensor):
            value = value.dequantize(torch.float32)
        if place.tensor.type not in _FLOATS:
            notes.append(f"{name} ({place.tensor.type}) is stored in float32, with the same values")
        if value.ndim > 1:
            dtypes.add(value.dtype)
        return value

    with appearing(out) as partial:
        write_shards(_parts(places, config), read, partial, _pack, progress)
        settings["dtype"] = str(_widest(dtypes)).removeprefix("torch.")
        (partial / "config.json").write_text(
            json.dumps(_settings(settings, schemes), indent=2) + "\n"
        )
        try:
            write_tokenizer(file, partial)
        except UnknownTokenizerError as error:
            notes.append(
                f"there is no tokenizer, because {error}: copy the original model's files of it into {out}"
            )
    progress(1, 1, "done")
    same = ", ".join(f"{count} in {kind}" for kind, count in kept.items())
    first = [f"linear layers with the file's integers, exactly: {same}"] if kept else []
    return Exported(out, native.NAME, bytes_of(out), dict(types), (*first, *_few(notes)))


def _few(notes: list[str]) -> list[str]:
    """The first three, and how many others."""
    return notes[:3] + ([f"and {len(notes) - 3} others"] if len(notes) > 3 else [])


def _pack(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    return native.to_tensors(layer, weight, _FORMAT)


def _settings(settings: dict[str, Any], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json, with the schemes of quantized layers if there are any."""
    if not schemes:
        return settings
    linears = {name: LayerEntry(scheme, 0) for name, scheme in schemes.items()}
    choice = Choice(dict.fromkeys(linears, _FORMAT))
    own = native.extra_config(Layout({}), settings)
    return settings | own | {"quantization_config": native.config(Layout(linears), choice)}


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The narrowest dtype in which nothing is rounded."""
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32


def _places(file: GgufFile, model: nn.Module, config: PretrainedConfig) -> dict[str, _Place]:
    """Every parameter of the model, by name, where it lies.

    Raises CheckpointError for one that is missing, of another shape, or left over.
    """
    gguf, modules = gguf_package(), dict(model.named_modules())
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    result: dict[str, _Place] = {}
    for name, parameter in model.named_parameters():  # a tied head is not named again
        place = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if place not in file.tensors:
            raise CheckpointError(
                f"{file.path} has no {place}, which its {file.architecture} needs ({name}): it is incomplete; make or "
                "download it again."
            )
        tensor, shape = file.tensors[place], tuple(parameter.shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{place} in {file.path} has the shape {list(tensor.shape)}, but its head makes it {list(shape)}: the "
                "file is damaged; make or download it again."
            )
        result[name] = _Place(
            tensor, shape, isinstance(modules[name.rpartition(".")[0]], nn.Linear)
        )
    used = {place.tensor.name for place in result.values()} | {ROPE_FACTORS}
    if odd := [name for name in file.tensors if name not in used]:
        raise CheckpointError(
            f"{file.path} has {odd[0]}, for which a {config.model_type} has no place ({len(odd)} left over): bitfold "
            "would compute something else; use another file."
        )
    return result


def _ours(
    file: GgufFile, name: str, place: _Place, dialect: Dialect, config: PretrainedConfig
) -> QuantizedTensor | Tensor:
    """A parameter as transformers has it."""
    value, order = file.read(place.tensor.name), row_order(name, dialect, config)
    if order is not None:
        back = order.argsort()
        return value[back] if isinstance(value, Tensor) else with_rows(value, back)
    if isinstance(value, Tensor) and value.ndim == 1 and "norm" in name:
        return value.float() - dialect.norm_offset
    return value


def _parts(places: Mapping[str, _Place], config: PretrainedConfig) -> list[list[str]]:
    """Names of parameters: what stands outside the layers, then each layer's."""
    result: list[list[str]] = [[] for _ in range(config.num_hidden_layers + 1)]
    for name in places:
        words = name.split(".")
        inside = "layers" in words
        result[1 + int(words[words.index("layers") + 1]) if inside else 0].append(name)
    return result
