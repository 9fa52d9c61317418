"""Load an artifact straight into quick forms: no weight is ever unpacked, and the model never held in two forms."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from bitfold.errors import BitfoldError
from bitfold.export import compressed_tensors
from bitfold.export.reading import StoredModel, read_model
from bitfold.numerics import QuantizedTensor
from bitfold.runtime.adapted import is_adapter
from bitfold.runtime.checkpoint import check_checkpoint, find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import load
from bitfold.runtime.loading import quiet
from bitfold.runtime.quick_outer import CastEmbedding
from bitfold.runtime.quicken import (
    QuickLayer,
    no_form,
    quick_layer,
    quick_linear,
    quicken,
    quicken_head,
)
from bitfold.runtime.rest_loading import load_rest

__all__ = ["load_quick"]

_HALVES = (torch.bfloat16, torch.float16)


def load_quick(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, list[QuickLayer]]:
    """As `load`, and then `quicken`; gives what became of the layers too, nothing where the model is as `load` gives
    it: one that is not quantized, or not on the CPU.

    Where every weight has a quick form, and the format is compressed-tensors', weights go from the files into them,
    layer by layer, and the embedding keeps the dtype that it is stored in.

    Raises what `load` raises.
    """
    where = resolve_device(device)
    wanted = resolve_dtype(dtype, where)
    with quiet():
        directory = find_checkpoint(model, with_code=trust_remote_code)
        if is_adapter(directory):  # whose layers are more than a product
            return load(
                directory, device=where, dtype=dtype, trust_remote_code=trust_remote_code
            ), []
        check_checkpoint(directory)
    if where.type == "cpu" and wanted in (torch.float32, torch.bfloat16):
        stored = _read(directory)
        if stored is not None and stored.schemes:
            if _goes_straight(stored):
                return _straight(directory, stored, wanted, trust_remote_code)
            loaded = load(directory, device=where, dtype=dtype, trust_remote_code=trust_remote_code)
            return loaded, quicken(loaded, directory)
    return load(directory, device=where, dtype=dtype, trust_remote_code=trust_remote_code), []


def _read(directory: Path) -> StoredModel | None:
    """None for what bitfold cannot read, but a loader of transformers perhaps can."""
    try:
        return read_model(directory)
    except BitfoldError:
        return None


def _goes_straight(stored: StoredModel) -> bool:
    """Whether all that is quantized are weights, and inputs, that have quick forms."""
    settings = stored.config["quantization_config"]
    method = settings.get("quant_method")
    if method != compressed_tensors.NAME or stored.quantizes_heads or stored.runs:
        return False
    # Inputs alone, of layers with nothing of it in the files: only a loader finds them.
    if any(group.get("weights") is None for group in settings["config_groups"].values()):
        return False
    known = stored.checkpoint.tensors
    for name, scheme in stored.schemes.items():
        shape, scale = _shape(stored, name), known.get(f"{name}.weight_scale")
        if shape is None or scale is None or no_form(scheme, shape, scale.dtype) is not None:
            return False
    return True


def _shape(stored: StoredModel, name: str) -> tuple[int, int] | None:
    """[out, in] of a stored weight of integers."""
    tensors, packed = stored.checkpoint.tensors, f"{name}.weight_shape"
    if packed in tensors:
        rows, columns = stored.checkpoint.read([packed])[packed].tolist()
        return rows, columns
    weight = tensors.get(f"{name}.weight")
    return None if weight is None else (weight.shape[0], weight.shape[1])


def _straight(
    directory: Path, stored: StoredModel, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[QuickLayer]]:
    model = load_rest(directory, stored.schemes, trust_remote_code=trust_remote_code)
    layers = [_fill(model, name, stored) for name in stored.schemes]
    layers += quicken_head(model, stored.schemes)
    _run_in(model, dtype)
    return model, layers


def _fill(model: PreTrainedModel, name: str, stored: StoredModel) -> QuickLayer:
    tensor = stored.read(f"{name}.weight")
    assert isinstance(tensor, QuantizedTensor)
    bias = model.get_submodule(name).bias
    quick = quick_linear(tensor, stored.schemes[name], bias, stored.calibrated(name))
    model.set_submodule(name, quick)
    return quick_layer(name, quick)


def _run_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have a model run in a dtype, its plain embeddings keeping theirs where it has 16 bits."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Embedding and module.weight.dtype in _HALVES:
            model.set_submodule(name, CastEmbedding(module.weight, dtype))
    for value in model.parameters():
        value.data = value.data.to(dtype)
