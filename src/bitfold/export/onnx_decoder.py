"""The decoders of bitfold's families as ONNX graphs, block by block as transformers computes them, in float32."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitfold.errors import ExportError
from bitfold.export import onnx_basic as basic
from bitfold.export.onnx_attention import (
    Inputs,
    attend,
    declare_inputs,
    rotary,
    seen,
    turn,
)
from bitfold.export.onnx_graph import Graph
from bitfold.export.onnx_linear import Linears
from bitfold.export.reading import StoredModel
from bitfold.models.family import head_counts

__all__ = ["DECODERS", "add_decoder"]

# Where a family keeps how many tokens a layer sees back, and which layers do.
_ALL, _WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class _Decoder:
    """What a graph is written with."""

    graph: Graph
    linear: Linears
    model: StoredModel
    config: Any
    inputs: Inputs
    step: Callable[[str], None]


def add_decoder(
    graph: Graph,
    linears: Linears,
    model: StoredModel,
    config: PretrainedConfig,
    step: Callable[[str], None],
) -> None:
    """Write a model's inputs, nodes, weights and outputs. step: told of each block, and of what is around them.

    Raises ExportError for a family, or a setting of one, that is not written here.
    """
    kind = config.model_type
    if kind not in DECODERS:
        raise ExportError(
            f"ONNX is written for {', '.join(DECODERS)}, not for '{kind}': use another --to, or another model."
        )
    decoder = _Decoder(graph, linears, model, config, declare_inputs(graph, config), step)
    logits = DECODERS[kind](decoder)
    graph.op("Cast", logits, to=1, out="logits")  # 1: float32
    made: Any = config
    _, kv_heads, head_dim = head_counts(config)
    graph.output("logits", torch.float32, ("batch", "length", made.vocab_size))
    for layer in range(made.num_hidden_layers):
        for part in ("key", "value"):
            shape = ("batch", kv_heads, "total", head_dim)
            graph.output(f"present.{layer}.{part}", graph.dtype, shape)


# -- Llama and its relatives -----------------------------------------------------------------------


def _llama(decoder: _Decoder) -> str:
    return _gated(decoder)


def _gemma(decoder: _Decoder) -> str:
    return _gated(decoder, offset=1.0)


def _gated(d: _Decoder, offset: float = 0.0) -> str:
    """Pre-norm blocks with rotary embedding and a gated MLP. offset: what a norm's stored gain lacks."""
    config, graph, linear = d.config, d.graph, d.linear
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError("The model sees tokens that follow, which ONNX is written without.")
    d.step("model.embed_tokens")
    x = _embedding(d, "model.embed_tokens.weight")
    if offset:
        x = graph.op("Mul", x, graph.number(config.hidden_size**0.5, graph.dtype))
    kinds = _layer_kinds(config)
    masks = {k: seen(graph, d.inputs, _window(config, k)) for k in dict.fromkeys(kinds)}
    several = _ALL in config.rope_parameters or _WINDOW in config.rope_parameters
    angles = {
        kind: rotary(graph, config, d.inputs.positions, kind if several else None)
        for kind in dict.fromkeys(kinds if several else [_ALL])
    }
    after = config.model_type == "gemma3_text"  # a norm after each half too
    for layer, kind in enumerate(kinds):
        name = f"model.layers.{layer}"
        d.step(name)
        graph.scope = name
        turned = angles[kind if several else _ALL]
        y = _rms_norm(d, f"{name}.input_layernorm", x, offset)
        query, key, value = (linear(f"{name}.self_attn.{p}_proj", y) for p in "qkv")
        query, key = (
            turn(
                graph, _head_norm(d, f"{name}.self_attn.{p}_norm", h, count, offset), turned, count
            )
            for p, h, count in zip("qk", (query, key), head_counts(config), strict=False)
        )
        y = attend(
            graph, (query, key, value), masks[kind], layer, config,
            scale=_scale(config), softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        )  # fmt: skip
        y = linear(f"{name}.self_attn.o_proj", y)
        if after:
            y = _rms_norm(d, f"{name}.post_attention_layernorm", y, offset)
        x = graph.op("Add", x, y)
        before_mlp = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
        y = _rms_norm(d, f"{name}.{before_mlp}", x, offset)
        gate = _activated(d, linear(f"{name}.mlp.gate_proj", y))
        y = graph.op("Mul", gate, linear(f"{name}.mlp.up_proj", y))
        y = linear(f"{name}.mlp.down_proj", y)
        if after:
            y = _rms_norm(d, f"{name}.post_feedforward_layernorm", y, offset)
        x = graph.op("Add", x, y)
    d.step("lm_head")
    graph.scope = "model"
    logits = _head(d, _rms_norm(d, "model.norm", x, offset), "model.embed_tokens.weight")
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = graph.cast(logits, torch.float32)
        logits = graph.op("Tanh", graph.op("Div", logits, graph.number(cap)))
        logits = graph.op("Mul", logits, graph.number(cap))
    return logits


