"""Norms, rotary embedding and attention out of nodes that every engine has: what opset 23 has as single nodes.

Sums are in float32, whatever the graph computes in.
"""

from collections.abc import Sequence

import torch

from bitfold.export.onnx_graph import Graph

__all__ = ["attend", "layer_norm", "rms_norm", "turn"]


def rms_norm(graph: Graph, x: str, gain: str, epsilon: float) -> str:
    """x [..., n] over its root mean square, times a gain [n] float32."""
    x = graph.cast(x, torch.float32)
    square = graph.op("ReduceMean", graph.op("Mul", x, x), graph.integers(-1), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", square, graph.number(epsilon)))
    return graph.cast(graph.op("Mul", graph.op("Div", x, root), gain), graph.dtype)


def layer_norm(graph: Graph, x: str, parts: Sequence[str], epsilon: float) -> str:
    """LayerNorm; parts: its gain and bias [n] float32, if it has one."""
    x = graph.cast(x, torch.float32)
    x = graph.op("LayerNormalization", x, *parts, axis=-1, epsilon=epsilon)
    return graph.cast(x, graph.dtype)


def turn(graph: Graph, x: str, cosine: str, sine: str, heads: int) -> str:
    """x [batch, length, heads · head_dim] with each pair turned, which is half a head apart; cosines and sines
    [batch, length, head_dim / 2]."""
    shape = graph.op("Shape", x)
    x = graph.op("Reshape", x, graph.integers(0, 0, heads, -1))
    first, second = graph.ops("Split", [x], ["", ""], axis=-1, num_outputs=2)
    c, s = (graph.op("Unsqueeze", angle, graph.integers(2)) for angle in (cosine, sine))
    left = graph.op("Sub", graph.op("Mul", first, c), graph.op("Mul", second, s))
    right = graph.op("Add", graph.op("Mul", second, c), graph.op("Mul", first, s))
    return graph.op("Reshape", graph.op("Concat", left, right, axis=-1), shape)


def attend(
    graph: Graph,
    heads: tuple[str, str, str],
    mask: str,
    past: Sequence[str],
    present: Sequence[str],
    counts: tuple[int, int, int],
    *,
    scale: float,
    softcap: float,
) -> str:
    """Queries, keys and values [batch, length, heads · head_dim] → [batch, length, query heads · head_dim].

    mask: what is added to scores. past, present: names of the cache's keys and values. counts: query heads, KV heads
    and head_dim.
    """
    query_heads, kv_heads, head_dim = counts
    query, key, value = (
        _by_head(graph, x, count, head_dim)
        for x, count in zip(heads, (query_heads, kv_heads, kv_heads), strict=True)
    )
    key = graph.op("Concat", past[0], key, axis=2, out=present[0])
    value = graph.op("Concat", past[1], value, axis=2, out=present[1])
    # Queries that share a KV head are rows of one matrix.
    shape = graph.op("Shape", query)
    shared = graph.op("Reshape", query, graph.integers(0, kv_heads, -1, head_dim))
    scores = graph.op("MatMul", shared, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    total = graph.op("Shape", key, start=2, end=3)
    first = graph.op("Slice", shape, graph.integers(0), graph.integers(3))
    scores = graph.op("Reshape", scores, graph.op("Concat", first, total, axis=0))
    scores = graph.op("Mul", graph.cast(scores, torch.float32), graph.number(scale))
    if softcap:
        scores = graph.op("Tanh", graph.op("Div", scores, graph.number(softcap)))
        scores = graph.op("Mul", scores, graph.number(softcap))
    shares = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
    shares = graph.cast(shares, graph.dtype)
    rows = graph.op("Concat", graph.integers(0, kv_heads, -1), total, axis=0)
    result = graph.op("MatMul", graph.op("Reshape", shares, rows), value)
    result = graph.op("Transpose", graph.op("Reshape", result, shape), perm=[0, 2, 1, 3])
    return graph.op("Reshape", result, graph.integers(0, 0, query_heads * head_dim))


def _by_head(graph: Graph, x: str, heads: int, head_dim: int) -> str:
    """[batch, length, heads · head_dim] → [batch, heads, length, head_dim]"""
    x = graph.op("Reshape", x, graph.integers(0, 0, heads, head_dim))
    return graph.op("Transpose", x, perm=[0, 2, 1, 3])
