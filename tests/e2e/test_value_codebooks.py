"""`--set value.grid=codebook`: codebooks of values are learned, stored, loaded, counted and reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import Death, Killed, contents

import bitfold
from bitfold.errors import RecipeError
from bitfold.numerics import quantize_values
from bitfold.runtime.attention import ATTENTION
from models_zoo import TOKENS, Zoo

SET = "value.grid=codebook"


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def quantize(model: Path, out: Path, ids: Path, **options: Any) -> Any:
    defaults = {"method": "rtn", "scheme": "w16a16kv4", "calibration": ids, "set": SET}
    return bitfold.quantize(model, out, **defaults | options)


@pytest.mark.parametrize(
    ("family", "method", "scheme"),
    [
        ("llama", "rtn", "w16a16kv4"),
        ("llama", "vq", "w3a8kv2g32"),
        ("opt", "gptq", "w4a4q8kv4"),
        ("gemma3", "wush", "w4a16kv3"),
        ("qwen3", "rtn+distil", "w4a16kv4"),
        ("mistral", "affine", "w4a16kv8"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_and_gives_the_logits_of_the_simulation(
    family: str,
    method: str,
    scheme: str,
    dtype: torch.dtype,
    checkpoint: Zoo,
    tmp_path: Path,
    ids: Path,
) -> None:
    more = ("affine.epochs=1",) if method == "affine" else ()
    model = checkpoint(family, dtype)
    made = quantize(model, tmp_path / "out", ids, method=method, scheme=scheme, set=(SET, *more))
    assert made.format == "bitfold"
    bits = int(scheme.partition("kv")[2][0])
    assert any(f"values take {bits} bits each, without scales" in note for note in made.notes)
    assert bitfold.verify(tmp_path / "out").difference < 1e-6
    model = bitfold.load(tmp_path / "out")
    assert model.config._attn_implementation == ATTENTION
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_the_codebooks_are_those_of_the_values(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """With everything else as it was, the first block's values are much nearer to their entries than to their mean."""
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "out", ids)
    stored = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    names = [name for name in stored if name.endswith("value_codebook")]
    assert len(names) == 2
    assert stored[names[0]].shape == (2 * 16 // 2, 256, 2)
    loaded, seen = bitfold.load(model), []
    attention = loaded.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        loaded(torch.from_numpy(np.load(ids)))
    values = seen[0].unflatten(-1, (2, 16)).transpose(1, 2)
    found = quantize_values(values, stored["model.layers.0.self_attn.value_codebook"])
    assert (found - values).square().mean() < 0.05 * values.var()


def test_the_disk_it_takes_is_known_before(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)
    with_books, without = (
        quantize(model, tmp_path / "out", ids, dry_run=True, set=chosen).size_bytes
        for chosen in (SET, "value.symmetric=true")
    )
    assert with_books - without >= 2 * (16 * 256 * 2) * 2


@pytest.mark.parametrize("moment", [14, 20])
def test_a_killed_run_gives_the_same_bytes(
    moment: int, checkpoint: Zoo, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint("llama", torch.bfloat16), tmp_path / "model"))
    with monkeypatch.context() as patch:
        Death(patch, moment)
        with pytest.raises(Killed):
            quantize(model, tmp_path / "out", ids)
    quantize(model, tmp_path / "out", ids)
    quantize(model, tmp_path / "whole", ids)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_distillation_sees_quantized_values(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    before = [
        quantize(
            checkpoint("llama", torch.float32),
            tmp_path / scheme,
            ids,
            method="rtn+distil",
            scheme=scheme,
            set=("distil.epochs=1", *options),
        ).distillation["before"]
        for scheme, options in (("w8a16kv2", (SET, "key.bits=8")), ("w8a16", ()))
    ]
    assert before[0] > 3 * before[1]


def test_generation_with_a_cache(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    quantize(checkpoint("llama", torch.float32), tmp_path / "out", ids)
    loaded = bitfold.load(tmp_path / "out")
    new = loaded.generate(TOKENS[1:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(loaded(new).logits[:, 7:-1].argmax(-1), new[:, 8:])


@pytest.mark.parametrize("tensor", ["key", "activation"])
def test_refusals(tensor: str, checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    with pytest.raises(RecipeError, match=f"the {tensor} has no codebook: only weights and values"):
        quantize(
            checkpoint("llama", torch.bfloat16),
            tmp_path / "out",
            ids,
            scheme="w4a4kv4",
            set=f"{tensor}.grid=codebook",
        )
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
