"""Matrices on keys: both sides share the load, and keys that are rounded cost less."""

import pytest
import torch
from torch import Tensor

from bitfold.models.family import QueryKey, UpDown
from bitfold.numerics import MapShape, Scheme, fake_quantize_dynamic, turn_heads
from bitfold.statistics import InputStatistics
from bitfold.transforms import Heads
from bitfold.transforms.affine import Affine
from bitfold.transforms.groups import HeadMatrix
from bitfold.transforms.keys import Keys, head_matrices
from bitfold.transforms.learned import MaskSettings, learned_at
from bitfold.transforms.online import OnlineHeads

FLOAT64 = torch.float64
HEADS = Heads(queries=4, keys=2, size=16)
ROTARY = QueryKey("q", "k", "half-split")
PLAIN = QueryKey("q", "k", "none")
SCHEMES = dict.fromkeys(("q", "k", "v"), Scheme.parse("w4a4kv4"))


def skewed(heads: int, seed: int) -> Tensor:
    """[2, heads, 300, H], a few directions far larger than the rest, others in each head."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(heads, 16, 16, generator=generator, dtype=FLOAT64)
    sizes = torch.logspace(1, -1, 16, dtype=FLOAT64)
    x = torch.randn(2, heads, 300, 16, generator=generator, dtype=FLOAT64)
    return (x * sizes) @ torch.linalg.qr(mixing)[0]


def fitted(site: QueryKey, query: Tensor, key: Tensor) -> object:
    statistics = InputStatistics(frozenset({"heads"}), 600)
    for half in (0, 1):
        statistics.update_heads("query", query[half : half + 1])
        statistics.update_heads("key", key[half : half + 1])
    weights = {"k.weight": torch.zeros(32, 8, dtype=FLOAT64)}
    return Keys(damping=0.0).fit(site, weights, statistics, SCHEMES, HEADS)


def moment(x: Tensor, keys: int) -> Tensor:
    by_head = x.transpose(0, 1).flatten(1, 2).unflatten(0, (keys, -1)).flatten(1, 2)
    return by_head.mT @ by_head / by_head.shape[1]


def test_both_sides_share_the_load() -> None:
    query, key = skewed(4, 0), skewed(2, 1)
    made = fitted(ROTARY, query, key)
    assert isinstance(made, OnlineHeads)
    tensors = {"keys": made.keys}
    mine, theirs = (
        moment(turn_heads(name, x, tensors), 2) for name, x in (("query", query), ("key", key))
    )
    assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-9 * float(mine.abs().max()))
    power = mine.diagonal(dim1=1, dim2=2)
    assert torch.allclose(power, power[:, :1].expand_as(power))  # every dimension alike


def test_rounded_keys_cost_less() -> None:
    query, key = skewed(4, 0), skewed(2, 1)
    made = fitted(ROTARY, query, key)
    assert isinstance(made, OnlineHeads)
    scheme = SCHEMES["k"].key
    assert scheme is not None

    def error(query: Tensor, key: Tensor) -> float:
        """Of all products of queries and keys."""
        wrong = (fake_quantize_dynamic(key, scheme) - key).repeat_interleave(2, dim=1)
        return float((query @ wrong.mT).square().sum())

    tensors = {"keys": made.keys}
    turned = error(turn_heads("query", query, tensors), turn_heads("key", key, tensors))
    assert turned < 0.5 * error(query, key)


def test_without_a_rotary_embedding_they_fold() -> None:
    made = fitted(PLAIN, skewed(4, 0), skewed(2, 1))
    assert isinstance(made, HeadMatrix)
    assert made.defect() < 1e-9
    for part in (Keys(), Affine(kronecker=True)):
        assert part.online_map(PLAIN, 16, HEADS) is None
        assert part.online_map(ROTARY, 16, HEADS) == MapShape("heads", (2, 16))
    normed = QueryKey("q", "k", "none", key_norm="n", query_norm="m")
    assert head_matrices(normed, HEADS) is not None


def test_nothing_where_queries_and_keys_stay() -> None:
    statistics = InputStatistics(frozenset({"heads"}), 0)
    plain = dict.fromkeys(("q", "k", "v"), Scheme.parse("w4a4"))
    assert Keys().fit(ROTARY, {}, statistics, plain, HEADS) is None
    site = UpDown("up", "down", "gate")
    assert Keys().fit(site, {}, statistics, SCHEMES, HEADS) is None
    assert Keys().online_map(site, 96, HEADS) is None


@pytest.mark.parametrize("moved", [False, True])
def test_what_is_learned_begins_as_the_identity(moved: bool) -> None:
    settings = MaskSettings(1, 1.0, False, "off", 0.0, "float64")
    weights = {"k.weight": torch.zeros(32, 8, dtype=FLOAT64)}
    learned = learned_at(ROTARY, weights, HEADS, settings, full=True, shifts=True, keys=True)
    assert learned is not None
    if moved:
        for scale in learned.scales:
            scale.data = torch.randn_like(scale) / 2
    made = learned.transform()
    assert isinstance(made, OnlineHeads)
    eye = torch.eye(16, dtype=FLOAT64).expand(2, -1, -1)
    assert torch.equal(made.keys, eye) != moved
    query = torch.randn(1, 4, 5, 16, dtype=FLOAT64)
    turn_heads("query", query, {"keys": made.keys}).square().sum().backward()
    assert all(scale.grad is not None for scale in learned.scales)
    condition = float(torch.linalg.cond(made.keys.detach()).max())
    assert learned.report()["condition"] == pytest.approx(condition, rel=1e-9)
