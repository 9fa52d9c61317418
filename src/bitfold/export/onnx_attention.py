"""Attention in ONNX: which tokens are seen, the rotary embedding, and the cache that comes in and goes out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitfold.errors import ExportError
from bitfold.export import onnx_basic as basic
from bitfold.export.onnx_graph import Graph
from bitfold.models.family import head_counts

__all__ = [
    "Inputs",
    "Rotary",
    "attend",
    "declare_inputs",
    "rotary",
    "rotary_frequencies",
    "seen",
    "turn",
]

# Those whose angles do not change with the length of the text.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Inputs:
    """Names of the graph's inputs. cache: (key, value) of each layer, [batch, KV heads, past, head_dim]."""

    tokens: str
    mask: str
    positions: str
    cache: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rotary:
    """Names of cosines and sines [batch, length, head_dim / 2]."""

    cosine: str
    sine: str


def declare_inputs(graph: Graph, config: PretrainedConfig) -> Inputs:
    """input_ids and position_ids [batch, length]; attention_mask [batch, total], 1 where there is a token; and the
    cache, of which there are `past` = total − length tokens."""
    _, kv_heads, head_dim = head_counts(config)
    shape = ("batch", kv_heads, "past", head_dim)
    dtype = graph.dtype
    tokens = graph.input("input_ids", torch.int64, ("batch", "length"))
    mask = graph.input("attention_mask", torch.int64, ("batch", "total"))
    positions = graph.input("position_ids", torch.int64, ("batch", "length"))
    layers: Any = range(config.num_hidden_layers)
    cache = tuple(
        (
            graph.input(f"past_key_values.{i}.key", dtype, shape),
            graph.input(f"past_key_values.{i}.value", dtype, shape),
        )
        for i in layers
    )
    return Inputs(tokens, mask, positions, cache)


def seen(graph: Graph, inputs: Inputs, window: int | None) -> str:
    """What is added to scores, [batch, 1, length, total]: 0, or float32's least for a token that is not seen, being
    none, behind, or `window` tokens or more before."""
    past = graph.op("Squeeze", graph.op("Shape", inputs.cache[0][0], start=2, end=3))
    length = graph.op("Squeeze", graph.op("Shape", inputs.tokens, start=1, end=2))
    total = graph.op("Add", past, length)
    nothing, one = (graph.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    keys = graph.op("Range", nothing, total, one)
    queries = graph.op("Unsqueeze", graph.op("Range", past, total, one), graph.integers(1))
    allowed = graph.op("LessOrEqual", keys, queries)
    if window is not None:
        least = graph.op("Sub", queries, graph.constant(np.array(window, dtype=np.int64)))
        allowed = graph.op("And", allowed, graph.op("Greater", keys, least))
    there = graph.op("Unsqueeze", graph.cast(inputs.mask, torch.bool), graph.integers(1, 2))
    allowed = graph.op("And", allowed, there)
    least_float = graph.number(torch.finfo(torch.float32).min)
    return graph.op("Where", allowed, graph.number(0), least_float)


def rotary(
    graph: Graph, config: PretrainedConfig, positions: str, kind: str | None = None
) -> Rotary:
    """The angles of all positions. kind: of layers, where a config has a rotary embedding for each.

    Raises ExportError for angles that change with the length of the text.
    """
    inverse, scaling = rotary_frequencies(config, kind)
    places = graph.op("Unsqueeze", graph.cast(positions, torch.float32), graph.integers(-1))
    angles = graph.op("Mul", places, graph.constant(inverse.float().numpy()))
    cosine, sine = graph.op("Cos", angles), graph.op("Sin", angles)
    if scaling != 1.0:
        factor = graph.number(scaling)
        cosine, sine = graph.op("Mul", cosine, factor), graph.op("Mul", sine, factor)
    if graph.dtype != torch.float32:
        cosine, sine = graph.cast(cosine, graph.dtype), graph.cast(sine, graph.dtype)
    return Rotary(cosine, sine)


def turn(graph: Graph, x: str, angles: Rotary, heads: int) -> str:
    """x [batch, length, heads · head_dim] with each pair (half a head apart) turned by its angle."""
    if graph.basic:
        return basic.turn(graph, x, angles.cosine, angles.sine, heads)
    return graph.op("RotaryEmbedding", x, angles.cosine, angles.sine, num_heads=heads)


def attend(
    graph: Graph,
    heads: tuple[str, str, str],
    mask: str,
    layer: int,
    config: PretrainedConfig,
    *,
    scale: float,
    softcap: float = 0.0,
) -> str:
    """Queries, keys and values [batch, length, heads · head_dim] → [batch, length, query heads · head_dim]."""
    counts = head_counts(config)
    present = [f"present.{layer}.key", f"present.{layer}.value"]
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    if graph.basic:
        return basic.attend(graph, heads, mask, past, present, counts, scale=scale, softcap=softcap)
    return graph.ops(
        "Attention",
        [*heads, mask, *past],
        ["", *present],
        q_num_heads=counts[0],
        kv_num_heads=counts[1],
        scale=scale,
        softcap=softcap,
    )[0]


def rotary_frequencies(
    config: PretrainedConfig, kind: str | None, where: str = "ONNX"
) -> tuple[torch.Tensor, float]:
    """Of each pair, per position, and what cosines and sines are multiplied with.

    kind: of layers, where a config has a rotary embedding for each. Raises ExportError for angles that change with the
    length of the text, which are not written in `where`.
    """
    parameters: Mapping[str, Any] = config.rope_parameters
    mine = parameters if kind is None else parameters[kind]
    name = mine.get("rope_type", "default")
    if name not in _FIXED_ROTARY or mine.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"The model's rotary embedding is of type '{name}', and {where} is written with "
            f"{', '.join(_FIXED_ROTARY)} of whole heads: use another --to."
        )
    if name == "default":
        head_dim = head_counts(config)[2]
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (mine["rope_theta"] ** pairs), 1.0
    more = {} if kind is None else {"layer_type": kind}
    inverse, scaling = ROPE_INIT_FUNCTIONS[name](config, **more)
    return inverse, float(scaling)
