"""QuaRot: what folds and what runs, from `--method quarot` to a loaded model, and with `rotation.online=false`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitfold
from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme
from bitfold.pipeline import problem
from models_zoo import TOKENS, Zoo, build

BF16, FLOAT32 = torch.bfloat16, torch.float32
LAYER = "model.layers.0"


def _quantize(model: Path, tokens: Path, out: Path, **more: Any) -> dict[str, Any]:
    options = {"method": "quarot", "scheme": "w4a4q4kv4", "samples": 4} | more
    bitfold.quantize(model, out, calibration=tokens, **options)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "opt"])
def test_what_loads_is_what_was_simulated(
    family: str, dtype: torch.dtype, checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    report = _quantize(checkpoint(family, dtype), tokens, tmp_path / "out")
    assert max(report["folding_errors"]) < (1e-5 if dtype == FLOAT32 else 5e-3)
    assert bitfold.verify(tmp_path / "out").difference == 0
    # Behind no norm: before o_proj, before down_proj, on queries and keys, in two blocks.
    assert report["online"]["maps"] == 6
    assert report["online"]["folded"] is False


def test_maps_stand_where_the_paper_has_them(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    _quantize(checkpoint("llama", FLOAT32), tokens, tmp_path / "out")
    loaded = bitfold.load(tmp_path / "out")
    shapes = {
        name: tuple(value.shape)
        for name, value in loaded.named_parameters()
        if "online" in name and name.startswith(LAYER)
    }
    assert shapes == {
        f"{LAYER}.self_attn.online.signs": (1, 16, 1),
        f"{LAYER}.self_attn.o_proj.online.signs": (1, 4, 16),  # across heads
        f"{LAYER}.mlp.down_proj.online.signs": (1, 96, 1),
    }
    signs = loaded.get_parameter(f"{LAYER}.mlp.down_proj.online.signs")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def test_ranges_are_clipped_to_a_share_that_is_stored(
    checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    _quantize(checkpoint("llama", BF16), tokens, tmp_path / "out", scheme="w4a3")
    loaded = bitfold.load(tmp_path / "out")
    shares = [value for name, value in loaded.named_buffers() if name.endswith("input_share")]
    assert len(shares) == 2 * 7
    assert all(0.5 <= float(share) <= 1 for share in shares)
    assert min(float(share) for share in shares) < 1
    whole = {"set": ("activation.clipped=false",), "scheme": "w4a3"}
    _quantize(checkpoint("llama", BF16), tokens, tmp_path / "whole", **whole)
    names = [name for name, _ in bitfold.load(tmp_path / "whole").named_buffers()]
    assert not any(name.endswith("input_share") for name in names)


def test_what_has_no_range_to_clip_is_refused(
    checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"set clipped=false"):
        _quantize(
            checkpoint("llama", BF16),
            tokens,
            tmp_path / "out",
            set=("activation.static=true",),
        )


def test_the_cache_goes_on_where_the_prompt_ended(
    checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    """Keys that were cached are turned as those that are new."""
    _quantize(checkpoint("llama", FLOAT32), tokens, tmp_path / "out", scheme="w4a16g32")
    model = bitfold.load(tmp_path / "out")
    with torch.no_grad():
        whole = model(TOKENS).logits
        start = model(TOKENS[:, :-1], use_cache=True)
        step = model(TOKENS[:, -1:], past_key_values=start.past_key_values).logits
    assert torch.allclose(step[:, -1], whole[:, -1], atol=1e-5)


@pytest.mark.parametrize("choice", [(), ("key.granularity=channel", "key.group_size=4")])
def test_the_packed_cache_holds_keys_that_were_turned(
    choice: tuple[str, ...], checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    """Logits of a prompt and of the tokens after it are those of one pass over all."""
    out = tmp_path / "out"
    _quantize(checkpoint("llama", FLOAT32), tokens, out, scheme="w4a16q4kv4", set=choice)
    model = bitfold.load(out, dtype=torch.float64)
    cache = bitfold.quantized_cache(model)
    with torch.no_grad():
        whole = model(TOKENS).logits
        parts = [
            model(part, past_key_values=cache).logits
            for part in TOKENS.split([9, 1, 1, 5, 8], dim=1)
        ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-9)


@pytest.mark.parametrize(
    ("scheme", "refused"), [("w4a16q4", False), ("w4a16kv4", True), ("w4a16kvfp8", True)]
)
def test_bits_of_a_cache_beside_a_scheme_of_its_own(
    scheme: str, refused: bool, checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    """Keys are turned whoever quantizes them; what the artifact quantizes itself is not replaced."""
    out = tmp_path / "out"
    _quantize(checkpoint("llama", FLOAT32), tokens, out, scheme=scheme)
    model = bitfold.load(out)
    if refused:
        with pytest.raises(RecipeError, match="quantizes its keys"):
            bitfold.quantized_cache(model, bits=8)
        return
    with torch.no_grad():
        whole = model(TOKENS).logits
        found = model(TOKENS, past_key_values=bitfold.quantized_cache(model, bits=8)).logits
    assert (found - whole).norm() < 0.1 * whole.norm()


def test_clipping_that_was_learned_before_a_map_is_not_kept(
    checkpoint: Zoo, tokens: Path, tmp_path: Path
) -> None:
    """The rows of down_proj are others behind a Hadamard matrix: the recipe's range is theirs."""
    plain = ("affine.epochs=2", "affine.scale_rate=1e-9", "weight_range=minmax", "corrections=[]")
    tensors = []
    for rate in ("0.1", "30"):
        options = {"scheme": "w3a16", "set": (*plain, f"affine.clip_rate={rate}")}
        _quantize(
            checkpoint("llama", FLOAT32), tokens, tmp_path / rate, method="quarot+affine", **options
        )
        tensors.append(dict(bitfold.load(tmp_path / rate).named_buffers()))
    name = f"{LAYER}.mlp.down_proj.weight_scale"
    assert torch.allclose(tensors[0][name], tensors[1][name], rtol=1e-3)


