"""A stored model as a program of ExecuTorch: layers in the operations that its XNNPACK backend multiplies in integers,
and a cache of a fixed number of tokens inside the program."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bitfold.export.phone_rules import block_of, half_of
from bitfold.export.reading import StoredModel
from bitfold.export.torch_decoder import Stored, seen
from bitfold.models.family import head_counts
from bitfold.numerics import QuantizedTensor

__all__ = ["CachedDecoder", "IntegerLinear", "PhoneLinears", "trace_cached"]

# A length to trace with: neither 0 nor 1, which would be taken for constants.
_LENGTH = 5


class IntegerLinear(nn.Module):
    """y = x̂ Ŵᵀ + b, x̂ rounded to 8 bits for each token with a zero-point.

    Buffers: codes [out, in] int8; scale [out], or [out, groups] where there are blocks, float32; zero int8 zeros in
    that shape. XNNPACK's partitioner takes these operations for one layer, and stores the codes (4 bits in halves of a
    byte, 8 more than they are) and the scales (of blocks in bfloat16) as they are given.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, value: QuantizedTensor, scale: Tensor, bias: Tensor | None) -> None:
        """scale: [out, groups] as XNNPACK will have them."""
        super().__init__()
        # It makes the operations known that `forward` is written in.
        importlib.import_module("torch.ao.quantization.fx._decomposed")
        self._block = block_of(value)
        self.bits = 4 if value.scheme.bits <= 4 else 8
        scale = scale.expand(value.shape[0], -1)
        scale = (scale if self._block else scale[:, 0]).contiguous()
        self.register_buffer("codes", value.codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, length, in] float32 → [1, length, out]"""
        ops: Any = torch.ops.quantized_decomposed
        low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        of_input = (scale, zero, -128, 127, torch.int8)
        rounded = ops.quantize_per_token(x, *of_input)
        x = ops.dequantize_per_token(rounded, *of_input, torch.float32)
        if self._block is None:
            of_weight = (self.scale, self.zero, 0, low, high, torch.int8)
            weight = ops.dequantize_per_channel(self.codes, *of_weight)
        else:
            of_groups = (self.scale, self.zero, low, high, torch.int8, self._block, torch.float32)
            weight = ops.dequantize_per_channel_group(self.codes, *of_groups)
        return F.linear(x, weight, self.bias)


class _Plain(nn.Module):
    """A linear layer that is not quantized, in float32."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PhoneLinears:
    """Makes linear layers. Attributes: integers (layers in integers, by name), scale_error (the largest change of a
    scale, relative to it)."""

    def __init__(self) -> None:
        self.integers: dict[str, IntegerLinear] = {}
        self.scale_error = 0.0

    def __call__(
        self, model: StoredModel, name: str, weight: str, stored: Stored, types: dict[str, int]
    ) -> nn.Module:
        """As `torch_decoder.MakeLinear`."""
        bias = None
        if f"{name}.bias" in model.checkpoint.tensors:
            read = model.read(f"{name}.bias")
            assert isinstance(read, Tensor)
            bias = read.float()
        scheme = model.schemes.get(name)
        value = model.read(weight) if scheme is not None and scheme.weight is not None else None
        if not isinstance(value, QuantizedTensor):
            types["float32"] = types.get("float32", 0) + stored(weight).numel()
            return _Plain(stored(weight).detach().float(), bias)
        scale = value.scale.float()
        if block_of(value) is not None:
            scale, change = half_of(scale, torch.bfloat16)
            self.scale_error = max(self.scale_error, change)
        layer = IntegerLinear(value, scale, bias)
        self.integers[name] = layer
        kind = f"{layer.bits} bits"
        types[kind] = types.get(kind, 0) + value.shape.numel()
        return layer


class _Cache:
    """What attention in transformers asks of a cache, with room for a fixed number of tokens."""

    is_compileable = False

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked where positions are not given, and they are."""
        return 0

    def __init__(self, decoder: "CachedDecoder", places: Tensor) -> None:
        self._decoder, self._places = decoder, places

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Put what is new [1, KV heads, length, head_dim] in its places; all of the cache."""
        found = []
        for kind, new in (("keys", keys), ("values", values)):
            kept = getattr(self._decoder, f"{kind}_{layer}")
            kept.index_copy_(2, self._places, new)
            found.append(kept)
        return found[0], found[1]


class CachedDecoder(nn.Module):
    """Tokens that stand from a place on → logits. Keys and values of all tokens before lie in buffers, [1, KV heads,
    context, head_dim] float32 for each block."""

    def __init__(self, network: Any, context: int) -> None:
        super().__init__()
        self.network, self.context = network, context
        _, kv_heads, head_dim = head_counts(network.config)
        for layer in range(network.config.num_hidden_layers):
            for kind in ("keys", "values"):
                room = torch.zeros(1, kv_heads, context, head_dim)
                self.register_buffer(f"{kind}_{layer}", room)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens [1, length] int64, of which the first stands at start [1] int64 → [1, length, vocabulary]"""
        places = start + torch.arange(tokens.shape[1])
        mask: Any = seen(torch.arange(self.context), places, self.network.config)
        cache: Any = _Cache(self, places)
        found = self.network(
            input_ids=tokens,
            position_ids=places[None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = found.logits
        return logits


def trace_cached(decoder: CachedDecoder) -> ExportedProgram:
    """Its graph, for texts of 1 to `context` tokens."""
    tokens = torch.zeros(1, min(_LENGTH, decoder.context), dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    length = Dim("length", min=1, max=decoder.context)
    with torch.no_grad():
        return torch.export.export(
            decoder, (tokens, start), dynamic_shapes=({1: length}, None), strict=False
        )
