"""Diagonals folded at every site that takes one leave the logits of every family; each mistake there changes them."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitfold.models import family_of
from bitfold.models.family import FcPair, NormSite, QueryKey, UpDown, ValueOutput, head_counts
from bitfold.transforms import Heads, fold
from bitfold.transforms.diagonal import takes_diagonal
from bitfold.transforms.groups import Diagonal
from models_zoo import CONFIGS, TOKENS, in_float64, random_model

SAME, DIFFERENT = 1e-10, 1e-3
Weights = dict[str, Tensor]


class Model:
    """A random model in float64 with its blocks' weights, and what its logits were."""

    def __init__(self, name: str) -> None:
        self.model: PreTrainedModel = in_float64(random_model(name, torch.float64))
        config = self.model.config
        self.family = family_of(config.model_type)
        self.heads = Heads(*head_counts(config))
        self.sites = self.family.sites(config)
        self.before = self._logits()

    def _logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(TOKENS).logits

    def weights(self, block: int) -> Weights:
        blocks = self.model.get_submodule(self.family.blocks)
        return {name: value.data for name, value in blocks[block].named_parameters()}

    def store(self, block: int, weights: Weights) -> None:
        module = self.model.get_submodule(self.family.blocks)[block]
        for name, value in weights.items():
            module.get_parameter(name).data = value

    def change(self) -> float:
        """‖logits now − before‖ / ‖before‖"""
        return float((self._logits() - self.before).norm() / self.before.norm())


def scale_for(site: object, weights: Weights, seed: int = 0) -> Tensor:
    """Random entries between 1/4 and 4, of the producer's width."""
    producer = {
        NormSite: lambda: weights[f"{site.norm}.weight"],
        ValueOutput: lambda: weights[f"{site.value}.weight"][:, 0],
        UpDown: lambda: weights[f"{site.up}.weight"][:, 0],
        FcPair: lambda: weights[f"{site.fc1}.weight"][:, 0],
    }[type(site)]()
    generator = torch.Generator().manual_seed(seed)
    return 4 ** (2 * torch.rand(len(producer), dtype=torch.float64, generator=generator) - 1)


def site_of(model: Model, kind: type) -> object:
    return next(site for site in model.sites if isinstance(site, kind))


@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=["exact", "gains rounded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_diagonals_at_all_sites_of_all_blocks(name: str, storage: torch.dtype | None) -> None:
    model = Model(name)
    folded = 0
    for block in range(2):
        for index, site in enumerate(model.sites):
            if takes_diagonal(site):
                weights = model.weights(block)
                scale = scale_for(site, weights, seed=10 * block + index)
                model.store(block, fold(weights, Diagonal(site, scale), model.heads, storage))
                folded += 1
    assert folded >= 4
    assert model.change() < SAME


def test_folding_changes_nothing_it_was_given() -> None:
    model = Model("llama-biased")
    weights = model.weights(0)
    before = {name: value.clone() for name, value in weights.items()}
    for site in filter(takes_diagonal, model.sites):
        fold(weights, Diagonal(site, scale_for(site, weights)), model.heads)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_an_outlier_of_gemma_whose_stored_gain_is_near_minus_one() -> None:
    """(1 + w)/s − 1 rounds to −1 in bfloat16, which would lose the channel: the nearest other gain is taken."""
    model = Model("gemma")
    site, weights = site_of(model, NormSite), model.weights(0)
    scale = torch.ones(64, dtype=torch.float64)
    scale[3] = 2000
    model.store(0, fold(weights, Diagonal(site, scale), model.heads, torch.bfloat16))
    assert model.change() < SAME


# --- mistakes ---


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_a_forgotten_offset(name: str) -> None:
    model = Model(name)
    site = site_of(model, NormSite)
    weights = model.weights(0)
    wrong = NormSite(site.norm, site.readers, offset=0.0)
    model.store(0, fold(weights, Diagonal(wrong, scale_for(site, weights)), model.heads))
    assert model.change() > DIFFERENT


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_a_reader_left_out(name: str) -> None:
    model = Model(name)
    site = site_of(model, NormSite)
    weights = model.weights(0)
    wrong = NormSite(site.norm, site.readers[:-1], site.offset)
    model.store(0, fold(weights, Diagonal(wrong, scale_for(site, weights)), model.heads))
    assert model.change() > DIFFERENT


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_wrong_side_of_head_sharing(name: str) -> None:
    """Query head h reads KV head h div (Q/K), not h mod K."""
    model = Model(name)
    site = site_of(model, ValueOutput)
    weights = model.weights(0)
    scale = scale_for(site, weights)
    wrong = fold(weights, Diagonal(site, scale), model.heads)
    tiled = scale.view(model.heads.keys, -1).repeat(model.heads.shared, 1).flatten()
    wrong[f"{site.output}.weight"] = weights[f"{site.output}.weight"] * tiled
    model.store(0, wrong)
    assert model.change() > DIFFERENT


@pytest.mark.parametrize("bias", ["self_attn.v_proj.bias", "fc1.bias", "final_layer_norm.bias"])
def test_a_forgotten_bias(bias: str) -> None:
    model = Model("opt")
    for site in filter(takes_diagonal, model.sites):
        weights = model.weights(0)
        folded = fold(weights, Diagonal(site, scale_for(site, weights)), model.heads)
        model.store(0, folded | {bias: weights[bias]} if bias in weights else folded)
    assert model.change() > DIFFERENT


def test_a_diagonal_past_gelu() -> None:
    model = Model("opt-gelu")
    site = site_of(model, FcPair)
    weights = model.weights(0)
    lie = FcPair(site.fc1, site.fc2, homogeneous=True)
    model.store(0, fold(weights, Diagonal(lie, scale_for(site, weights)), model.heads))
    assert model.change() > DIFFERENT


def test_a_negative_entry_through_relu() -> None:
    model = Model("opt")
    site = site_of(model, FcPair)
    weights = model.weights(0)
    model.store(0, fold(weights, Diagonal(site, -scale_for(site, weights)), model.heads))
    assert model.change() > DIFFERENT


def test_a_diagonal_at_the_gate() -> None:
    """act(gate) ⊙ up is linear in up, not in the gate."""
    model = Model("llama")
    site = site_of(model, UpDown)
    weights = model.weights(0)
    wrong = UpDown(site.gate, site.down, gate=site.up)
    model.store(0, fold(weights, Diagonal(wrong, scale_for(site, weights)), model.heads))
    assert model.change() > DIFFERENT


def test_a_diagonal_before_rotary_embedding() -> None:
    """What the published AffineQuant code does for Llama: entries of a pair that differ do not commute with it."""
    model = Model("llama")
    site = site_of(model, QueryKey)
    weights = dict(model.weights(0))
    keys, size = model.heads.keys, model.heads.size
    scale = 4 ** (2 * torch.rand(keys, size, dtype=torch.float64) - 1)
    query, key = f"{site.query}.weight", f"{site.key}.weight"
    weights[key] = weights[key] * scale.view(-1, 1)
    weights[query] = weights[query] / scale.repeat_interleave(2, dim=0).view(-1, 1)
    model.store(0, weights)
    assert model.change() > DIFFERENT