def test_all_of_it_folds_if_asked(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    model = checkpoint("llama", FLOAT32)
    report = _quantize(
        model,
        tokens,
        tmp_path / "out",
        scheme="w4a4",
        set=("rotation.online=false", "activation.clipped=false"),
    )
    assert "online" not in report
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert bitfold.verify(tmp_path / "out").difference == 0


def test_codes_are_learned_in_the_ranges_that_inputs_will_have(
    checkpoint: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SignRound's loss sees the shares of clipped ranges, which are known by then."""
    seen = []
    real = problem.fake_quantize_trainable

    def looking(x: Tensor, scheme: TensorScheme, ratios: Any = None) -> Tensor:
        seen.append(ratios)
        return real(x, scheme, ratios)

    monkeypatch.setattr(problem, "fake_quantize_trainable", looking)
    out = tmp_path / "out"
    sets = ("signround.steps=2",)
    _quantize(
        checkpoint("llama", BF16), tokens, out, method="quarot+signround", scheme="w4a3", set=sets
    )
    stored = {
        float(value)
        for name, value in bitfold.load(out).named_buffers()
        if name.endswith("input_share")
    }
    assert seen
    assert {float(lower) for lower, upper in seen if lower is upper} == stored
    assert bitfold.verify(out).difference == 0


def test_with_what_is_learned_before_it(checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    """Transforms of other parts fold first, what runs stands last."""
    report = _quantize(
        checkpoint("llama", FLOAT32),
        tokens,
        tmp_path / "out",
        method="quarot+wush+affine",
        set=("affine.epochs=1",),
    )
    assert max(report["folding_errors"]) < 1e-4
    assert bitfold.verify(tmp_path / "out").difference == 0


def test_what_has_no_stream_to_turn_is_refused(tokens: Path, tmp_path: Path) -> None:
    model = build("gemma3", FLOAT32, tmp_path / "model")
    with pytest.raises(RecipeError, match="takes no rotation"):
        _quantize(model, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
