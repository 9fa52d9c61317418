"""The packed cache: an artifact's own numbers for every family, its bytes, beams, cropping, and what it refuses."""

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import bitfold
from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme
from bitfold.runtime.attention import ATTENTION
from bitfold.runtime.cache_layers import PackedLayer, PackedSlidingLayer
from bitfold.runtime.kv_cache import cache_memory, quantized_cache
from models_zoo import CONFIGS, TOKENS, Zoo, in_float64, random_model

# 24 tokens: groups of 4 that are full and one that is not, beyond the sliding windows of 8 tokens.
IDS = TOKENS[:, :23]
SETS = {
    "token": (),
    "keys in groups of tokens": (
        *("key.granularity=channel", "key.group_size=4"),
        *("value.group_size=8", "value.bits=3"),
    ),
    "static": (
        *("key.static=true", "key.granularity=channel"),
        *("value.static=true", "value.granularity=head"),
    ),
    "keys alone": ("value.bits=8",),
}
PORTIONS = ([23], [9, 1, 1, 1, 1, 10], [1] * 23, [3, 4, 5, 11])


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def quantized(model: Path, out: Path, ids: Path, scheme: str, sets: Sequence[str]) -> Any:
    bitfold.quantize(model, out, method="rtn", scheme=scheme, calibration=ids, set=sets)
    # In float64 rounding moves no code, so that what differs is a mistake.
    return in_float64(bitfold.load(out, dtype="float64"))


@torch.no_grad()
def in_portions(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, portions: Sequence[int]
) -> Tensor:
    parts = tokens.split(list(portions), dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@torch.no_grad()
def at_once(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "opt"])
@pytest.mark.parametrize("choice", SETS)
def test_an_artifact_gives_the_same_logits_with_its_cache(
    family: str, choice: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = quantized(
        checkpoint(family, torch.float64), tmp_path / "out", ids, "w16a16kv4", SETS[choice]
    )
    whole = at_once(model, IDS)
    original = at_once(
        in_float64(bitfold.load(checkpoint(family, torch.float64), dtype="float64")), IDS
    )
    assert (whole - original).abs().max() > 1e-3
    for portions in PORTIONS:
        cache = quantized_cache(model)
        assert cache.notes == ()
        found = in_portions(model, IDS, cache, portions)
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)
        assert cache.get_seq_length() == 23


