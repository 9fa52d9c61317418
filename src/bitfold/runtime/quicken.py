"""A loaded model made quick: its packed weights in the forms that PyTorch's own products take, where there is one.

What a layer computes stays what was simulated, up to the rounding that each form states (`quick_int4.py`,
`quick_int8.py`, `quick_outer.py`); evaluation and `verify` load without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitfold.errors import CheckpointError, RecipeError
from bitfold.export.layout import input_scale_name
from bitfold.export.native import unpack_weight
from bitfold.export.reading import StoredModel, read_model
from bitfold.models.family import ONLINE
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.runtime.online import attach
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.quick_int4 import Int4Linear, no_int4
from bitfold.runtime.quick_int8 import Int8Linear, no_int8
from bitfold.runtime.quick_outer import HalfLinear, no_half

__all__ = [
    "QuickLayer",
    "forms_of",
    "no_form",
    "quick_layer",
    "quick_linear",
    "quicken",
    "quicken_head",
    "quicken_packed",
]


@dataclass(frozen=True)
class QuickLayer:
    """What became of a layer.

    form: `int4`, `int8` or `half`, or None where it was left as it was loaded. why: the form in words, or the reason.
    """

    name: str
    form: str | None
    why: str


_ATTENDED = "something runs before or behind it"
_FORMS = {
    Int4Linear: (
        "int4",
        "codes of 4 bits by PyTorch's 4-bit product; for many tokens as bfloat16",
    ),
    Int8Linear: ("int8", "codes of 8 bits by products of bytes"),
    HalfLinear: ("half", "16 bits by FBGEMM's product of float32 and float16"),
}


def quicken(model: PreTrainedModel, source: str | Path | None = None) -> list[QuickLayer]:
    """Replace what a model's quantized linear layers, and its head, are run by, in place; says what became of each.

    source: the artifact that the model was loaded from; None: the directory that it knows itself. Of a layer whose
    weight was unpacked when it was loaded the codes are read there again, and hold only if they give this very weight.
    One layer at a time is in memory in both forms. A quick model is to be run, not saved.

    Raises RecipeError for a model that is not on the CPU, and where the source is no directory.

        model = bitfold.load("out/w4")
        for layer in bitfold.quicken(model):
            print(layer.name, layer.form, layer.why)
    """
    if model.device.type != "cpu":
        raise RecipeError(
            f"The model is on {model.device}, and there are quick forms for the CPU only: load it with device='cpu', "
            "or run it as it is."
        )
    stored = _stored(model, source)
    found = [
        _quicken(model, name, scheme, stored)
        for name, scheme in stored.schemes.items()
        if scheme.weight is not None
    ]
    return found + quicken_head(model, stored.schemes)


def quicken_packed(model: nn.Module) -> list[QuickLayer]:
    """The same of any model whose linear layers hold codes, as `bitfold.convert` leaves them, in place."""
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    return [
        _replace(model, name, module, _of_packed(module), module.scheme, _calibrated(module))
        for name, module in packed
    ]


def quicken_head(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> list[QuickLayer]:
    """The same of a head whose weight is not quantized. schemes: of the layers that are quantized, by full name."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return []
    name = next(name for name, module in model.named_modules() if module is head)
    if name in schemes:
        # A weight that is quantized was told of among the others.
        said = schemes[name].weight is not None
        return [] if said else [QuickLayer(name, None, "its input alone is quantized")]
    # compressed-tensors, and others, give a layer a forward of its own, or its class's once more to no end.
    own = vars(head).get("forward")
    replaced = own is not None and (
        getattr(own, "__func__", None) is not nn.Linear.forward
        or getattr(head, "quantization_scheme", None) is not None
    )
    reason = _ATTENDED if _attended(head) or replaced else no_half(head.weight)
    if reason is None:
        half = HalfLinear(head.weight, head.bias)
        model.set_submodule(name, half)
        return [quick_layer(name, half)]
    return [QuickLayer(name, None, reason)]


def forms_of(layers: Sequence[QuickLayer]) -> dict[str, int]:
    """How many layers have which form; those that were left are `as loaded`."""
    return dict(Counter(layer.form or "as loaded" for layer in layers))


