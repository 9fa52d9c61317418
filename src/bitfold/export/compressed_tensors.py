"""The compressed-tensors format: what plain transformers, and often vLLM, loads without bitfold.

Found by trying transformers 5.23 with compressed-tensors 0.20 (tests/export holds the proofs):

* `pack-quantized` weights are exact at 2 to 8 bits, whatever happens to the activations, but packed
  zero-points do not load: the loader expects them unpacked. There are two exact ways round it.
  `dequantize: true` unpacks everything at once, but then activations, keys and values are not
  quantized, and all weights must have one scheme. vLLM ignores it and has kernels for the rest.
  Or each group is said as a *block* of one row: blocks have unpacked zero-points. vLLM has no
  kernels for those, nor for anything else that asymmetric weights with activations can be said as.
* mxfp4 and nvfp4 weights come out in bfloat16, exactly, but also where the model runs in another dtype, which then
  stops at its first product. `dequantize: true` casts them. Without it the checkpoint has to be in bfloat16.
* `int-quantized`, a byte per weight, is what vLLM wants of 8-bit weights with 8-bit activations. It wants the weights
  symmetric then (docs/engines.md has what vLLM 0.32 made of each scheme).
* A `token` is a row of [batch, tokens, features], but all of a flattened [tokens, features], and
  the whole window of a query [batch, head, tokens, features]. There, a *group* as wide as the last
  axis is a token.
* Queries, keys and values share a scheme. Keys and values alone must have it in every layer; if
  queries have one too, it may differ per layer, but none may lack it.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bitfold.export.layout import Choice, LayerEntry, Layout, Refusal, WeightFormat
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme, pack, unpack

__all__ = ["NAME", "choose", "config", "extra_config", "from_tensors", "to_tensors"]

NAME = "compressed-tensors"
PACKED = "pack-quantized"
ONE_BYTE = "int-quantized"
FLOAT = "float-quantized"
DENSE = "dense"
# Of a grid: the weights' format and the strategy of its scales, and their dtype.
FP4 = {
    "mxfp4": ("mxfp4-pack-quantized", "group", "torch.uint8"),
    "nvfp4": ("nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn"),
}


def choose(layout: Layout) -> Choice | Refusal:
    """How to say the layout so that transformers gives the logits of the simulation, or why not."""
    if layout.online:
        return Refusal(f"it has no maps that run ({next(iter(layout.online))})")
    for name, entry in layout.linears.items():
        if reason := _unsayable_linear(entry.scheme):
            return Refusal(f"{reason} ({name})")
    if reason := _unsayable_attention(layout):
        return Refusal(reason)
    dequantize = _can_dequantize(layout)
    if not dequantize and (reason := _unrunnable_fp4(layout)):
        return Refusal(reason)
    formats = {
        name: _weight_format(entry.scheme, dequantize) for name, entry in layout.linears.items()
    }
    return Choice(formats, dequantize)


def config(layout: Layout, choice: Choice) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    names_of = _group_by_scheme(
        {name: _linear_group(name, layout, choice.formats[name]) for name in layout.linears}
    )
    groups = [
        group | {"targets": _targets(names, layout)} for group, names in names_of
    ] + _attention_groups(layout)
    formats = sorted({format.name for format in choice.formats.values()} - {DENSE})
    result: dict[str, Any] = {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else DENSE,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": sorted(layout.unquantized),
        "kv_cache_scheme": _kv_cache_scheme(layout),
    }
    return result | ({"dequantize": True} if choice.dequantize else {})


def extra_config(layout: Layout, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """What else config.json must say, given what it says.

    Quantizing queries, keys or values reads `num_key_value_heads`, which OPT does not have.
    """
    quantizes = any(entry.scheme.quantizes_attention for entry in layout.attention.values())
    if not quantizes or "num_key_value_heads" in model_config:
        return {}
    return {"num_key_value_heads": model_config["num_attention_heads"]}


def to_tensors(name: str, tensor: QuantizedTensor, format: WeightFormat) -> dict[str, Tensor]:
    """The tensors `NAME.weight…` of one layer's weight [out, in].

    weight_packed: [out, ⌈in·bits/32⌉] int32, with weight_shape: [2] int64; if `pack-quantized`. Of mxfp4 and nvfp4
        [out, in/2] uint8, the earlier code in the lower half.
    weight: [out, in], int8 or float8; otherwise.
    weight_scale: [out, groups] ([1] per tensor), in the scale's dtype; of mxfp4 its bytes, uint8.
    weight_global_scale: [1] float32, of nvfp4 alone.
    weight_zero_point: [out, groups] ([1] per tensor), int8; or, in `pack-quantized` channels and
        groups, packed along dim 0, [⌈out·bits/32⌉, groups] int32.
    """
    if tensor.scheme.fp4:
        return _fp4_to_tensors(name, tensor)
    scale, zero = tensor.scale, tensor.zero
    if format.name == PACKED:
        result = {
            "weight_packed": pack(tensor.codes, tensor.scheme.bits),
            "weight_shape": torch.tensor(tensor.shape),
        }
    else:
        result = {"weight": tensor.codes}
    if format.strategy == "tensor":
        scale, zero = scale.reshape(1), None if zero is None else zero.reshape(1)
    elif zero is not None and _packs_zero(format):
        zero = pack(zero.T, tensor.scheme.bits).T
    result["weight_scale"] = scale
    if zero is not None:
        result["weight_zero_point"] = zero
    return {f"{name}.{key}": value.contiguous() for key, value in result.items()}


def from_tensors(
    name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme, format: WeightFormat
) -> QuantizedTensor:
    """The weight that `to_tensors` wrote; `tensors` may hold others. KeyError if one is missing."""
    if scheme.fp4:
        return _fp4_from_tensors(name, tensors, scheme)
    if format.name == PACKED:
        _, columns = tensors[f"{name}.weight_shape"].tolist()
        codes = unpack(tensors[f"{name}.weight_packed"], scheme.bits, columns)
    else:
        codes = tensors[f"{name}.weight"]
    scale = tensors[f"{name}.weight_scale"]
    zero = None if scheme.symmetric else tensors[f"{name}.weight_zero_point"]
    if format.strategy == "tensor":
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    elif zero is not None and _packs_zero(format):
        zero = unpack(zero.T, scheme.bits, codes.shape[0]).T.contiguous()
    return QuantizedTensor(codes, scale, zero, scheme)


def _packs_zero(format: WeightFormat) -> bool:
    return format.name == PACKED and format.strategy in ("channel", "group")


def _fp4_to_tensors(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    scale = tensor.scale
    result = {
        "weight_packed": pack(tensor.codes.to(torch.int8) - 8, 4).view(torch.uint8),
        "weight_scale": scale.view(torch.uint8) if tensor.scheme.grid == "mxfp4" else scale,
    }
    if tensor.global_scale is not None:
        result["weight_global_scale"] = tensor.global_scale
    return {f"{name}.{key}": value.contiguous() for key, value in result.items()}


def _fp4_from_tensors(
    name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme
) -> QuantizedTensor:
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    codes = (unpack(packed.view(torch.int32), 4, 2 * packed.shape[1]) + 8).to(torch.uint8)
    if scheme.grid == "mxfp4":
        return QuantizedTensor(codes, scale.view(torch.float8_e8m0fnu), None, scheme)
    at = tensors[f"{name}.weight_global_scale"]
    return QuantizedTensor(codes, scale, None, scheme, global_scale=at)


# What can be said


def _unsayable_linear(scheme: Scheme) -> str | None:
    weight, activation = scheme.weight, scheme.activation
    if weight is not None:
        if weight.grid == "nf4":
            return "it has no nf4 grid"
        if weight.grid == "codebook":
            return "it has no codebooks"
        if weight.grid == "shifted":
            return "it has no groups that are shifted by a number of their own"
        if weight.kept:
            return "it has no columns that are kept beside the codes"
        if weight.granularity == "token":
            return "a weight has no tokens"
    return None if activation is None else _unsayable_activation(activation)


def _unsayable_activation(activation: TensorScheme) -> str | None:
    if activation.grid == "nf4":
        return "it has no nf4 grid"
    if activation.narrow:
        return "it has no narrow grid for activations"
    if activation.granularity == "channel":
        return "it has no scale per channel for activations"
    if activation.clipped:
        return "it has no clipped ranges of tokens for activations"
    if activation.granularity == "cluster":
        return "it has no scale per cluster of channels for activations"
    if activation.static and activation.granularity != "tensor":
        return "it has one scale per tensor for static activations"
    return None


def _unsayable_attention(layout: Layout) -> str | None:
    schemes = {name: entry.scheme for name, entry in layout.attention.items()}
    if not any(scheme.quantizes_attention for scheme in schemes.values()):
        return None
    for name, scheme in schemes.items():
        if scheme.key != scheme.value:
            return f"it has one scheme for keys and values ({name})"
        if scheme.query is not None and scheme.query != scheme.key:
            return f"it has one scheme for queries, keys and values ({name})"
        if scheme.key is None:
            continue
        if scheme.key.fp4:
            return f"it has {scheme.key.grid} for weights and inputs only ({name})"
        if scheme.key.static or scheme.key.granularity not in ("token", "group"):
            return f"bitfold writes keys and values in it only per token or group, and dynamic ({name})"
        if reason := _unsayable_activation(scheme.key):
            return f"{reason} ({name})"
    if _quantizes_queries(layout):
        # The attention function is one for the whole model, and insists on a scheme.
        if any(scheme.query is None for scheme in schemes.values()):
            return "it quantizes queries in every layer, or in none"
    elif len({scheme.key for scheme in schemes.values()}) > 1:
        return "it has one scheme for the keys and values of all layers"
    return None


def _unrunnable_fp4(layout: Layout) -> str | None:
    if layout.storage == torch.bfloat16:
        return None
    for name, entry in layout.linears.items():
        weight = entry.scheme.weight
        if weight is not None and weight.fp4:
            return (
                f"its {weight.grid} weights come out in bfloat16 unless they, all of one scheme, are all that is "
                f"quantized, and this checkpoint is in {str(layout.storage).removeprefix('torch.')} ({name})"
            )
    return None


def _can_dequantize(layout: Layout) -> bool:
    weights = {entry.scheme.weight for entry in layout.linears.values()}
    return (
        len(weights) == 1
        and all(weight is not None and (not weight.symmetric or weight.fp4) for weight in weights)
        and all(entry.scheme.activation is None for entry in layout.linears.values())
        and not any(entry.scheme.quantizes_attention for entry in layout.attention.values())
    )


def _weight_format(scheme: Scheme, dequantize: bool) -> WeightFormat:
    weight = scheme.weight
    if weight is None:
        return WeightFormat(DENSE, "")
    if weight.fp4:
        name, strategy, _ = FP4[weight.grid]
        return WeightFormat(name, strategy)
    if weight.grid == "fp8_e4m3":
        return WeightFormat(FLOAT, weight.granularity)
    weight_only = dequantize or (weight.symmetric and scheme.activation is None)
    if weight.bits == 8 and not weight_only:
        return WeightFormat(ONE_BYTE, weight.granularity)
    if weight.symmetric or dequantize or weight.granularity == "tensor":
        return WeightFormat(PACKED, weight.granularity)
    return WeightFormat(PACKED, "block")


# How it is said


def _linear_group(name: str, layout: Layout, format: WeightFormat) -> dict[str, Any]:
    """A config group without its targets."""
    entry = layout.linears[name]
    flattened = any(f".{name}".endswith(f".{end}") for end in layout.flattened_inputs)
    return {
        "weights": _weight_args(entry, format),
        "input_activations": _activation_args(
            entry.scheme.activation, width=entry.in_features if flattened else None
        ),
        "output_activations": None,
        "format": format.name,
    }


def _weight_args(entry: LayerEntry, format: WeightFormat) -> dict[str, Any] | None:
    weight = entry.scheme.weight
    if weight is None:
        return None
    args = _args(weight) | {"strategy": format.strategy, "dynamic": False}
    if weight.fp4 or format.strategy == "group":
        args["group_size"] = weight.group_size
    if format.strategy == "block":
        args["block_structure"] = [1, weight.group_size or entry.in_features]
    return args


def _activation_args(scheme: TensorScheme | None, width: int | None) -> dict[str, Any] | None:
    """`width` is the size of the last axis where a token must be said as a group of that size."""
    if scheme is None:
        return None
    args = _args(scheme) | {"strategy": scheme.granularity, "dynamic": not scheme.static}
    if scheme.grid == "nvfp4":
        args |= {"strategy": FP4["nvfp4"][1], "dynamic": "local"}
    if scheme.granularity == "token" and width is not None:
        args |= {"strategy": "group", "group_size": width}
    if scheme.granularity == "group":
        args["group_size"] = scheme.group_size
    return args


def _args(scheme: TensorScheme) -> dict[str, Any]:
    args = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.grid == "int" else "float",
        "symmetric": scheme.symmetric,
    }
    return args | ({"scale_dtype": FP4[scheme.grid][2]} if scheme.fp4 else {})


def _quantizes_queries(layout: Layout) -> bool:
    return any(entry.scheme.query is not None for entry in layout.attention.values())


def _kv_cache_scheme(layout: Layout) -> dict[str, Any] | None:
    if _quantizes_queries(layout):
        return None
    for entry in layout.attention.values():
        if entry.scheme.key is not None:
            return _activation_args(entry.scheme.key, width=entry.head_dim)
    return None


def _attention_groups(layout: Layout) -> list[dict[str, Any]]:
    """The config groups of attention modules, for queries, keys and values alike."""
    if not _quantizes_queries(layout):
        return []
    arguments = {
        name: {"input_activations": _activation_args(entry.scheme.key, width=entry.head_dim)}
        for name, entry in layout.attention.items()
    }
    groups = _group_by_scheme(arguments)
    if len(groups) == 1:
        classes = sorted({entry.class_name for entry in layout.attention.values()})
        return [groups[0][0] | {"targets": classes}]
    return [group | {"targets": names} for group, names in groups]


def _group_by_scheme(
    groups: Mapping[str, dict[str, Any]],
) -> list[tuple[dict[str, Any], list[str]]]:
    """Distinct groups, in order of appearance, each with the names that have it."""
    result: list[tuple[dict[str, Any], list[str]]] = []
    for name, group in groups.items():
        for known, names in result:
            if known == group:
                names.append(name)
                break
        else:
            result.append((group, [name]))
    return result


def _targets(names: Collection[str], layout: Layout) -> list[str]:
    """`Linear` if these are all, else a pattern for what is the same at every depth, else names."""
    if set(layout.linears) == set(names):
        return ["Linear"]
    patterns: dict[str, set[str]] = {}
    for name in names:
        patterns.setdefault(_pattern(name), set()).add(name)
    siblings: dict[str, set[str]] = {}
    for name in (*layout.linears, *layout.unquantized):
        siblings.setdefault(_pattern(name), set()).add(name)
    targets: list[str] = []
    for pattern, members in patterns.items():
        whole = len(members) > 1 and members == siblings[pattern]
        targets += [f"re:{pattern}$"] if whole else sorted(members)
    return targets


def _pattern(name: str) -> str:
    """A regular expression for the module at any depth: numbers between dots become `[0-9]+`."""
    parts = ("[0-9]+" if part.isdigit() else re.escape(part) for part in name.split("."))
    return r"\.".join(parts)
