"""A stored model as a network of transformers whose layers are `torch_layers`, and its graph by `torch.export`."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from bitfold.export.model_directory import unpacks_in_scales
from bitfold.export.reading import StoredModel
from bitfold.export.torch_layers import PackedLinear, StoredEmbedding, StoredLinear
from bitfold.models.family import head_counts
from bitfold.numerics import QuantizedTensor

__all__ = ["Decoder", "MakeLinear", "Stored", "build_decoder", "seen", "trace_decoder"]

Stored = Callable[[str], nn.Parameter]
"""A parameter of a full name, in the dtype of its checkpoint; those that are asked for twice are shared."""
MakeLinear = Callable[[StoredModel, str, str, Stored, dict[str, int]], nn.Module]
"""What makes a linear layer of a model: by its name, the full name of its weight, what stores a parameter as it is, and
how many weights there are of each kind, which it counts."""

# Sizes that a graph is traced with; none is 0 or 1, which would be taken for constants.
_BATCH, _LENGTH, _PAST = 2, 5, 7


class Decoder(nn.Module):
    """Tokens and a cache → logits and the cache that is longer by them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_keys: tuple[Tensor, ...],
        past_values: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """input_ids, position_ids [batch, length] int64; of each block keys and values [batch, KV heads, past,
        head_dim] float32 → logits [batch, length, vocabulary], keys and values with `length` tokens more."""
        config = self.network.config
        cache = DynamicCache()
        for block, (keys, values) in enumerate(zip(past_keys, past_values, strict=True)):
            cache.update(keys, values, block)
        past, length = past_keys[0].shape[2], input_ids.shape[1]
        mask = seen(torch.arange(past + length), torch.arange(past, past + length), config)
        found = self.network(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        layers = cache.layers
        return found.logits, tuple(x.keys for x in layers), tuple(x.values for x in layers)


def build_decoder(
    model: StoredModel,
    config: PretrainedConfig,
    step: Callable[[str], None],
    linear: MakeLinear | None = None,
) -> tuple[Decoder, dict[str, int]]:
    """The network, and how many weights there are of each kind. step: told of each linear layer. linear: what makes
    those, if they are not to be `torch_layers`."""
    make = linear or _linear
    config.__dict__.pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    network = network.eval().requires_grad_(False)
    types: dict[str, int] = {}
    shared: dict[str, nn.Parameter] = {}

    def stored(name: str) -> nn.Parameter:
        if name not in shared:
            value = model.read(name)
            value = value if isinstance(value, Tensor) else value.dequantize(torch.float32)
            kind = str(value.dtype).removeprefix("torch.")
            types[kind] = types.get(kind, 0) + value.numel()
            shared[name] = nn.Parameter(value, requires_grad=False)
        return shared[name]

    embedding = next(n for n, m in network.named_modules() if m is network.get_input_embeddings())
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            step(name)
            tied = name == "lm_head" and config.tie_word_embeddings
            weight = f"{embedding if tied else name}.weight"
            network.set_submodule(name, make(model, name, weight, stored, types))
        elif type(module) is nn.Embedding:
            network.set_submodule(name, StoredEmbedding(stored(f"{name}.weight")))
    for name, parameter in list(network.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(stored(name).float(), requires_grad=False)
            setattr(network.get_submodule(owner), leaf, value)
    return Decoder(network).eval(), types


def trace_decoder(decoder: Decoder) -> ExportedProgram:
    """Its graph, for batches, texts and caches of any size."""
    config: Any = decoder.network.config
    _, kv_heads, head_dim = head_counts(config)
    blocks = config.num_hidden_layers
    tokens = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
    places = torch.arange(_PAST, _PAST + _LENGTH).expand(_BATCH, _LENGTH)
    cache = tuple(torch.zeros(_BATCH, kv_heads, _PAST, head_dim) for _ in range(blocks))
    of_tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    of_cache = tuple({0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(blocks))
    with torch.no_grad():
        program = torch.export.export(
            decoder,
            (tokens, places, cache, tuple(x.clone() for x in cache)),
            dynamic_shapes=(of_tokens, of_tokens, of_cache, of_cache),
            strict=False,
        )
    program.example_inputs = None  # they would be pickled
    return program


def _linear(
    model: StoredModel,
    name: str,
    weight: str,
    stored: Stored,
    types: dict[str, int],
) -> nn.Module:
    """A linear layer. weight: the full name of its parameter."""
    scheme = model.schemes.get(name)
    activation = None if scheme is None else scheme.activation
    calibrated = {} if activation is None else model.calibrated(name)
    bias = None
    if f"{name}.bias" in model.checkpoint.tensors:
        read = model.read(f"{name}.bias")
        assert isinstance(read, Tensor)
        bias = read.float()
    value = model.read(weight) if scheme is not None and scheme.weight is not None else None
    if not isinstance(value, QuantizedTensor):
        return StoredLinear(stored(weight), bias, activation, calibrated)
    in_scales = unpacks_in_scales(model) and not value.scheme.fp4
    unpacked_in = value.scale.dtype if in_scales else torch.float32
    layer = PackedLinear(value, bias, unpacked_in, activation, calibrated)
    kind = f"{layer.bits} bits"
    types[kind] = types.get(kind, 0) + value.shape.numel()
    return layer


def seen(keys: Tensor, queries: Tensor, config: Any) -> Tensor | dict[str, Tensor]:
    """What is added to scores, [1, 1, queries, keys]: 0, or float32's least for a token that is not seen; where a model
    has layers of two kinds, of each. keys, queries: positions, [n] int64."""
    everything = _mask(keys, queries, None)
    if config.model_type == "gemma3_text":
        window = _mask(keys, queries, config.sliding_window)
        return {"full_attention": everything, "sliding_attention": window}
    if config.model_type == "mistral" and config.sliding_window:
        return _mask(keys, queries, config.sliding_window)
    return everything


def _mask(keys: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """window: of how many tokens a query sees the last."""
    queries = queries.unsqueeze(1)
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    least = torch.finfo(torch.float32).min
    return torch.where(allowed, 0.0, least)[None, None]
