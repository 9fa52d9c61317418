"""A cache for transformers' models that keeps keys and values in few bits.

    cache = bitfold.quantized_cache(model)          # by the scheme of an artifact
    cache = bitfold.quantized_cache(model, bits=4)  # for any other model
    model.generate(**inputs, past_key_values=cache)

Every pass appends to packed codes and reads all of them back, one layer at a time. For an artifact the numbers are
those of its own fake quantization: the attention takes what the cache hands it as it is (`follow_cache`), so nothing is
quantized twice. A model that bitfold did not quantize is not touched, and sees keys and values as the cache holds them
after each pass. Where scales are of groups of tokens, the queries of its prompt thus see all groups that the prompt
fills quantized, while those of an artifact see each as it was at their time (`runtime/token_groups.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitfold.errors import RecipeError
from bitfold.models.family import head_counts
from bitfold.numerics import TensorScheme
from bitfold.runtime.attention import HeadMap, HeadName, HeadQuantizers, head_map, head_quantizers
from bitfold.runtime.cache_layers import PackedLayer, PackedSlidingLayer
from bitfold.runtime.packed_heads import Coding, can_pack
from bitfold.runtime.taken_over import compressed_heads, take_over

__all__ = [
    "CacheMemory",
    "PackedCache",
    "cache_memory",
    "default_schemes",
    "quantized_cache",
    "quantizes_cache",
]

TOKENS_OF_A_GROUP = 32


class PackedCache(Cache):
    """What `quantized_cache` makes. notes: what the user should know of it."""

    def __init__(self, layers: list[Any], notes: tuple[str, ...] = ()) -> None:
        super().__init__(layers=layers)
        self.notes = notes


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of all tensors that a cache holds between passes, the tokens it has seen in every sequence, and the bytes
    of an ordinary cache in bfloat16."""

    bytes: int
    tokens: int
    bfloat16_bytes: int


def cache_memory(cache: Cache) -> CacheMemory:
    """What a cache of bitfold's, or an ordinary one of transformers, takes."""
    held = bfloat16 = 0
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            held, bfloat16 = held + layer.nbytes, bfloat16 + layer.bfloat16_bytes
            continue
        states = (getattr(layer, "keys", None), getattr(layer, "values", None))
        for part in (one for one in states if one is not None):
            held, bfloat16 = held + part.nbytes, bfloat16 + 2 * part.numel()
    return CacheMemory(held, int(cache.get_seq_length()), bfloat16)


