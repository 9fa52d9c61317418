"""bitfold's own format, for what compressed-tensors cannot say: nf4, codebooks, clusters of channels, keys unlike
values, maps that run, fp4 beside other dtypes than bfloat16.

Loaded by `bitfold.runtime.hf_quantizer`. Each weight is packed into int32 words under the name
`weight`, so that a transformers that does not know the format stops at a shape it did not expect;
it would otherwise warn, make up the weights that it misses, and go on. `attn_implementation` in
config.json stops it even before. The tensors of a map that runs at a module NAME are NAME.online.…, which
it would drop: so there must be packed weights wherever there are such maps. What is calibrated of
an attention's queries, keys and values is NAME.key_scale, NAME.key_zero_point and so on, and NAME.value_codebook
(`bitfold.runtime.attention.head_tensors`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export.layout import Choice, Layout, Refusal, WeightFormat
from bitfold.numerics import (
    MapShape,
    QuantizedTensor,
    Scheme,
    TensorScheme,
    hadamard_size,
    pack,
    scale_dtype_of,
    unpack,
)
from bitfold.numerics.quantize import code_dtype

__all__ = [
    "NAME",
    "choose",
    "config",
    "extra_config",
    "from_tensors",
    "read_config",
    "read_online",
    "to_tensors",
    "unpack_weight",
]

NAME = "bitfold"
VERSION = 1
_DIMENSIONS = {"blocks": 2, "hadamard": 3, "kronecker": 2, "heads": 2}


def choose(layout: Layout) -> Choice | Refusal:
    """How to say the layout, or what `bitfold.runtime` cannot run."""
    for name, entry in layout.linears.items():
        weight, activation = entry.scheme.weight, entry.scheme.activation
        if weight is not None and weight.granularity == "token":
            return Refusal(f"a weight has no tokens ({name})")
        if activation is not None and activation.granularity == "channel":
            return Refusal(f"activations have no scale per channel ({name})")
        if activation is None or not activation.static:
            continue
        if activation.granularity not in ("tensor", "cluster"):
            return Refusal(f"static activations have one scale per tensor or cluster ({name})")
    if layout.online and all(entry.scheme.weight is None for entry in layout.linears.values()):
        return Refusal(
            "maps that run go with quantized weights, or else a transformers without bitfold would drop them unseen"
        )
    return Choice(
        {name: WeightFormat(NAME, _strategy(e.scheme)) for name, e in layout.linears.items()}
    )


def config(layout: Layout, choice: Choice) -> dict[str, Any]:
    """The `quantization_config` of config.json: each scheme, and the modules that have it; `online`, the maps that run,
    only where there are any."""
    del choice  # there is one way to say anything
    linears = {
        name: Scheme(weight=entry.scheme.weight, activation=entry.scheme.activation)
        for name, entry in layout.linears.items()
    }
    attention = {
        name: Scheme(query=entry.scheme.query, key=entry.scheme.key, value=entry.scheme.value)
        for name, entry in layout.attention.items()
        if entry.scheme.quantizes_attention
    }
    result: dict[str, Any] = {
        "quant_method": NAME,
        "version": VERSION,
        "linears": _by_scheme(linears),
        "attention": _by_scheme(attention),
    }
    return result | ({"online": _by_shape(layout.online)} if layout.online else {})


def read_config(settings: Mapping[str, Any]) -> tuple[dict[str, Scheme], dict[str, Scheme]]:
    """The schemes of linear layers and of attention modules, by module name, that `config` wrote.

    Raises CheckpointError for another version, or for what is no scheme.
    """
    if settings.get("version") != VERSION:
        raise CheckpointError(
            f"The artifact's format has version {settings.get('version')}, this bitfold reads "
            f"{VERSION}: use the bitfold that wrote it, or quantize again."
        )
    with _undamaged():
        linears, attention = (
            {
                module: Scheme.model_validate(group["scheme"])
                for group in settings[kind]
                for module in group["modules"]
            }
            for kind in ("linears", "attention")
        )
    return linears, attention


def read_online(settings: Mapping[str, Any]) -> dict[str, MapShape]:
    """The maps that run, by the name of the module at which they do, that `config` wrote.

    Raises CheckpointError for what is no such map.
    """
    with _undamaged():
        found: dict[str, MapShape] = {}
        for group in settings.get("online", []):
            shape = tuple(int(size) for size in group["shape"])
            if len(shape) != _DIMENSIONS[group["kind"]] or min(shape) < 1:
                raise ValueError(f"{group['kind']} of {shape}")
            if group["kind"] == "hadamard" and hadamard_size(shape[1]) != shape[1]:
                raise ValueError(f"no Hadamard matrix of size {shape[1]} is known")
            found |= dict.fromkeys(group["modules"], MapShape(group["kind"], shape))
    return found


@contextmanager
def _undamaged() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "The quantization_config of config.json is damaged "
            f"({' '.join(str(error).split())}): quantize again."
        ) from error


def extra_config(layout: Layout, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """What else config.json must say: an attention that only bitfold has (see above)."""
    del layout, model_config
    return {"attn_implementation": NAME}


def to_tensors(name: str, tensor: QuantizedTensor, format: WeightFormat) -> dict[str, Tensor]:
    """The tensors of one layer's weight [out, in]; the same for every `format`.

    NAME.weight: [out, ⌈codes·bits/32⌉] int32, packed codes (of fp8 the bytes; where codes are indices or begin at 0,
        these less half of those there could be).
    NAME.weight_shape: [2] int64, out and in.
    NAME.weight_scale: [out, groups] ([1, 1] per tensor) in the scale's dtype, or of mxfp4 and nvfp4 the bytes, uint8.
    NAME.weight_global_scale: [1] float32, of nvfp4 alone.
    NAME.weight_zero_point: [⌈out·bits/32⌉, groups] int32, packed along dim 0; asymmetric only.
    NAME.weight_codebook: [books, entries, dim] int8; codebooks only.
    NAME.weight_shift: as the scales, what is added to each group; of the grid shifted alone.
    NAME.weight_kept: [out, n] in the scale's dtype, and NAME.weight_columns: [n] int32, where columns are kept.
    """
    del format
    scheme = tensor.scheme
    result = {
        "weight": pack(_signed(tensor), scheme.code_bits),
        "weight_scale": tensor.scale.view(torch.uint8) if scheme.fp4 else tensor.scale,
        "weight_shape": torch.tensor(tensor.shape),
    }
    if tensor.global_scale is not None:
        result["weight_global_scale"] = tensor.global_scale
    if tensor.zero is not None:
        result["weight_zero_point"] = pack(tensor.zero.T, scheme.bits).T
    beside = {
        "weight_codebook": tensor.codebook,
        "weight_shift": tensor.shift,
        "weight_kept": tensor.kept,
        "weight_columns": tensor.columns,
    }
    result |= {key: value for key, value in beside.items() if value is not None}
    return {f"{name}.{key}": value.contiguous() for key, value in result.items()}


def from_tensors(
    name: str, tensors: Mapping[str, Tensor], scheme: TensorScheme, format: WeightFormat
) -> QuantizedTensor:
    """The weight that `to_tensors` wrote; `tensors` may hold others. KeyError if one is missing."""
    del format
    _, columns = tensors[f"{name}.weight_shape"].tolist()
    return unpack_weight(lambda part: tensors[f"{name}.{part}"], scheme, columns)


def unpack_weight(
    stored: Callable[[str], Tensor], scheme: TensorScheme, columns: int
) -> QuantizedTensor:
    """The weight [out, columns] behind the tensors of `to_tensors`; `stored` gives the one of a name."""
    signed = unpack(stored("weight"), scheme.code_bits, columns // scheme.values_per_code)
    dtype = code_dtype(scheme)
    half = 1 << (scheme.code_bits - 1)
    codes = signed.view(torch.uint8) + half if dtype == torch.uint8 else signed.view(dtype)
    scale, zero = stored("weight_scale"), None
    if scheme.fp4:
        scale = scale.view(scale_dtype_of(scheme, torch.float32))
    if not scheme.symmetric:
        packed = stored("weight_zero_point").T
        zero = unpack(packed, scheme.bits, scale.shape[0]).T.contiguous()
    more = {"global_scale": scheme.grid == "nvfp4", "codebook": scheme.codebook is not None}
    more |= {"shift": scheme.grid == "shifted"}
    more |= {"kept": scheme.kept > 0, "columns": scheme.kept > 0}
    beside = {part: stored(f"weight_{part}") for part, has in more.items() if has}
    return QuantizedTensor(codes, scale, zero, scheme, **beside)


def _signed(tensor: QuantizedTensor) -> Tensor:
    """Codes as the signed integers that are packed, int8."""
    codes = tensor.codes
    if codes.dtype != torch.uint8:
        return codes.view(torch.int8)
    return (codes - (1 << (tensor.scheme.code_bits - 1))).view(torch.int8)


def _strategy(scheme: Scheme) -> str:
    return "" if scheme.weight is None else scheme.weight.granularity


def _by_scheme(schemes: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """Distinct schemes, in order of appearance, each with its modules."""
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        modules.setdefault(scheme, []).append(name)
    return [
        {"scheme": scheme.model_dump(exclude_none=True), "modules": names}
        for scheme, names in modules.items()
    ]


def _by_shape(online: Mapping[str, MapShape]) -> list[dict[str, Any]]:
    """Distinct shapes, in order of appearance, each with the modules at which there is such a map."""
    modules: dict[MapShape, list[str]] = {}
    for name, shape in online.items():
        modules.setdefault(shape, []).append(name)
    return [
        {"kind": shape.kind, "shape": list(shape.shape), "modules": names}
        for shape, names in modules.items()
    ]