def _layer_kinds(config: Any) -> list[str]:
    """Of each layer: whether it sees all tokens, or a window of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        if odd := set(kinds) - {_ALL, _WINDOW}:
            raise ExportError(
                f"The model has layers of type '{min(odd)}', which ONNX is written without."
            )
        return list(kinds)
    windowed = getattr(config, "sliding_window", None) and config.model_type == "mistral"
    return [_WINDOW if windowed else _ALL] * config.num_hidden_layers


def _window(config: Any, kind: str) -> int | None:
    return int(config.sliding_window) if kind == _WINDOW else None


def _scale(config: Any) -> float:
    """What scores are multiplied with."""
    if config.model_type == "gemma3_text":
        return float(config.query_pre_attn_scalar**-0.5)
    return float(head_counts(config)[2] ** -0.5)


# -- OPT -------------------------------------------------------------------------------------------


def _opt(d: _Decoder) -> str:
    """Norms before or after each half, learned positions that begin at 2, biases."""
    config, graph, linear = d.config, d.graph, d.linear
    prefix, first = "model.decoder", config.do_layer_norm_before
    d.step(f"{prefix}.embed_tokens")
    x = _embedding(d, f"{prefix}.embed_tokens.weight")
    if config.word_embed_proj_dim != config.hidden_size:
        x = linear(f"{prefix}.project_in", x)
    places = graph.op("Add", d.inputs.positions, graph.integers(2))
    x = graph.op("Add", x, _embedding(d, f"{prefix}.embed_positions.weight", places))
    mask = seen(graph, d.inputs, None)
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}.layers.{layer}"
        d.step(name)
        graph.scope = name
        y = _layer_norm(d, f"{name}.self_attn_layer_norm", x) if first else x
        query, key, value = (linear(f"{name}.self_attn.{p}_proj", y) for p in "qkv")
        y = attend(graph, (query, key, value), mask, layer, config, scale=_scale(config))
        x = graph.op("Add", x, linear(f"{name}.self_attn.out_proj", y))
        x = x if first else _layer_norm(d, f"{name}.self_attn_layer_norm", x)
        y = _layer_norm(d, f"{name}.final_layer_norm", x) if first else x
        y = linear(f"{name}.fc2", _activated(d, linear(f"{name}.fc1", y)))
        x = graph.op("Add", x, y)
        x = x if first else _layer_norm(d, f"{name}.final_layer_norm", x)
    d.step("lm_head")
    graph.scope = "model"
    if first and not getattr(config, "_remove_final_layer_norm", False):
        x = _layer_norm(d, f"{prefix}.final_layer_norm", x)
    if config.word_embed_proj_dim != config.hidden_size:
        x = linear(f"{prefix}.project_out", x)
    return _head(d, x, f"{prefix}.embed_tokens.weight")


# -- parts -----------------------------------------------------------------------------------------


def _embedding(d: _Decoder, name: str, indices: str | None = None) -> str:
    """Rows of a matrix, [batch, length, …] float32."""
    value = d.model.read(name)
    if not isinstance(value, Tensor):
        value = value.dequantize(torch.float32)
    matrix, dtype = d.linear.matrix(name, value)
    rows = d.graph.op("Gather", matrix, indices or d.inputs.tokens)
    return rows if dtype == d.graph.dtype else d.graph.cast(rows, d.graph.dtype)


def _head(d: _Decoder, x: str, embedding: str) -> str:
    return d.linear("lm_head", x, weight=embedding if d.config.tie_word_embeddings else None)


def _rms_norm(d: _Decoder, name: str, x: str, offset: float) -> str:
    gain = d.linear.vector(f"{name}.weight", offset=offset)
    epsilon = float(d.config.rms_norm_eps)
    with d.graph.within(name):
        if d.graph.basic:
            return basic.rms_norm(d.graph, x, gain, epsilon)
        return d.graph.op("RMSNormalization", x, gain, axis=-1, epsilon=epsilon)


def _head_norm(d: _Decoder, name: str, x: str, heads: int, offset: float) -> str:
    """A norm of each head, where the model has one."""
    if f"{name}.weight" not in d.model.checkpoint.tensors:
        return x
    graph, head_dim = d.graph, head_counts(d.config)[2]
    x = graph.op("Reshape", x, graph.integers(0, 0, heads, head_dim))
    x = _rms_norm(d, name, x, offset)
    return graph.op("Reshape", x, graph.integers(0, 0, heads * head_dim))


def _layer_norm(d: _Decoder, name: str, x: str) -> str:
    if f"{name}.weight" in d.model.checkpoint.tensors:
        parts = [d.linear.vector(f"{name}.weight"), d.linear.vector(f"{name}.bias")]
    else:
        parts = [d.graph.constant(torch.ones(d.config.hidden_size).numpy())]
    with d.graph.within(name):
        if d.graph.basic:
            return basic.layer_norm(d.graph, x, parts, 1e-5)
        return d.graph.op("LayerNormalization", x, *parts, axis=-1, epsilon=1e-5)


def _activated(d: _Decoder, x: str) -> str:
    config, graph = d.config, d.graph
    names = ("hidden_activation", "activation_function", "hidden_act")
    asked = next(a for a in (getattr(config, name, None) for name in names) if a)
    if asked in ("silu", "swish"):
        return graph.op("Mul", x, graph.op("Sigmoid", x))
    if asked == "relu":
        return graph.op("Relu", x)
    if asked in ("gelu", "gelu_pytorch_tanh", "gelu_new"):
        return graph.op("Gelu", x, approximate="none" if asked == "gelu" else "tanh")
    raise ExportError(f"The model's activation is {asked}, which ONNX is written without.")


DECODERS: Mapping[str, Callable[[_Decoder], str]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _gemma,
    "gemma3_text": _gemma,
    "opt": _opt,
}
