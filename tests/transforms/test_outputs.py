"""Every linear layer's output of a rewritten block, restored, is what it was: in float64, on every family."""

import pytest
import torch
from torch import Tensor, nn

from bitfold.models import family_of
from bitfold.models.family import FcPair, NormSite, QueryKey, Site, UpDown, ValueOutput, head_counts
from bitfold.pipeline.hooks import capturing_outputs
from bitfold.transforms.groups import (
    Diagonal,
    HeadMatrix,
    Heads,
    NormedPairScale,
    RotaryScale,
    Transform,
)
from bitfold.transforms.outputs import restored
from models_zoo import TOKENS, in_float64, random_model


def _vector(size: int) -> Tensor:
    return torch.rand(size, dtype=torch.float64) + 0.5


def _member(site: Site, weights: dict[str, Tensor], heads: Heads) -> Transform | None:
    """A random member of the site's group, with shifts where biases carry them."""

    def shift(*names: str) -> Tensor | None:
        if not all(f"{name}.bias" in weights for name in names):
            return None
        return torch.randn(weights[f"{names[0]}.bias"].numel(), dtype=torch.float64)

    if isinstance(site, NormSite):
        size = weights[f"{site.norm}.weight"].numel()
        return Diagonal(site, _vector(size), shift(site.norm, *site.readers))
    if isinstance(site, UpDown):
        return Diagonal(site, _vector(weights[f"{site.up}.weight"].shape[0]))
    if isinstance(site, FcPair):
        size = weights[f"{site.fc1}.weight"].shape[0]
        return Diagonal(site, _vector(size)) if site.homogeneous else None
    if isinstance(site, QueryKey) and site.key_norm is not None:
        return NormedPairScale(site, _vector(heads.size // 2))
    if isinstance(site, QueryKey) and site.rotary == "half-split":
        return RotaryScale(site, *torch.randn(2, heads.keys, heads.size // 2, dtype=torch.float64))
    blocks = (
        torch.eye(heads.size).double()
        + 0.3 * torch.randn(heads.keys, heads.size, heads.size).double()
    )
    carried = shift(site.value, site.output) if isinstance(site, ValueOutput) else shift(site.key)
    return HeadMatrix(site, blocks, torch.linalg.inv(blocks), carried)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "gemma3", "opt"])
def test_restored_outputs_are_those_before(name: str) -> None:
    torch.manual_seed(3)
    model = in_float64(random_model(name, torch.float64))
    family, heads = family_of(model.config.model_type), Heads(*head_counts(model.config))
    block: nn.Module = model.get_submodule(family.blocks)[0]

    def outputs() -> dict[str, Tensor]:
        with torch.no_grad(), capturing_outputs(block, family.linears) as found:
            model(TOKENS)
        return dict(found)

    before = outputs()
    transforms = []
    for site in family.sites(model.config):
        weights = {key: value.data for key, value in block.named_parameters()}
        transform = _member(site, weights, heads)
        if transform is not None:
            transforms.append(transform)
            for key, value in transform.fold(weights, heads).items():
                block.get_parameter(key).data = value
    moved = 0
    for linear, output in outputs().items():
        moved += not torch.allclose(output, before[linear])
        for transform in transforms:
            output = restored(transform, linear, output, heads)
        torch.testing.assert_close(output, before[linear], rtol=1e-9, atol=1e-10)
    assert moved >= 2
