"""An adapter and its base as one ordinary checkpoint, in floating point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bitfold.errors import CheckpointError, ExportError
from bitfold.export.directory import appearing, bytes_of, write_shards
from bitfold.export.exported import Exported, Progress, check_place
from bitfold.export.model_directory import copy_companions_of, write_json
from bitfold.export.reading import StoredModel, read_model
from bitfold.models.config import said_of
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.runtime.adapted import base_of, read_adapter, read_deltas, read_lora
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.frozen import NF4, linear_names, rounded_weight
from bitfold.runtime.loading import quiet

__all__ = ["merge_adapter"]

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of config.json, what gives an architecture's linear layers biases.
_SWITCHES = ("attention_bias", "mlp_bias", "enable_bias")


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    into: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write W + alpha/rank · BA, and biases, as a checkpoint without adapters that transformers loads by itself.

    into: the full-precision model the base was made from, which gets what was learned beside its rounded weights; None:
    the base, whose weights leave their 4-bit grid and are stored in floating point (16 bits in place of 4).

    Raises CheckpointError for an adapter whose base is gone or another, and for a model of other layers; ExportError
    where the architecture has no place for biases; OutputError for `out`.
    """
    directory, out = Path(adapter).expanduser(), Path(out).expanduser().absolute()
    check_place(out, "a merged checkpoint", directory=True, overwrite=overwrite)
    said = read_adapter(directory)
    base = base_of(directory, said)
    target = base if into is None else find_checkpoint(into)
    stored = read_model(target)
    if into is not None and (stored.schemes or stored.loose):
        raise CheckpointError(
            f"{target} is quantized, and --into takes the original: leave it out to merge into the adapter's base"
        )
    products = read_lora(directory) if "lora" in said.kinds else {}
    biases = read_deltas(directory) if "bitfit" in said.kinds else {}
    dtype = _dtype_of(stored)
    _check_names(stored, products, biases, target)
    rounds = said.scheme is not None and into is None
    scheme = Scheme.parse(said.scheme or NF4)
    rounded = {*linear_names(target)} if rounds and scheme.weight is not None else set[str]()

    def read(name: str) -> Tensor:
        layer, _, part = name.rpartition(".")
        if name in biases and name not in stored.checkpoint.tensors:
            return biases[name].to(dtype)
        value = stored.read(name)
        if isinstance(value, QuantizedTensor):
            value = value.dequantize(torch.float32)
        elif part == "weight" and layer in rounded:
            value = rounded_weight(value, scheme, said.double)[0].dequantize(torch.float32)
        delta = products.get(layer) if part == "weight" else None
        change = biases.get(name) if delta is None else delta[0] @ delta[1]
        if change is None and value.dtype != torch.float32:
            return value
        return (value if change is None else value.float() + change).to(dtype)

    by_file: dict[str, list[str]] = {}
    for name in stored.names:
        by_file.setdefault(stored.file_of(name), []).append(name)
    new = [name for name in biases if name not in stored.checkpoint.tensors]
    by_file[next(reversed(by_file))] += new
    with appearing(out) as partial:
        types = write_shards(list(by_file.values()), read, partial, _no_pack, progress or _silent)
        copy_companions_of(stored, partial)
        if new:
            write_json(partial / "config.json", _with_biases(stored))
    return Exported(out, "merged", bytes_of(out), types, tuple(_notes(base, into)))


def _notes(base: Path, into: str | Path | None) -> Iterator[str]:
    if into is None:
        yield (
            f"the weights of {base} left their grid: they take 16 bits or more each from now on, and rounding them "
            "again loses something again; the adapter beside the packed base does not"
        )
    else:
        yield "the adapter was trained on the rounded weights, and made up for their errors too: evaluate the result"


def _dtype_of(stored: StoredModel) -> torch.dtype:
    """In which the base's floating tensors are stored."""
    said = stored.config.get("dtype") or stored.config.get("torch_dtype")
    return _FLOATS.get(str(said).removeprefix("torch."), torch.float32)


def _with_biases(stored: StoredModel) -> dict[str, Any]:
    """The config of a model whose linear layers all have biases, as far as its architecture can say that."""
    left = ("quantization_config", "attn_implementation")
    config = {key: value for key, value in stored.config.items() if key not in left}
    return config | {name: True for name in _SWITCHES if name in config}


def _check_names(
    stored: StoredModel,
    products: Mapping[str, tuple[Tensor, Tensor]],
    biases: Mapping[str, Tensor],
    target: Path,
) -> None:
    """What was learned has a place in the model, and fits."""
    try:
        with quiet(), init_empty_weights():
            config = AutoConfig.for_model(**_with_biases(stored)) if biases else None
            config = config or AutoConfig.from_pretrained(target, local_files_only=True)
            config.quantization_config = None
            places = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    except Exception as error:  # transformers raises a dozen classes here
        raise CheckpointError(
            f"{target} is no causal language model that transformers can build ({said_of(error)})"
        ) from error
    shapes = {f"{layer}.weight": (len(b), a.shape[1]) for layer, (b, a) in products.items()}
    for name, shape in shapes.items():
        if name not in places or tuple(places[name].shape) != shape:
            raise CheckpointError(
                f"{target} has no layer {name} of {shape[0]} by {shape[1]}, of which the adapter is: give the model "
                "that its base was made from"
            )
    if homeless := [name for name in biases if name not in places]:
        raise ExportError(
            f"{stored.config['model_type']} has no place for {homeless[0]} ({len(homeless)} of {len(biases)} biases): "
            "keep the adapter beside its base, `bitfold eval` and `generate` take it as it is"
        )
    stored_names = {*stored.names}
    if bare := [name for name in shapes if name not in stored_names]:
        raise CheckpointError(f"{target} does not store {bare[0]} under that name: merge with peft")


def _no_pack(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    raise AssertionError(f"{layer} is merged, and in floating point")


def _silent(done: int, total: int, what: str) -> None:
    pass