def no_form(scheme: Scheme, shape: tuple[int, int], scale: torch.dtype) -> str | None:
    """Why a quantized weight [out, in], with scales of a dtype, has no quick form; None if it has one."""
    weight = scheme.weight
    wide = (
        weight is None or weight.grid != "int" or weight.bits > 4 or weight.granularity != "group"
    )
    int4 = no_int4(scheme, shape, scale)
    return None if int4 is None else (no_int8(scheme) if wide else int4)


def quick_linear(
    tensor: QuantizedTensor,
    scheme: Scheme,
    bias: Tensor | None,
    calibrated: dict[str, Tensor] | None = None,
) -> Int4Linear | Int8Linear:
    """The quick form of a weight that `no_form` has nothing against.

    calibrated: `input_scale` and `input_zero_point` of a static activation, `input_share` of a clipped one.
    """
    rows, columns = tensor.shape
    if no_int4(scheme, (rows, columns), tensor.scale.dtype) is None:
        return Int4Linear(tensor, bias)
    if scheme.activation is None or not calibrated:
        return Int8Linear(tensor, scheme.activation, bias)
    scale = calibrated[input_scale_name(scheme.activation)]
    zero = calibrated.get("input_zero_point")
    return Int8Linear(tensor, scheme.activation, bias, scale, zero)


def quick_layer(name: str, quick: Int4Linear | Int8Linear | HalfLinear) -> QuickLayer:
    """What is said of a layer that was replaced."""
    return QuickLayer(name, *_FORMS[type(quick)])


def _stored(model: PreTrainedModel, source: str | Path | None) -> StoredModel:
    path = Path(source if source is not None else model.name_or_path)
    if not path.is_dir():
        raise RecipeError(
            f"The model does not know the directory it was loaded from ('{path}' is none): pass it, "
            "quicken(model, directory)."
        )
    return read_model(path)


def _quicken(model: PreTrainedModel, name: str, scheme: Scheme, stored: StoredModel) -> QuickLayer:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return QuickLayer(name, None, "the model has no layer of this name")
    if isinstance(module, QuantizedLinear):
        return _replace(model, name, module, _of_packed(module), scheme, _calibrated(module))
    if not isinstance(module, nn.Linear):
        return QuickLayer(name, None, f"it is a {type(module).__name__}")
    try:
        tensor = stored.read(f"{name}.weight")
    except CheckpointError as error:
        return QuickLayer(name, None, str(error))
    assert isinstance(tensor, QuantizedTensor)
    if not _holds(module.weight, tensor):
        return QuickLayer(name, None, "its weight is not the one that the files hold")
    return _replace(model, name, module, tensor, scheme, stored.calibrated(name))


def _holds(weight: Tensor, tensor: QuantizedTensor) -> bool:
    """Whether a weight was unpacked from codes: in its own dtype, or in that of the scales."""
    ways = (weight.dtype, tensor.scale.dtype)
    return any(torch.equal(tensor.dequantize(way).to(weight.dtype), weight) for way in ways)


def _replace(
    model: nn.Module,
    name: str,
    module: nn.Module,
    tensor: QuantizedTensor,
    scheme: Scheme,
    calibrated: dict[str, Tensor],
) -> QuickLayer:
    if _attended(module):
        return QuickLayer(name, None, _ATTENDED)
    online = getattr(module, ONLINE, None)
    reason = no_form(scheme, (tensor.shape[0], tensor.shape[1]), tensor.scale.dtype)
    if reason is not None:
        return QuickLayer(name, None, reason)
    quick = quick_linear(tensor, scheme, getattr(module, "bias", None), calibrated)
    if online is not None:
        attach(quick, online)
    model.set_submodule(name, quick)
    return quick_layer(name, quick)


def _attended(module: nn.Module) -> bool:
    """Whether a hook, other than that of a map that runs, would be lost with the module."""
    own = int(getattr(module, ONLINE, None) is not None)
    return len(module._forward_pre_hooks) > own or bool(module._forward_hooks)


def _of_packed(module: QuantizedLinear) -> QuantizedTensor:
    assert module.scheme.weight is not None
    return unpack_weight(module.get_buffer, module.scheme.weight, module.in_features)


def _calibrated(module: QuantizedLinear) -> dict[str, Tensor]:
    """What was found on calibration text for the input, by its names in files."""
    names = ("input_scale", "input_share", "input_zero_point")
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
