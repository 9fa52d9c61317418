"""`--method rptq`: the simulation, the artifact and what loads it agree; refused where it makes no sense."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import bitfold
from bitfold.errors import RecipeError
from models_zoo import TOKENS, Zoo


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return path


def made(model: Path, out: Path, ids: Path, **options: object) -> bitfold.Quantization:
    settings = {"method": "rptq", "scheme": "w4a4", "calibration": ids} | options
    result = bitfold.quantize(model, out, **settings)
    assert isinstance(result, bitfold.Quantization)
    return result


def stored(out: Path) -> dict[str, Tensor]:
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "dtype", "method", "scheme", "options"),
    [
        ("llama", torch.bfloat16, "rptq", "w4a4", ()),
        ("llama-biased", torch.float32, "rptq", "w4a4q4kv4", ("activation.static=false",)),
        ("mistral", torch.bfloat16, "rptq", "w3a3", ("activation_range=minmax",)),
        ("qwen2", torch.bfloat16, "smoothquant+rptq", "w4a8g32", ("activation.clusters=5",)),
        ("qwen3", torch.bfloat16, "rptq+gptq", "w4a4", ()),
        ("gemma", torch.float32, "rptq", "w16a4", ("activation_range=percentile",)),
        ("gemma3", torch.bfloat16, "awq+rptq", "w4a4", ()),
        ("mistral", torch.bfloat16, "rotation+rptq", "w4a4", ()),
        ("opt", torch.float16, "wush+rptq", "w4a4kv4", ("activation.clusters=2",)),
        ("opt-gelu", torch.bfloat16, "rptq+vq", "w4anf4", ()),
        ("opt-350m", torch.bfloat16, "rptq+distil", "w4a4", ()),
        ("llama", torch.float32, "rptq+distil", "w4a6", ("activation.static=false",)),
        ("llama", torch.float32, "rtn", "w8a4", ("activation.clusters=7",)),
    ],
)
def test_whatever_is_asked(
    family: str,
    dtype: torch.dtype,
    method: str,
    scheme: str,
    options: tuple[str, ...],
    checkpoint: Zoo,
    tmp_path: Path,
    ids: Path,
) -> None:
    out = tmp_path / "out"
    result = made(checkpoint(family, dtype), out, ids, method=method, scheme=scheme, set=options)
    assert result.format == "bitfold"
    assert bitfold.verify(out).difference < 1e-6


def test_what_is_stored(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    out = tmp_path / "out"
    result = made(
        checkpoint("llama", torch.bfloat16), out, ids, set=["activation.clusters=6"], scheme="w4a4"
    )
    assert "it has no scale per cluster of channels for activations" in result.notes[0]
    tensors = stored(out)
    for name, width in (("self_attn.o_proj", 64), ("mlp.up_proj", 64), ("mlp.down_proj", 96)):
        layer = f"model.layers.1.{name}.input_"
        clusters = tensors[f"{layer}clusters"]
        assert (clusters.dtype, clusters.shape) == (torch.uint8, (width,))
        assert clusters.unique().tolist() == list(range(6))
        assert (tensors[f"{layer}scale"].dtype, tensors[f"{layer}scale"].shape) == (
            torch.bfloat16,
            (6,),
        )
        zero = tensors[f"{layer}zero_point"]
        assert (zero.dtype, zero.shape) == (torch.int8, (6,))
        assert zero.min() >= -8
        assert zero.max() <= 7
    # In an MLP the channels of a cluster lie together; behind a norm they stay where they were.
    assert (tensors["model.layers.1.mlp.down_proj.input_clusters"].int().diff() >= 0).all()
    assert (tensors["model.layers.1.mlp.up_proj.input_clusters"].int().diff() < 0).any()


def test_loaded_in_plain_transformers(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """The codes that loaded layers see are on the grid, and there are no more of them than it has."""
    out = tmp_path / "out"
    made(checkpoint("opt", torch.float32), out, ids, scheme="w4a3", set=["activation.clusters=6"])
    model = bitfold.load(out)
    layer = model.get_submodule("model.decoder.layers.0.fc2")
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(TOKENS.to(model.device)).logits
    hook.remove()
    assert torch.isfinite(logits).all()
    at = layer.input_clusters.long()
    scale, zero = layer.input_scale[at], layer.input_zero_point[at]
    codes = (seen[0] / scale + zero).clamp(-4, 3).round()
    again = F.linear(scale * (codes - zero), layer.dequantize(torch.float32), layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(seen[0]), again)


def test_a_killed_run_gives_the_same_bytes(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)

    def kill(done: float, total: int, what: str) -> None:
        if what.startswith("block 2 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, tmp_path / "killed", ids, method="rptq+gptq", progress=kill)
    assert made(model, tmp_path / "killed", ids, method="rptq+gptq").resumed_blocks == 1
    made(model, tmp_path / "whole", ids, method="rptq+gptq")
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "killed").iterdir()} == whole


def test_its_own_recipe_gives_it_again(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    model = checkpoint("llama", torch.bfloat16)
    settings = ["activation.static=false", "activation.clusters=5"]
    made(model, tmp_path / "first", ids, set=settings)
    recipe = tmp_path / "first" / "recipe.yaml"
    bitfold.quantize(model, tmp_path / "second", recipe=recipe, calibration=ids)
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "w4a16"}, "the scheme w4a16 has none to cluster: quantize activations"),
        ({"scheme": "w4amxfp4"}, "the scheme w4amxfp4 has none to cluster"),
        ({"method": "affine+rptq"}, "affine trains with ranges that follow its own changes"),
        ({"method": "omniquant+rptq"}, "affine trains with ranges that follow its own changes"),
        ({"method": "rptq+signround"}, "signround trains with ranges"),
        ({"method": "rptq+smoothquant"}, "smoothquant changes them afterwards: name rptq last"),
        ({"set": "activation.clusters=70"}, "70 clusters are more than the 64 inputs of .*q_proj"),
        ({"set": "activation.clusters=1"}, "clusters=1"),
        ({"set": "activation.clusters=300"}, "clusters=300"),
        ({"set": "activation.granularity=token"}, "clusters goes with granularity=cluster"),
        ({"set": "activation.clusters=null"}, "the scheme w4a4 has none to cluster"),
        ({"set": "weight.clusters=4"}, "the weight has no clusters of channels"),
        ({"scheme": "w4a4kv4", "set": "key.clusters=4"}, "the key has no clusters of channels"),
        ({"set": "activation=8"}, "'activation' is no key"),
    ],
)
def test_refusals(
    options: dict[str, object], said: str, checkpoint: Zoo, tmp_path: Path, ids: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        made(checkpoint("llama", torch.bfloat16), tmp_path / "out", ids, **options)
