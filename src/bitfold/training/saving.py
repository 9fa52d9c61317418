"""A converted model of any kind on disk: its state, and how each layer is quantized.

    model.safetensors    the state dict, codes packed
    quantization.json    by layer: its kind, its scheme, what else it is built from

Only the layers of codes are built anew; all else is the model's own, which the one who loads it brings along. Models of
transformers have an artifact instead (`bitfold train`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bitfold.errors import CheckpointError, OutputError, RecipeError
from bitfold.numerics import Scheme
from bitfold.runtime.quantized_conv2d import QuantizedConv2d
from bitfold.runtime.quantized_embedding import QuantizedEmbedding
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.xnor_layers import XnorConv2d, XnorLinear

__all__ = ["load_converted", "save_converted"]

_WEIGHTS, _LAYERS = "model.safetensors", "quantization.json"
_VERSION = 1
_OF_SIGNS: dict[str, type[nn.Module]] = {"xnor_linear": XnorLinear, "xnor_conv2d": XnorConv2d}


def save_converted(model: nn.Module, directory: str | Path) -> Path:
    """Write a converted model into a new directory.

    Raises RecipeError for a model that has no converted layer, OutputError where it cannot be written.
    """
    out = Path(directory).expanduser().absolute()
    layers = {
        name: said for name, module in model.named_modules() if (said := _said(module)) is not None
    }
    if not layers:
        raise RecipeError("The model has no converted layer: `bitfold.convert` it first.")
    if out.exists():
        raise OutputError(f"{out} is there already: remove it, or choose another place.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        state = {
            name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()
        }
        save_file(state, partial / _WEIGHTS)
        content = {"version": _VERSION, "layers": layers}
        (partial / _LAYERS).write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error}): look at the place and the room there."
        ) from error
    return out


def load_converted(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put the layers of `save_converted` into the original model, in place; returns it, in `eval`.

    Raises CheckpointError where the directory is not such a one, is damaged, or belongs to another model.
    """
    path = Path(directory).expanduser()
    try:
        content = json.loads((path / _LAYERS).read_text(encoding="utf-8"))
        state = load_file(path / _WEIGHTS)
        layers = {name: dict(said) for name, said in content["layers"].items()}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a converted model ({error}): it has to hold {_WEIGHTS} and {_LAYERS}."
        ) from error
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is of version {content.get('version')}, and this bitfold reads {_VERSION}."
        )
    for name, said in layers.items():
        try:
            model.set_submodule(name, _built(said), strict=True)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} has a layer {name} that cannot be put into this {type(model).__name__} ({error}): give the "
                "model that was converted."
            ) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path} do not fit this {type(model).__name__} ({str(error).splitlines()[-1].strip()})."
        ) from error
    return model.eval()


def _said(module: nn.Module) -> dict[str, Any] | None:
    """What a layer of codes is built from, beside its state."""
    if isinstance(module, QuantizedConv2d):
        geometry = ("shape", "stride", "dilation", "padding", "padding_mode", "groups")
        more = {name: getattr(module, name) for name in geometry}
        return {"kind": "conv2d", **_of_linear(module), **more}
    if isinstance(module, QuantizedLinear):
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        return {"kind": "linear", **_of_linear(module), **sizes}
    if isinstance(module, XnorLinear):
        return {
            "kind": "xnor_linear",
            **_of_signs(module, (module.out_features, module.in_features)),
        }
    if isinstance(module, XnorConv2d):
        shape = (module.out_channels, module.in_channels, *module.kernel)
        left, _, top, _ = module.pads
        more = {"stride": module.stride, "dilation": module.dilation, "padding": (top, left)}
        return {"kind": "xnor_conv2d", **_of_signs(module, shape), **more}
    if isinstance(module, QuantizedEmbedding):
        names = ("num_embeddings", "embedding_dim", "bits", "padding_idx")
        dtype = str(module.weight_scale.dtype).removeprefix("torch.")
        return {"kind": "embedding", "dtype": dtype} | {n: getattr(module, n) for n in names}
    return None


def _of_linear(module: QuantizedLinear) -> dict[str, Any]:
    floating = module.weight if module.scheme.weight is None else module.weight_scale
    dtype = str(floating.dtype).removeprefix("torch.")
    scheme = module.scheme.model_dump(exclude_none=True)
    return {"scheme": scheme, "bias": module.bias is not None, "dtype": dtype}


def _of_signs(module: XnorLinear | XnorConv2d, shape: tuple[int, ...]) -> dict[str, Any]:
    has = {"scale": module.scale is not None, "bias": module.bias is not None}
    return {"shape": shape, "scaled_input": module.scaled_input, **has}


def _built_of_signs(
    kind: type[nn.Module], *, shape: tuple[int, ...], scale: bool, bias: bool, **more: Any
) -> nn.Module:
    """The layer with room for its state."""
    room = torch.zeros(shape[0])
    has = {"scale": room if scale else None, "bias": room if bias else None}
    return kind(torch.zeros(shape), **has, **more)


def _built(said: dict[str, Any]) -> nn.Module:
    kind = said.pop("kind")
    pairs = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
    if kind in _OF_SIGNS:
        return _built_of_signs(_OF_SIGNS[kind], **said | pairs)
    said["dtype"] = getattr(torch, said["dtype"])
    if "scheme" in said:
        said["scheme"] = Scheme.model_validate(said["scheme"])
    built: dict[str, type[nn.Module]] = {
        "conv2d": QuantizedConv2d,
        "linear": QuantizedLinear,
        "embedding": QuantizedEmbedding,
    }
    return built[kind](**said | pairs)
