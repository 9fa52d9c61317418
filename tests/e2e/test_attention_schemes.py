"""Queries, keys and values of every granularity, and few bits of everything, from the scheme to the loaded artifact."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import Death, Killed, contents
from transformers import DynamicCache

import bitfold
from bitfold.errors import RecipeError
from bitfold.runtime.kv_cache import quantized_cache
from models_zoo import TOKENS, Zoo

CHANNEL = ("key.granularity=channel", "key.group_size=8")
STATIC = tuple(f"{name}.static=true" for name in ("query", "key", "value"))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def quantize(model: Path, out: Path, ids: Path, **options: Any) -> Any:
    return bitfold.quantize(model, out, **{"method": "rtn", "calibration": ids} | options)


@pytest.mark.parametrize(
    ("family", "scheme", "sets", "format"),
    [
        ("llama", "w3a3", (), "compressed-tensors"),
        ("opt", "w2a2kv2", (), "compressed-tensors"),
        ("llama", "w4a4kv2", (), "compressed-tensors"),
        ("qwen3", "w4a4q2kv2g32", (), "compressed-tensors"),
        ("gemma3", "w16a16kv3", (), "compressed-tensors"),
        ("mistral", "w16a16kv4", ("key.group_size=8", "value.group_size=8"), "compressed-tensors"),
        ("llama", "w16a16kv4", ("value.granularity=group", "value.group_size=4"), "bitfold"),
        ("llama", "w4a16kv4g32", CHANNEL, "bitfold"),
        ("gemma3", "w4a4q4kv2", (*CHANNEL, "value.group_size=8"), "bitfold"),
        ("opt", "w4a16q8kv4", STATIC, "bitfold"),
        (
            "qwen2",
            "w16a16q8kv4",
            (*STATIC, *(f"{name}.granularity=head" for name in ("query", "key", "value"))),
            "bitfold",
        ),
        (
            "gemma",
            "w3a3q4kv3",
            (*STATIC, *(f"{name}.granularity=channel" for name in ("query", "key", "value"))),
            "bitfold",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_and_gives_the_logits_of_the_simulation(
    family: str,
    scheme: str,
    sets: tuple[str, ...],
    format: str,
    dtype: torch.dtype,
    checkpoint: Zoo,
    tmp_path: Path,
    ids: Path,
) -> None:
    made = quantize(checkpoint(family, dtype), tmp_path / "out", ids, scheme=scheme, set=sets)
    assert made.format == format
    assert bitfold.verify(tmp_path / "out").difference < 1e-6
    model = bitfold.load(tmp_path / "out")
    original = bitfold.load(checkpoint(family, dtype))
    with torch.no_grad():
        logits, before = model(TOKENS).logits, original(TOKENS).logits
    assert logits.isfinite().all()
    assert (logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["gptq", "affine", "rtn+distil"])
@pytest.mark.parametrize("sets", [CHANNEL, STATIC[1:]])
def test_methods(
    method: str, sets: tuple[str, ...], checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    more = {"affine": ("affine.epochs=1",), "rtn+distil": ("distil.epochs=1",)}.get(method, ())
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "out", ids, method=method, scheme="w4a8kv4", set=(*sets, *more))
    assert bitfold.verify(tmp_path / "out").difference < 1e-6


@pytest.mark.parametrize(
    ("granularity", "axes"), [("tensor", (0, 1, 2)), ("head", (0, 2)), ("channel", (0,))]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_scales_are_those_of_the_calibration_text(
    granularity: str,
    axes: tuple[int, ...],
    symmetric: bool,
    checkpoint: Zoo,
    tmp_path: Path,
    ids: Path,
) -> None:
    """Against the values of the original's first block, in float64."""
    sets = ("value.static=true", f"value.granularity={granularity}")
    sets += (f"value.symmetric={str(symmetric).lower()}",)
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "out", ids, scheme="w16a16kv4", set=sets)
    stored = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    loaded, seen = bitfold.load(model), []
    attention = loaded.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        loaded(torch.from_numpy(np.load(ids)))
    values = seen[0].flatten(0, 1).unflatten(-1, (2, 16)).double().numpy()
    low = np.minimum(values.min(axis=axes, keepdims=True)[0], 0)
    high = np.maximum(values.max(axis=axes, keepdims=True)[0], 0)
    step = 2 * np.maximum(-low, high) / 15 if symmetric else (high - low) / 15
    prefix = "model.layers.0.self_attn.value"
    found = stored[f"{prefix}_scale"].squeeze(1).double().numpy()
    np.testing.assert_allclose(found, step.reshape(found.shape), rtol=1e-5)
    if symmetric:
        assert f"{prefix}_zero_point" not in stored
        return
    zero = stored[f"{prefix}_zero_point"].squeeze(1).numpy()
    assert np.array_equal(zero, (-8 - np.round(low / step)).reshape(zero.shape))


def test_static_scales_are_counted_before(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)
    static, dynamic = (
        quantize(
            model, tmp_path / "out", ids, scheme="w16a16kv4", dry_run=True, set=sets
        ).size_bytes
        for sets in (("key.static=true", "key.granularity=channel"), ("key.symmetric=true",))
    )
    assert static - dynamic >= 2 * (2 * 16) * (2 + 1)


def test_a_killed_run_gives_the_same_bytes(
    checkpoint: Zoo, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint("llama", torch.bfloat16), tmp_path / "model"))
    options: dict[str, Any] = {"scheme": "w4a16q8kv4", "set": STATIC}
    with monkeypatch.context() as patch:
        Death(patch, 14)
        with pytest.raises(Killed):
            quantize(model, tmp_path / "out", ids, **options)
    quantize(model, tmp_path / "out", ids, **options)
    quantize(model, tmp_path / "whole", ids, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_why_it_is_in_bitfolds_own_format(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)
    reasons = {
        (*CHANNEL, "value.granularity=token"): "it has one scheme for keys and values",
        ("key.static=true", "value.static=true"): "only per token or group, and dynamic",
    }
    for index, (sets, reason) in enumerate(reasons.items()):
        made = quantize(model, tmp_path / str(index), ids, scheme="w16a16kv4", set=sets)
        assert any(reason in note for note in made.notes)


def test_greedy_generation_is_the_same_with_either_cache(
    checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    quantize(
        checkpoint("llama", torch.float32), tmp_path / "out", ids, scheme="w4a16kv4", set=CHANNEL
    )
    model = bitfold.load(tmp_path / "out")
    found = [
        model.generate(
            TOKENS[1:, :9],
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        for cache in (quantized_cache(model), DynamicCache(config=model.config))
    ]
    assert torch.equal(*found)
    with torch.no_grad():
        whole = model(found[0]).logits[:, 8:-1].argmax(-1)
    assert torch.equal(whole, found[0][:, 9:])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("value.granularity=group", "value.group_size=5"), "does not divide the 16 dimensions"),
        (("key.granularity=head",), "set key.static=true"),
        (("key.granularity=channel",), "key.group_size=32"),
        (("value.granularity=channel", "value.group_size=8"), "only keys have scales for groups"),
    ],
)
def test_refusals(
    sets: tuple[str, ...], message: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    model = checkpoint("llama", torch.bfloat16)
    with pytest.raises(RecipeError, match=message):
        quantize(model, tmp_path / "out", ids, scheme="w4a4kv4", set=sets)
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
