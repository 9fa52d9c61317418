"""Load an artifact straight into quick forms: no weight is ever unpacked, and the model never held in two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.errors import BitfoldError
from bitfold.export import compressed_tensors
from bitfold.export.reading import StoredModel, read_model
from bitfold.numerics import QuantizedTensor
from bitfold.runtime.checkpoint import check_checkpoint, find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import cannot_load, check_report, load, quiet
from bitfold.runtime.quick_outer import CastEmbedding
from bitfold.runtime.quicken import (
    QuickLayer,
    no_form,
    quick_layer,
    quick_linear,
    quicken,
    quicken_head,
)

__all__ = ["QuickConfig", "QuickHfQuantizer", "load_quick"]

_NAME = "bitfold-quick"
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
        check_checkpoint(directory)
    if where.type == "cpu" and wanted in (torch.float32, torch.bfloat16):
        stored = _read(directory)
        if stored is not None and stored.schemes:
            if _goes_straight(stored):
                return _straight(directory, stored, wanted, trust_remote_code)
            loaded = load(directory, device=where, dtype=dtype, trust_remote_code=trust_remote_code)
            return loaded, quicken(loaded, directory)
    return load(directory, device=where, dtype=dtype, trust_remote_code=trust_remote_code), []


@register_quantization_config(_NAME)
class QuickConfig(QuantizationConfigMixin):
    """Names the layers whose weights transformers is to leave out."""

    def __init__(self, layers: list[str], **settings: Any) -> None:
        del settings
        self.quant_method, self.layers = _NAME, layers

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return {"quant_method": _NAME, "layers": self.layers}


@register_quantizer(_NAME)
class QuickHfQuantizer(HfQuantizer):
    """Has transformers load all but the weights of quantized layers."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name in self.quantization_config.layers:
            linear = model.get_submodule(name)
            # What is left of the layer is a bias, if it has one.
            rest = nn.Module()
            rest.register_parameter("bias", getattr(linear, "bias", None))
            model.set_submodule(name, rest)

    def is_serializable(self) -> bool:
        """What is packed for a processor is no format."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No gradient reaches packed weights."""
        return False


def _read(directory: Path) -> StoredModel | None:
    """None for what bitfold cannot read, but a loader of transformers perhaps can."""
    try:
        return read_model(directory)
    except BitfoldError:
        return None


def _goes_straight(stored: StoredModel) -> bool:
    """Whether all that is quantized are weights, and inputs, that have quick forms."""
    method = stored.config["quantization_config"].get("quant_method")
    if method != compressed_tensors.NAME or stored.quantizes_heads or stored.runs:
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
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            config.quantization_config = QuickConfig(list(stored.schemes)).to_dict()
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the report instead
            )
        except Exception as error:  # whatever transformers raises is about this checkpoint
            raise cannot_load(directory, error) from error
        mine = tuple(f"{name}." for name in stored.schemes)
        rest = [name for name in report["unexpected_keys"] if not name.startswith(mine)]
        check_report(directory, report | {"unexpected_keys": rest}, model.state_dict().keys())
    layers = [_fill(model, name, stored) for name in stored.schemes]
    layers += quicken_head(model, stored.schemes)
    _run_in(model, dtype)
    return model.eval(), layers


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
