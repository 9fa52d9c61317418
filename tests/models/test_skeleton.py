"""A model run block by block from disk gives the logits of transformers, to the bit, in every family."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitfold.errors import CheckpointError, FamilyError
from bitfold.models import FAMILIES
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from models_zoo import CONFIGS, TOKENS, Zoo

FLOAT32 = torch.float32


def block_by_block(skeleton: Skeleton, dtype: torch.dtype, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        outer = skeleton.load_outer(dtype)
        hidden = skeleton.embed(outer, tokens)
        for index in range(len(skeleton.blocks)):
            hidden = skeleton.run(index, skeleton.load_block(index, dtype), hidden)
        return skeleton.head(outer, hidden)


def whole(path: Path, dtype: torch.dtype, tokens: Tensor = TOKENS) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens).logits


def copied(path: Path, to: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A checkpoint with other tensors, and other fields of its config."""
    shutil.copytree(path, to)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_transformers(family: str, checkpoint: Zoo) -> None:
    path = checkpoint(family, FLOAT32)
    found = block_by_block(Skeleton(Checkpoint(path)), FLOAT32)
    assert torch.equal(found, whole(path, FLOAT32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["mistral", "gemma", "gemma3", "opt-350m"])
def test_logits_in_other_dtypes(family: str, dtype: torch.dtype, checkpoint: Zoo) -> None:
    path = checkpoint(family, torch.bfloat16)
    found = block_by_block(Skeleton(Checkpoint(path)), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, whole(path, dtype))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_of_another_length(family: str, checkpoint: Zoo) -> None:
    """Masks are made once for a length; another one must not get those of the first."""
    path = checkpoint(family, FLOAT32)
    skeleton = Skeleton(Checkpoint(path))
    for tokens in (TOKENS, TOKENS[:, :5], TOKENS[:1], TOKENS.reshape(1, -1)):
        found = block_by_block(skeleton, FLOAT32, tokens)
        assert torch.equal(found, whole(path, FLOAT32, tokens))


def test_the_sliding_window_is_there() -> None:
    """Else the tests above would not see a mask that lacks it."""
    assert CONFIGS["mistral"].sliding_window < TOKENS.shape[1]
    assert len(set(CONFIGS["gemma3"].layer_types)) == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_tied_and_untied_heads(family: str, tied: bool, checkpoint: Zoo, tmp_path: Path) -> None:
    tensors = load_file(checkpoint(family, FLOAT32) / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors.pop("lm_head.weight", None)
    if not tied:
        generator = torch.Generator().manual_seed(9)
        tensors["lm_head.weight"] = torch.randn(tensors[embedding].shape, generator=generator)
    path = copied(
        checkpoint(family, FLOAT32), tmp_path / "model", tensors, tie_word_embeddings=tied
    )
    skeleton = Skeleton(Checkpoint(path))
    assert skeleton.ties_head == tied
    assert ("lm_head.weight" in skeleton.outer_parameters) != tied
    assert torch.equal(block_by_block(skeleton, FLOAT32), whole(path, FLOAT32))


def test_names_without_the_base_models_prefix(checkpoint: Zoo, tmp_path: Path) -> None:
    """OPT's checkpoints on the hub say decoder.layers…, transformers model.decoder.layers…"""
    path = checkpoint("opt", FLOAT32)
    tensors = load_file(path / "model.safetensors")
    short = {name.removeprefix("model."): value for name, value in tensors.items()}
    assert short.keys() != tensors.keys()
    skeleton = Skeleton(Checkpoint(copied(path, tmp_path / "model", short)))
    assert torch.equal(block_by_block(skeleton, FLOAT32), whole(path, FLOAT32))


def test_a_block_is_a_differentiable_function_of_its_weights(checkpoint: Zoo) -> None:
    skeleton = Skeleton(Checkpoint(checkpoint("llama", FLOAT32)))
    weights = skeleton.load_block(0)
    weights["mlp.down_proj.weight"].requires_grad_()
    skeleton.run(0, weights, torch.randn(1, 5, 64)).sum().backward()
    assert weights["mlp.down_proj.weight"].grad.abs().sum() > 0


# --- what does not belong together ---


@pytest.mark.parametrize("left_out", ["mlp.gate_proj", "self_attn.o_proj"])
def test_a_linear_layer_that_the_family_does_not_name(
    left_out: str, checkpoint: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = FAMILIES["llama"]
    inputs = tuple(tuple(name for name in shared if name != left_out) for shared in llama.inputs)
    poorer = replace(llama, inputs=tuple(shared for shared in inputs if shared))
    monkeypatch.setitem(FAMILIES, "llama", poorer)
    with pytest.raises(FamilyError, match=rf"layers\.0 .*'llama'.*{left_out}"):
        Skeleton(Checkpoint(checkpoint("llama", FLOAT32)))


def test_a_linear_layer_that_is_not_there(checkpoint: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    richer = replace(FAMILIES["opt"], inputs=(*FAMILIES["opt"].inputs, ("fc3",)))
    monkeypatch.setitem(FAMILIES, "opt", richer)
    with pytest.raises(FamilyError, match="fc3"):
        Skeleton(Checkpoint(checkpoint("opt", FLOAT32)))


def test_an_unknown_architecture(checkpoint: Zoo, tmp_path: Path) -> None:
    path = checkpoint("llama", FLOAT32)
    tensors = load_file(path / "model.safetensors")
    path = copied(path, tmp_path / "model", tensors, model_type="lama")
    with pytest.raises(FamilyError, match=r"did you mean 'llama'.*add one"):
        Skeleton(Checkpoint(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "lack"),
        ({"num_hidden_layers": 1}, "knows nothing of"),
        ({"intermediate_size": 95}, r"\[96, 64\] in the weights but \[95, 64\]"),
        ({"vocab_size": 97}, "by config.json"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
    ],
)
def test_config_against_weights(
    change: dict[str, object], message: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    path = checkpoint("llama", FLOAT32)
    tensors = load_file(path / "model.safetensors")
    path = copied(path, tmp_path / "model", tensors, **change)
    with pytest.raises(CheckpointError, match=message):
        Skeleton(Checkpoint(path))
