"""Channels in the order of their clusters: the logits stay, clusters lie together, other sites are left alone."""

import pytest
import torch
from torch import Tensor

from bitfold.models import family_of
from bitfold.models.family import FcPair, UpDown, head_counts
from bitfold.numerics import Scheme, TensorScheme, channel_clusters
from bitfold.pipeline.hooks import capturing_inputs
from bitfold.statistics import InputStatistics
from bitfold.transforms.groups import Heads, Permutation
from bitfold.transforms.reorder import Reorder
from models_zoo import CONFIGS, TOKENS, in_float64, random_model

CLUSTERS = 7
SCHEME = Scheme(activation=TensorScheme(bits=4, granularity="cluster", clusters=CLUSTERS))


def inputs_of(model: torch.nn.Module, block: torch.nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    with torch.no_grad(), capturing_inputs(block, {name: seen.append}):
        model(TOKENS)
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_is_the_clusters_and_nothing_else_changes(name: str) -> None:
    model = in_float64(random_model(name, torch.float64))
    family, heads = family_of(model.config.model_type), Heads(*head_counts(model.config))
    sites = family.sites(model.config)
    with torch.no_grad():
        before = model(TOKENS).logits
    for block in model.get_submodule(family.blocks):
        weights = {key: value.data for key, value in block.named_parameters()}
        found = {}
        for site in sites:
            readers = site.readers or (site.query,)
            x = inputs_of(model, block, readers[0])
            statistics = InputStatistics(Reorder.needs, len(x))
            statistics.update(x)
            schemes = dict.fromkeys(readers, SCHEME)
            found[site.name] = Reorder().fit(site, weights, statistics, schemes, heads)
            assert (
                Reorder().fit(site, weights, statistics, dict.fromkeys(readers, Scheme()), heads)
                is None
            )
        inner = [site for site in sites if isinstance(site, UpDown | FcPair)]
        assert len(inner) == 1
        assert {name for name, transform in found.items() if transform} == {inner[0].name}
        order = found[inner[0].name]
        assert isinstance(order, Permutation)
        assert not torch.equal(order.order, torch.arange(len(order.order)))
        for key, value in order.fold(weights, heads).items():
            block.get_parameter(key).data = value
        x = inputs_of(model, block, inner[0].readers[0])
        labels = channel_clusters(x.amin(dim=0), x.amax(dim=0), CLUSTERS).int()
        assert (labels.diff() >= 0).all()
        assert labels.unique().numel() == CLUSTERS
    with torch.no_grad():
        after = model(TOKENS).logits
    assert float((after - before).norm() / before.norm()) < 1e-12