@pytest.mark.parametrize("scheme", ["w16a16kv4", "w4a16q4kv4g32", "w8a16kv8"])
def test_compressed_tensors_artifacts_too(
    scheme: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    made = bitfold.quantize(
        checkpoint("llama", torch.float64), tmp_path / "out", method="rtn", scheme=scheme
    )
    assert made.format == "compressed-tensors"
    model = in_float64(bitfold.load(tmp_path / "out", dtype="float64"))
    whole = at_once(model, IDS)
    for portions in PORTIONS:
        found = in_portions(model, IDS, quantized_cache(model), portions)
        assert model.config._attn_implementation == ATTENTION
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(at_once(model, IDS), whole, atol=1e-9, rtol=0)
    ordinary = in_portions(model, IDS, DynamicCache(config=model.config), PORTIONS[1])
    torch.testing.assert_close(ordinary, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("choice", ["token", "keys in groups of tokens"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_transformers_with_a_padded_batch(
    family: str, choice: str, beams: int, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    """The window is longer than the text, so that an ordinary cache keeps the groups' borders."""
    model = quantized(
        checkpoint(family, torch.float64), tmp_path / "out", ids, "w16a16kv4", SETS[choice]
    )
    if family == "gemma3":
        model.config.sliding_window = 64
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    plain = model.generate(TOKENS[:, :9], attention_mask=mask, **options)
    cache = quantized_cache(model)
    packed = model.generate(TOKENS[:, :9], attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(plain, packed)
    assert cache.get_seq_length() == 20


# -- a model that bitfold did not quantize ------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_as_it_is(family: str) -> None:
    model = random_model(family, torch.float32)
    whole = at_once(model, IDS)
    errors = []
    for bits in (8, 4, 2):
        cache = quantized_cache(model, bits)
        assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
        found = in_portions(model, IDS, cache, [9, *[1] * 14])
        errors.append(float((found - whole).square().mean().sqrt() / whole.std()))
        assert torch.equal(at_once(model, IDS), whole)  # the model is not touched
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.05


def test_windows_drop_what_is_beyond_them() -> None:
    model = random_model("gemma3", torch.float32)
    key = TensorScheme(bits=4, symmetric=False, granularity="channel", group_size=4)
    cache = quantized_cache(model, key=key)
    in_portions(model, IDS, cache, [23])
    sliding, full = cache.layers
    assert isinstance(sliding, PackedSlidingLayer)
    assert type(full) is PackedLayer
    assert sliding._values.tokens == 7
    assert 7 <= sliding._keys.tokens <= 7 + 3
    assert full._keys.tokens == 23
    assert sliding.get_seq_length() == full.get_seq_length() == 23


def tensors_in(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object of bitfold's cache."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from tensors_in(one, seen)
    elif type(thing).__module__.startswith(("bitfold", "transformers")) and hasattr(
        thing, "__dict__"
    ):
        for one in vars(thing).values():
            yield from tensors_in(one, seen)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_are_those_of_all_tensors_and_of_arithmetic(bits: int) -> None:
    model = random_model("qwen3", torch.bfloat16)  # 2 layers, 2 KV heads of 32 dimensions
    cache = quantized_cache(model, bits)
    tokens = TOKENS.repeat(1, 4)[:, :75]
    in_portions(model, tokens, cache, [70, *[1] * 5])
    held = {one.untyped_storage().data_ptr(): one for one in tensors_in(cache, set())}
    memory = cache_memory(cache)
    assert memory.bytes == sum(one.untyped_storage().nbytes() for one in held.values())
    batch, layers, heads, size = 2, 2, 2, 32
    keys = 64 * size * bits // 8 + 2 * size * 3 + 11 * size * 2  # two full groups and what is left
    values = 75 * (size * bits // 8 + 3)
    assert memory.bytes == batch * layers * heads * (keys + values)
    assert memory.bfloat16_bytes == batch * layers * heads * 75 * size * 2 * 2
    assert memory.tokens == 75


def test_the_bytes_of_an_ordinary_cache() -> None:
    model = random_model("gemma3", torch.float32)
    cache = DynamicCache(config=model.config)
    in_portions(model, IDS, cache, [23])
    memory = cache_memory(cache)
    assert memory.bytes == 2 * 2 * 32 * 2 * (7 + 23) * 4
    assert memory.bfloat16_bytes == memory.bytes // 2
    packed = quantized_cache(model, 4)
    in_portions(model, IDS, packed, [23])
    assert cache_memory(packed).bfloat16_bytes == memory.bfloat16_bytes


def test_a_model_does_not_keep_its_last_cache(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = quantized(checkpoint("llama", torch.float64), tmp_path / "out", ids, "w16a16kv4", ())
    cache = quantized_cache(model)
    in_portions(model, IDS, cache, [23])
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None


# -- what caches of transformers can do ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_cropping(family: str, checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """Back over tokens that are not packed by group, the text goes on as if they had never been."""
    model = quantized(
        checkpoint(family, torch.float64), tmp_path / "out", ids, "w16a16kv4", SETS["token"]
    )
    cache = quantized_cache(model)
    cache.activate_past_recording()
    in_portions(model, IDS[:, :17], cache, [17])
    other = torch.flip(IDS, [1])[:, :5]
    in_portions(model, other, cache, [5])
    cache.crop(-5)
    assert cache.get_seq_length() == 17
    found = in_portions(model, IDS[:, 17:], cache, [1] * 6)
    torch.testing.assert_close(found, at_once(model, IDS)[:, 17:], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="minus the tokens to remove"):
        cache.crop(3)


def test_what_a_window_has_dropped_cannot_be_brought_back() -> None:
    model = random_model("gemma3", torch.float32)
    cache = quantized_cache(model, 4)
    in_portions(model, IDS, cache, [23])
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        cache.crop(-2)


def test_batches_and_starting_again() -> None:
    model = random_model("llama", torch.float32)
    cache = quantized_cache(model, 4)
    in_portions(model, IDS, cache, [23])
    keys = cache.layers[1]._keys.read()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1]._keys.read(), keys[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.layers[1]._keys.read(), keys[[1, 0]])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[1]._keys.read(), keys)
    before = cache_memory(cache).bytes
    cache.reset()
    assert cache.get_seq_length() == cache_memory(cache).bytes == 0
    in_portions(model, IDS, cache, [23])
    assert cache_memory(cache).bytes == before
    assert torch.equal(cache.layers[1]._keys.read(), keys)


# -- what it has no form for, and what cannot be ------------------------------------------------------


def test_grids_without_a_packed_form_have_ordinary_layers(
    checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: rtn\nscheme: w16a16kv4\nlayers:\n  - match: model.layers.1.*\n    scheme: w16a16kvnf4\n"
    )
    bitfold.quantize(checkpoint("llama", torch.float64), tmp_path / "out", recipe=recipe)
    model = in_float64(bitfold.load(tmp_path / "out", dtype="float64"))
    cache = quantized_cache(model)
    assert [type(layer) for layer in cache.layers] == [PackedLayer, DynamicLayer]
    assert "1 of 2 layers have an ordinary cache (the first is 1, DynamicLayer)" in cache.notes[0]
    found = in_portions(model, IDS, cache, [9, *[1] * 14])
    torch.testing.assert_close(found, at_once(model, IDS), atol=1e-9, rtol=0)


def scheme(**fields: Any) -> TensorScheme:
    return TensorScheme(**{"bits": 4, "symmetric": False, "granularity": "token"} | fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give the bits of the cache, e.g. 4"),
        ({"bits": 1}, "2 to 8 bits, not 1: choose 4"),
        ({"bits": 4, "key": scheme()}, "leave one of them out"),
        ({"key": scheme(granularity="head", static=True)}, "quantize the model with that scheme"),
        ({"key": scheme(grid="nf4", symmetric=True)}, "integers with dynamic scales, not nf4"),
        ({"value": scheme(granularity="channel", group_size=4)}, "is for keys, with a group_size"),
        ({"key": scheme(granularity="channel")}, "set granularity=token"),
        ({"value": scheme(granularity="group", group_size=5)}, "does not divide the 16 dimensions"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized_cache(random_model("llama", torch.float32), **options)


def test_an_artifact_has_bits_of_its_own(checkpoint: Zoo, tmp_path: Path) -> None:
    bitfold.quantize(
        checkpoint("llama", torch.bfloat16), tmp_path / "out", method="rtn", scheme="w16a16kv4"
    )
    with pytest.raises(RecipeError, match="a scheme of its own: leave out the bits of the cache"):
        quantized_cache(bitfold.load(tmp_path / "out"), 4)


def test_the_arithmetic_of_the_default() -> None:
    """4 bits and groups of 32: a scale of 16 bits and a zero-point of 8 for 32 codes make 4.75 bits a number."""
    cache = quantized_cache(random_model("qwen3", torch.bfloat16), 4)
    layer = cache.layers[0]
    x = torch.randn(1, 2, 320, 32, dtype=torch.bfloat16)
    layer.update(x, x)
    assert math.isclose(8 * layer.nbytes / (2 * x.numel()), 4.75)
