"""Tiny random models, rounded to nearest, written by an export format, and simulated without it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitfold.export.layout import (
    AttentionEntry,
    Choice,
    LayerEntry,
    Layout,
    Refusal,
    input_tensors,
)
from bitfold.numerics import (
    QuantizedTensor,
    Scheme,
    TensorScheme,
    global_scale,
    scale_and_zero,
    scale_dtype_of,
    to_groups,
)
from bitfold.numerics.activation import quantize_input
from bitfold.numerics.scheme import GridName
from bitfold.runtime.attention import ATTENTION, HeadQuantizers, set_head_quantizers
from models_zoo import TOKENS

__all__ = [
    "Quantized",
    "SchemeOf",
    "assert_same_tensor",
    "by_depth",
    "by_kind",
    "everywhere",
    "load",
    "logits",
    "quantize",
    "quantizes_at_run_time",
    "scheme",
    "simulate",
    "tiny_layout",
    "weights",
    "without_activations",
    "write",
]

SchemeOf = Callable[[str], Scheme]
"""The scheme of a linear layer or an attention module, given its name."""


@dataclass(frozen=True)
class Quantized:
    """A checkpoint, its layout with calibrated static activations, and its rounded weights."""

    checkpoint: Path
    layout: Layout
    weights: Mapping[str, QuantizedTensor]


def scheme(
    notation: str, *, symmetric: bool = False, static: bool = False, **weight: Any
) -> Scheme:
    """`Scheme.parse`, with symmetric weights, static activations, or other fields of the weight."""
    parsed = Scheme.parse(notation)
    changes: dict[str, Any] = {}
    if parsed.weight is not None:
        changes["weight"] = parsed.weight.model_copy(
            update=({"symmetric": True} if symmetric else {}) | weight
        )
    if static and parsed.activation is not None:
        changes["activation"] = TensorScheme.model_validate(
            parsed.activation.model_dump() | {"granularity": "tensor", "static": True}
        )
    return parsed.model_copy(update=changes)


def everywhere(uniform: Scheme) -> SchemeOf:
    """One scheme in every block."""
    return lambda name: uniform


def by_kind(attention: Scheme, others: Scheme) -> SchemeOf:
    """One scheme for attention, another for the rest of the block."""
    return lambda name: attention if "self_attn" in name else others


def by_depth(first: Scheme, others: Scheme) -> SchemeOf:
    """One scheme for the first block, another for the others."""
    return lambda name: first if ".0." in name else others


def tiny_layout(scheme_of: SchemeOf) -> Layout:
    """Three blocks of two attention projections and one other layer, without a model."""
    linears, attention = {}, {}
    for layer in range(3):
        block = f"model.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            linears[f"{block}.{name}"] = LayerEntry(scheme_of(f"{block}.{name}"), 64)
        attention[f"{block}.self_attn"] = AttentionEntry(
            scheme_of(f"{block}.self_attn"), 16, "LlamaAttention"
        )
    return Layout(linears, attention, ("lm_head",))


def quantize(checkpoint: Path, scheme_of: SchemeOf) -> Quantized:
    """Round a checkpoint to nearest, scales in its own dtype."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    layout = _calibrate(plain, _layout_of(plain, scheme_of))
    weights = {
        name: _round(plain.get_submodule(name).weight.detach(), entry.scheme.weight)
        for name, entry in layout.linears.items()
        if entry.scheme.weight is not None
    }
    return Quantized(checkpoint, layout, weights)


def _layout_of(model: PreTrainedModel, scheme_of: SchemeOf) -> Layout:
    linears, attention, unquantized = {}, {}, []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            attention[name] = AttentionEntry(
                scheme_of(name), module.head_dim, type(module).__name__
            )
        if isinstance(module, nn.Linear):
            wanted = scheme_of(name) if ".layers." in name else Scheme()
            if wanted.weight is None and wanted.activation is None:
                unquantized.append(name)
            else:
                linears[name] = LayerEntry(wanted, module.in_features)
    flattened = ("fc1", "fc2") if model.config.model_type == "opt" else ()
    return Layout(linears, attention, unquantized, flattened, storage=model.dtype)


