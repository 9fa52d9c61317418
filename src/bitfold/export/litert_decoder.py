"""Decoders of Llama's kind as a graph of LiteRT, block by block as transformers computes them, in float32.

Inputs: `tokens` [1, length] and `input_pos` [length] int32, their positions; `past_key_N` and `past_value_N`
[1, KV heads, context, head_dim]. Outputs: `logits` [1, length, vocabulary] and `present_key_N`, `present_value_N`, the
same with what is new in its place. A graph is of one length at a time: an interpreter resizes its inputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitfold.errors import ExportError
from bitfold.export.litert_graph import TfGraph
from bitfold.export.litert_linear import TfLinears
from bitfold.export.onnx_attention import rotary_frequencies
from bitfold.export.reading import StoredModel
from bitfold.models.family import head_counts

__all__ = ["LITERT_FAMILIES", "LiteRtDecoder", "check_litert"]

LITERT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def check_litert(config: PretrainedConfig) -> None:
    """Raises ExportError for a model that is not written here."""
    made: Any = config
    if config.model_type not in LITERT_FAMILIES:
        raise ExportError(
            f"LiteRT is written for {', '.join(LITERT_FAMILIES)}, not for '{config.model_type}': use another --to "
            "(executorch), or another model."
        )
    kinds = set(getattr(made, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ExportError(
            f"The model has layers of type '{min(kinds - {'full_attention'})}', which LiteRT is written without: use "
            "another --to (executorch)."
        )
    if made.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"The model's activation is {made.hidden_act}, which LiteRT is written without: use another --to."
        )


class LiteRtDecoder:
    """Writes a model's inputs, operators, weights and outputs. step: told of each block, and of what is around them."""

    def __init__(
        self,
        graph: TfGraph,
        linears: TfLinears,
        model: StoredModel,
        config: PretrainedConfig,
        context: int,
        step: Callable[[str], None],
    ) -> None:
        check_litert(config)
        self._graph, self._linear, self._model, self._step = graph, linears, model, step
        self._config: Any = config
        self._context = context
        self._heads, self._kv_heads, self._head_dim = head_counts(config)

    def write(self) -> None:
        """All of it."""
        graph, config = self._graph, self._config
        hidden = config.hidden_size
        tokens = graph.input("tokens", "INT32", (1, -1))
        places = graph.input("input_pos", "INT32", (-1,))
        self._step("model.embed_tokens")
        table = self._linear.table("model.embed_tokens.weight")
        rows = graph.op("GATHER", (1, -1, hidden), table, tokens, axis=0)
        x = self._reshape(rows, -1, hidden)
        self._prepare(places)
        present = []
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            self._step(name)
            y = self._norm(f"{name}.input_layernorm", x, (-1, hidden))
            y, kept = self._attention(layer, f"{name}.self_attn", y)
            present += kept
            x = graph.op("ADD", (-1, hidden), x, y)
            y = self._norm(f"{name}.post_attention_layernorm", x, (-1, hidden))
            wide = (-1, config.intermediate_size)
            gate = self._linear(f"{name}.mlp.gate_proj", y)
            gate = graph.op("MUL", wide, gate, graph.op("LOGISTIC", wide, gate))
            y = graph.op("MUL", wide, gate, self._linear(f"{name}.mlp.up_proj", y))
            x = graph.op("ADD", (-1, hidden), x, self._linear(f"{name}.mlp.down_proj", y))
        self._step("lm_head")
        x = self._norm("model.norm", x, (-1, hidden))
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        logits = self._linear("lm_head", x, weight=tied)
        graph.output("logits", self._reshape(logits, 1, -1, config.vocab_size))
        for name, value in present:
            graph.output(name, value)

    # -- what all blocks share ---------------------------------------------------------------------

    def _prepare(self, places: int) -> None:
        """Where new keys go, which tokens are seen, and the rotary embedding's angles."""
        graph, context = self._graph, self._context
        first = graph.op("SLICE", (1,), places, graph.integers(0), graph.integers(1), dtype="INT32")
        nothing = graph.integers(0, 0)
        start = (nothing, first, graph.integers(0))
        self._start = graph.op("CONCATENATION", (4,), *start, dtype="INT32", axis=0)

        column = graph.op("RESHAPE", (-1, 1), places, graph.integers(-1, 1), dtype="INT32")
        keys = graph.constant(np.arange(context, dtype=np.int32)[None])
        allowed = graph.op("LESS_EQUAL", (-1, context), keys, column, dtype="BOOL")
        window = getattr(self._config, "sliding_window", None)
        if window and self._config.model_type == "mistral":
            least = graph.op("SUB", (-1, 1), column, graph.integers(window), dtype="INT32")
            near = graph.op("GREATER", (-1, context), keys, least, dtype="BOOL")
            allowed = graph.op("LOGICAL_AND", (-1, context), allowed, near, dtype="BOOL")
        unseen = graph.number(torch.finfo(torch.float32).min)
        self._mask = graph.op("SELECT_V2", (-1, context), allowed, graph.number(0), unseen)

        inverse, scaling = rotary_frequencies(self._config, None, "LiteRT")
        half = self._head_dim // 2
        at = graph.op("CAST", (-1, 1), column)
        angles = graph.op("MUL", (-1, half), at, graph.constant(inverse.float().numpy()[None]))
        turned = []
        for kind in ("COS", "SIN"):
            value = graph.op(kind, (-1, half), angles)
            if scaling != 1.0:
                value = graph.op("MUL", (-1, half), value, graph.number(scaling))
            turned.append(value)
        self._cosine, self._sine = turned

    # -- attention ---------------------------------------------------------------------------------

    def _attention(self, layer: int, name: str, x: int) -> tuple[int, list[tuple[str, int]]]:
        """x [length, hidden] → [length, hidden], and the cache that goes out."""
        graph, size, context = self._graph, self._head_dim, self._context
        heads, kv_heads = self._heads, self._kv_heads
        query = self._by_head(self._linear(f"{name}.q_proj", x), heads, f"{name}.q_norm")
        key = self._by_head(self._linear(f"{name}.k_proj", x), kv_heads, f"{name}.k_norm")
        value = self._by_head(self._linear(f"{name}.v_proj", x), kv_heads, None)
        query, key = self._turn(query, heads), self._turn(key, kv_heads)
        query = graph.op("MUL", (heads, -1, size), query, graph.number(size**-0.5))
        shape = (1, kv_heads, context, size)
        kept = []
        for kind, new in (("key", key), ("value", value)):
            past = graph.input(f"past_{kind}_{layer}", "FLOAT32", shape)
            update = self._reshape(new, 1, kv_heads, -1, size)
            now = graph.op("DYNAMIC_UPDATE_SLICE", shape, past, update, self._start)
            kept.append((f"present_{kind}_{layer}", now))
        # Queries that share a KV head are rows of one matrix.
        shared = self._reshape(query, 1, kv_heads, -1, size)
        scores = graph.op("BATCH_MATMUL", (1, kv_heads, -1, context), shared, kept[0][1], adjY=True)
        scores = self._reshape(scores, heads, -1, context)
        scores = graph.op("ADD", (heads, -1, context), scores, self._mask)
        shares = graph.op("SOFTMAX", (heads, -1, context), scores, beta=1.0)
        shares = self._reshape(shares, 1, kv_heads, -1, context)
        result = graph.op("BATCH_MATMUL", (1, kv_heads, -1, size), shares, kept[1][1])
        result = self._reshape(result, heads, -1, size)
        result = graph.op("TRANSPOSE", (-1, heads, size), result, graph.integers(1, 0, 2))
        return self._linear(f"{name}.o_proj", self._reshape(result, -1, heads * size)), kept

    def _by_head(self, x: int, heads: int, norm: str | None) -> int:
        """[length, heads · head_dim] → [heads, length, head_dim], each head normed where the model has such a norm."""
        x = self._reshape(x, -1, heads, self._head_dim)
        if norm is not None and f"{norm}.weight" in self._model.checkpoint.tensors:
            x = self._norm(norm, x, (-1, heads, self._head_dim))
        order = self._graph.integers(1, 0, 2)
        return self._graph.op("TRANSPOSE", (heads, -1, self._head_dim), x, order)

    def _turn(self, x: int, heads: int) -> int:
        """x [heads, length, head_dim] with each pair, half a head apart, turned by its angle."""
        graph = self._graph
        half = (heads, -1, self._head_dim // 2)
        axis = graph.constant(np.array(2, dtype=np.int32))
        first, second = graph.ops("SPLIT", [half, half], axis, x, numSplits=2)

        def sum_of(kind: str, one: int, other: int) -> int:
            left = graph.op("MUL", half, one, self._cosine)
            return graph.op(kind, half, left, graph.op("MUL", half, other, self._sine))

        parts = (sum_of("SUB", first, second), sum_of("ADD", second, first))
        return graph.op("CONCATENATION", (heads, -1, self._head_dim), *parts, axis=2)

    # -- parts -------------------------------------------------------------------------------------

    def _norm(self, name: str, x: int, shape: tuple[int, ...]) -> int:
        """x over its root mean square, times a gain."""
        graph = self._graph
        gain = self._model.read(f"{name}.weight")
        assert isinstance(gain, Tensor)
        weight = graph.weight(f"{name}.weight", gain.float().numpy(), "FLOAT32")
        one = (*shape[:-1], 1)
        square = graph.op("MUL", shape, x, x)
        axis = graph.integers(len(shape) - 1)
        mean = graph.op("MEAN", one, square, axis, keepDims=True)
        epsilon = graph.number(float(self._config.rms_norm_eps))
        root = graph.op("RSQRT", one, graph.op("ADD", one, mean, epsilon))
        return graph.op("MUL", shape, graph.op("MUL", shape, x, root), weight)

    def _reshape(self, x: int, *shape: int) -> int:
        return self._graph.op(
            "RESHAPE", shape, x, self._graph.integers(*shape), newShape=list(shape)
        )
