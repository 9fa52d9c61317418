"""The residual stream's rotation, in float64 on random models: logits stay, and only the group's members keep them."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitfold.errors import EquivalenceError
from bitfold.models import family_of
from bitfold.transforms.stream import rotate_stream, rotation_defect
from models_zoo import TOKENS, in_float64, random_model

OPEN = ("llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "opt", "opt-projected")


def _orthogonal(size: int, keeps_ones: bool) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    if not keeps_ones:
        return q
    basis = torch.cat([torch.ones(size, 1), torch.randn(size, size - 1)], dim=1).double()
    basis, _ = torch.linalg.qr(basis)
    inner, _ = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64))
    return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def _rotated(name: str, rotation: Tensor | None = None) -> float:
    """The relative change of the logits when the stream of a random model is rotated."""
    torch.manual_seed(2)
    model = in_float64(random_model(name, torch.float64))
    family = family_of(model.config.model_type)
    stream = family.stream(model.config)
    assert stream is not None
    before = _logits(model)
    if rotation is None:
        rotation = _orthogonal(model.config.hidden_size, stream.reads_mean)
    weights = {key: value.data for key, value in model.named_parameters()}
    sites = family.sites(model.config)
    turned = rotate_stream(weights, family, stream, sites, model.config.num_hidden_layers, rotation)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())  # untied
    for key, value in turned.items():
        model.get_parameter(key).data = value
    return float((_logits(model) - before).norm() / before.norm())


@pytest.mark.parametrize("name", OPEN)
def test_a_rotation_of_the_stream_leaves_the_logits(name: str) -> None:
    assert _rotated(name) < 1e-10


def test_what_is_no_rotation_is_refused() -> None:
    with pytest.raises(EquivalenceError, match="rotation"):
        _rotated("llama", torch.eye(64, dtype=torch.float64) * 1.1)


def test_layer_norm_refuses_a_rotation_that_moves_the_ones() -> None:
    with pytest.raises(EquivalenceError, match="vector of ones"):
        _rotated("opt", _orthogonal(64, keeps_ones=False))


def test_a_rotation_that_moves_the_ones_does_change_a_layer_norm_model() -> None:
    """The guard is needed: without it the logits would change."""
    rotation = _orthogonal(64, keeps_ones=False)
    torch.manual_seed(2)
    model = in_float64(random_model("opt", torch.float64))
    stream = family_of("opt").stream(model.config)
    assert rotation_defect(rotation, stream) > 0.1
    x = torch.randn(3, 64, dtype=torch.float64)
    norm = nn.LayerNorm(64, elementwise_affine=False)
    assert (norm(x @ rotation) - norm(x) @ rotation).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["opt-350m", "gemma3"])
def test_post_norms_close_the_stream(name: str) -> None:
    config = random_model(name, torch.float32).config
    assert family_of(config.model_type).stream(config) is None