def _round(weight: Tensor, scheme: TensorScheme) -> QuantizedTensor:
    low, high = torch.aminmax(to_groups(weight.float(), scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight.float(), low, high, scheme, weight.dtype)


def _calibrate(model: PreTrainedModel, layout: Layout) -> Layout:
    """Static activations get three quarters of the range that the plain model shows them."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
        for name in layout.linears
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    linears = {n: _with_range(entry, inputs[n]) for n, entry in layout.linears.items()}
    return replace(layout, linears=linears)


def _with_range(entry: LayerEntry, x: Tensor) -> LayerEntry:
    scheme = entry.scheme.activation
    if scheme is None or not scheme.calibrated:
        return entry
    if not scheme.static:
        return replace(entry, input_scale=global_scale(0.75 * x.abs()))
    low, high = (0.75 * limit.reshape(1) for limit in x.float().aminmax())
    scale, zero = scale_and_zero(low, high, scheme, scale_dtype=x.dtype)
    return replace(
        entry,
        input_scale=scale.to(x.dtype),
        input_zero=None if zero is None else zero.to(torch.int8),
    )


def write(quantized: Quantized, out: Path, export: ModuleType) -> Choice:
    """The artifact: the checkpoint's other tensors, the export format's, and its config."""
    layout = quantized.layout
    choice = export.choose(layout)
    assert not isinstance(choice, Refusal), choice
    tensors = load_file(quantized.checkpoint / "model.safetensors")
    for name, entry in layout.linears.items():
        tensors |= input_tensors(name, entry)
        if name in quantized.weights:
            del tensors[f"{name}.weight"]
            tensors |= export.to_tensors(name, quantized.weights[name], choice.formats[name])
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((quantized.checkpoint / "config.json").read_text())
    settings |= export.extra_config(layout, settings)
    settings["quantization_config"] = export.config(layout, choice)
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    return choice


def simulate(quantized: Quantized, choice: Choice, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model with dequantized weights, hooks before its layers and quantized attention."""
    model = AutoModelForCausalLM.from_pretrained(
        quantized.checkpoint, attn_implementation=ATTENTION, dtype=dtype
    ).eval()
    for name, tensor in quantized.weights.items():
        unpacked_in = quantized.layout.storage if choice.dequantize else dtype
        model.get_submodule(name).weight.data = tensor.dequantize(unpacked_in).to(dtype)
    for name, entry in quantized.layout.linears.items():
        if entry.scheme.activation is not None:
            model.get_submodule(name).register_forward_pre_hook(_input_hook(entry))
    for name, attention in quantized.layout.attention.items():
        set_head_quantizers(model.get_submodule(name), HeadQuantizers.of(attention.scheme))
    return model


def _input_hook(entry: LayerEntry) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    scheme = entry.scheme.activation
    assert scheme is not None
    return lambda _, args: (quantize_input(args[0], scheme, entry.input_scale, entry.input_zero),)


def quantizes_at_run_time(layout: Layout) -> bool:
    """Whether any input, query, key or value is quantized."""
    return any(entry.scheme.activation is not None for entry in layout.linears.values()) or any(
        entry.scheme.quantizes_attention for entry in layout.attention.values()
    )


def without_activations(quantized: Quantized) -> Quantized:
    """The same weights, with nothing quantized at run time."""
    layout = quantized.layout
    linears = {
        name: replace(entry, scheme=Scheme(weight=entry.scheme.weight))
        for name, entry in layout.linears.items()
    }
    attention = {n: replace(entry, scheme=Scheme()) for n, entry in layout.attention.items()}
    return replace(quantized, layout=replace(layout, linears=linears, attention=attention))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    """As a user would; every tensor must find its place."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    """[2, 24, vocabulary]"""
    with torch.no_grad():
        return model(TOKENS).logits


@st.composite
def weights(draw: st.DrawFn, grids: Sequence[GridName]) -> QuantizedTensor:
    """Random codes, scales and zero-points of a random scheme."""
    grid = draw(st.sampled_from(grids))
    sizes = {"mxfp4": 32, "nvfp4": 16}
    granularity = "group"
    if grid not in sizes:
        granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = sizes.get(grid) or draw(st.sampled_from([2, 3, 8, 32]))
    rows, columns = draw(st.integers(1, 70)), size * draw(st.integers(1, 6))
    scheme = TensorScheme(
        grid=grid,
        bits={"int": draw(st.integers(2, 8)), "fp8_e4m3": 8}.get(grid, 4),
        symmetric=grid != "int" or draw(st.booleans()),
        granularity=granularity,
        group_size=size if granularity == "group" else None,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random(shape: tuple[int, ...]) -> Tensor:
        codes = torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator)
        return codes.to(torch.int8)

    codes = {
        "int": lambda: random((rows, columns)),
        "fp8_e4m3": lambda: random((rows, columns)).view(torch.float8_e4m3fn),
    }.get(grid, lambda: (random((rows, columns)) + 8).to(torch.uint8))()
    shape = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // size)}[granularity]
    storage = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return QuantizedTensor(
        codes,
        torch.rand(shape, generator=generator).to(scale_dtype_of(scheme, storage)),
        None if scheme.symmetric else random(shape),
        scheme,
        global_scale=torch.tensor([2.0 ** draw(st.integers(-9, 9))]) if grid == "nvfp4" else None,
    )


def assert_same_tensor(left: QuantizedTensor, right: QuantizedTensor) -> None:
    """Same values in the same dtypes, to the bit."""
    assert left.scheme == right.scheme
    for name in ("codes", "scale", "zero", "global_scale", "codebook", "kept", "columns"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