def default_schemes(bits: int, head_dim: int) -> tuple[TensorScheme, TensorScheme]:
    """Keys per channel and 32 tokens; values per token and 32 dimensions of a head, or all where 32 does not divide
    them.

    Raises RecipeError for bits that no cache has.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"A cache has 2 to 8 bits, not {bits}: choose 4.")
    of_key: dict[str, Any] = {"granularity": "channel", "group_size": TOKENS_OF_A_GROUP}
    of_value: dict[str, Any] = {"granularity": "token"}
    if head_dim % 32 == 0:
        of_value = {"granularity": "group", "group_size": 32}
    common: dict[str, Any] = {"bits": bits, "symmetric": False}
    return TensorScheme(**common, **of_key), TensorScheme(**common, **of_value)


def quantizes_cache(model: PreTrainedModel) -> bool:
    """Whether the model is an artifact that quantizes keys or values in a way that a cache can store."""
    own = (head_quantizers(module) for module in model.modules())
    found = [one for one in (*own, *compressed_heads(model).values()) if one is not None]
    return any(_can_store(one) for one in found)


def quantized_cache(
    model: PreTrainedModel,
    bits: int | None = None,
    *,
    key: TensorScheme | None = None,
    value: TensorScheme | None = None,
) -> PackedCache:
    """An empty cache for one or several sequences of a model.

    An artifact that quantizes keys and values is given a cache by its own scheme; one in the compressed-tensors format
    then runs with bitfold's attention, which gives the same numbers. For any other model say `bits`, for
    `default_schemes`, or schemes of keys and values that are dynamic; one that is left out leaves them as they are.

    Layers that it has no packed form for (other kinds than full and sliding attention, other grids than integers) are
    ordinary ones; the cache's `notes` say so. Raises RecipeError for what cannot be.
    """
    own = quantizes_cache(model)
    asked = bits is not None or key is not None or value is not None
    if own and asked:
        raise RecipeError(
            "The model quantizes its keys and values by a scheme of its own: leave out the bits of the cache."
        )
    if not (own or asked):
        raise RecipeError(
            "The model does not say how keys and values are stored: give the bits of the cache, e.g. 4."
        )
    ordinary = DynamicCache(config=model.config).layers
    if not own and _quantizes_otherwise(model):
        raise RecipeError(
            "The model quantizes its keys or values in a way that no packed cache stores, and bits of a cache would "
            "take its place: use an ordinary cache."
        )
    if own:
        take_over(model)
        codings = _codings_of_artifact(model)
    else:
        codings = dict.fromkeys(range(len(ordinary)), _codings_asked(model, bits, key, value))
    turns = _turns(model)
    layers = [
        _packed(layer, codings.get(index), turns.get(index)) for index, layer in enumerate(ordinary)
    ]
    kept = [index for index, layer in enumerate(layers) if not isinstance(layer, PackedLayer)]
    notes: tuple[str, ...] = ()
    if kept:
        notes = (
            f"{len(kept)} of {len(layers)} layers have an ordinary cache (the first is {kept[0]}, "
            f"{type(layers[kept[0]]).__name__}): it is no attention, or of no scheme, that the packed cache stores",
        )
    return PackedCache(layers, notes)


def _codings_asked(
    model: PreTrainedModel, bits: int | None, key: TensorScheme | None, value: TensorScheme | None
) -> tuple[Coding, Coding]:
    size = head_counts(model.config.get_text_config())[2]
    if bits is not None:
        if key is not None or value is not None:
            raise RecipeError(
                "A cache has either bits or schemes of its own: leave one of them out."
            )
        key, value = default_schemes(bits, size)
    for name, scheme in (("key", key), ("value", value)):
        if scheme is None:
            continue
        if not can_pack(scheme) or scheme.static or scheme.granularity in ("tensor", "head"):
            raise RecipeError(
                f"A cache for a model as it is stores the {name} as integers with dynamic scales, not "
                f"{scheme.describe()}: quantize the model with that scheme, or choose another."
            )
        if scheme.granularity == "channel" and (name == "value" or scheme.group_size is None):
            raise RecipeError(
                f"A dynamic scale per channel is for keys, with a group_size of tokens, not for the {name} as "
                f"{scheme.describe()}: set granularity=token."
            )
        if scheme.granularity == "group" and size % (scheme.group_size or 1):
            raise RecipeError(
                f"The {name}'s group size {scheme.group_size} does not divide the {size} dimensions of a head: "
                "choose a divisor."
            )
    return Coding(key), Coding(value)


def _codings_of_artifact(model: PreTrainedModel) -> dict[int, tuple[Coding, Coding]]:
    """Of every attention whose keys and values the cache can store, by the number of its layer."""
    found: dict[int, tuple[Coding, Coding]] = {}
    for module in model.modules():
        quantizers = head_quantizers(module)
        if quantizers is not None and _can_store(quantizers):
            index: Any = module.layer_idx
            found[index] = (
                _coding(quantizers, "key", module),
                _coding(quantizers, "value", module),
            )
    return found


def _turns(model: PreTrainedModel) -> dict[int, HeadMap | None]:
    """The map of queries and keys of every attention of bitfold's, by the number of its layer."""
    found: dict[int, HeadMap | None] = {}
    for module in model.modules():
        if head_quantizers(module) is not None:
            index: Any = module.layer_idx
            found[index] = head_map(module)
    return found


def _quantizes_otherwise(model: PreTrainedModel) -> bool:
    """Whether an attention of bitfold's quantizes keys or values in a way that the cache cannot store."""
    found = (head_quantizers(module) for module in model.modules())
    return any(one is not None and (one.key is not None or one.value is not None) for one in found)


def _can_store(quantizers: HeadQuantizers) -> bool:
    schemes = (quantizers.key, quantizers.value)
    return any(schemes) and all(can_pack(scheme) for scheme in schemes)


def _coding(quantizers: HeadQuantizers, name: HeadName, module: nn.Module) -> Coding:
    scheme: TensorScheme | None = getattr(quantizers, name)
    if scheme is None or not scheme.static:
        return Coding(scheme)
    return Coding(scheme, *quantizers.static(name, module))


def _packed(
    layer: Any,
    codings: tuple[Coding, Coding] | None,
    turn: HeadMap | None,
) -> Any:
    """The packed layer in place of an ordinary one of transformers, or that one."""
    if codings is None:
        return layer
    turned = None if turn is None else partial(turn, "key")
    if type(layer) is DynamicLayer:
        return PackedLayer(*codings, turned)
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingLayer(*codings, layer.sliding_window, turned)
    return layer
