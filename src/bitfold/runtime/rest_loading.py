"""All of a checkpoint through transformers but the weights of some layers, which the caller reads and packs itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.runtime.loading import cannot_load, check_report, quiet

__all__ = ["RestConfig", "RestHfQuantizer", "load_rest"]

_NAME = "bitfold-rest"


def load_rest(
    directory: Path,
    layers: Collection[str],
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A model in which each of the linear `layers` is a module with nothing but a `bias`, or None for it.

    dtype: as transformers takes it; "auto" is the checkpoint's own. options: more for `from_pretrained`.

    Raises CheckpointError for whatever is wrong with the rest of the checkpoint.
    """
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            config.quantization_config = RestConfig(list(layers)).to_dict()
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the report instead
                **options,
            )
        except Exception as error:  # whatever transformers raises is about this checkpoint
            raise cannot_load(directory, error) from error
        mine = tuple(f"{name}." for name in layers)
        rest = [name for name in report["unexpected_keys"] if not name.startswith(mine)]
        check_report(directory, report | {"unexpected_keys": rest}, model.state_dict().keys())
    loaded: PreTrainedModel = model.eval()
    return loaded


@register_quantization_config(_NAME)
class RestConfig(QuantizationConfigMixin):
    """Names the layers whose weights transformers is to leave out."""

    def __init__(self, layers: list[str], **settings: Any) -> None:
        del settings
        self.quant_method, self.layers = _NAME, layers

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return {"quant_method": _NAME, "layers": self.layers}


@register_quantizer(_NAME)
class RestHfQuantizer(HfQuantizer):
    """Has transformers load all but the weights of these layers."""

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
