"""Every family's table names modules that are there, of the kinds that its sites need."""

import pytest
import torch
from torch import nn

from bitfold.errors import FamilyError
from bitfold.models import FAMILIES, family_of
from bitfold.models.family import (
    FcPair,
    NormSite,
    QueryKey,
    UpDown,
    ValueOutput,
    head_counts,
)
from models_zoo import CONFIGS, TOKENS, random_model


def test_the_zoo_has_every_family() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_the_model(name: str) -> None:
    model = random_model(name, torch.float32)
    family = family_of(model.config.model_type)
    queries, keys, size = head_counts(model.config)
    for block in model.get_submodule(family.blocks):
        linears = {n for n, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == set(family.linears)
        for site in family.sites(model.config):
            if isinstance(site, NormSite):
                width = block.get_parameter(f"{site.norm}.weight").numel()
                assert {block.get_submodule(r).in_features for r in site.readers} == {width}
            elif isinstance(site, ValueOutput):
                assert block.get_submodule(site.value).out_features == keys * size
                assert block.get_submodule(site.output).in_features == queries * size
            elif isinstance(site, UpDown):
                inner = block.get_submodule(site.down).in_features
                assert block.get_submodule(site.up).out_features == inner
                assert block.get_submodule(site.gate).out_features == inner
            elif isinstance(site, FcPair):
                inner = block.get_submodule(site.fc2).in_features
                assert block.get_submodule(site.fc1).out_features == inner
            else:
                assert isinstance(site, QueryKey)
                assert block.get_submodule(site.query).out_features == queries * size
                assert block.get_submodule(site.key).out_features == keys * size
                for norm in filter(None, (site.query_norm, site.key_norm)):
                    assert block.get_parameter(f"{norm}.weight").numel() == size


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_layers_listed_together_read_the_same_tensor(name: str) -> None:
    """Measured: what each layer is given in a forward pass."""
    model = random_model(name, torch.float32)
    family = family_of(model.config.model_type)
    block = model.get_submodule(family.blocks)[1]
    seen: dict[str, torch.Tensor] = {}
    for linear in family.linears:
        block.get_submodule(linear).register_forward_pre_hook(
            lambda _, args, linear=linear: seen.update({linear: args[0]})
        )
    with torch.no_grad():
        model(TOKENS)
    for left in family.linears:
        for right in family.linears:
            same = seen[left].shape == seen[right].shape and torch.equal(seen[left], seen[right])
            assert same == (family.input_of(left) == family.input_of(right))
    for linear in family.linears:
        assert (seen[linear].ndim == 2) == (linear in family.flattened_inputs)


@pytest.mark.parametrize(
    ("name", "norms", "homogeneous"),
    [
        ("opt", 2, True),
        ("opt-projected", 2, True),
        ("opt-350m", 0, True),  # a norm after the half writes the stream
        ("opt-gelu", 2, False),
    ],
)
def test_switches_of_opt_close_sites(name: str, norms: int, homogeneous: bool) -> None:
    sites = FAMILIES["opt"].sites(CONFIGS[name])
    assert sum(isinstance(site, NormSite) for site in sites) == norms
    assert [site.homogeneous for site in sites if isinstance(site, FcPair)] == [homogeneous]


def test_an_unknown_family_says_how_to_add_one() -> None:
    with pytest.raises(FamilyError, match=r"'qwen4'.*did you mean 'qwen\d'.*src/bitfold/models/"):
        family_of("qwen4")
