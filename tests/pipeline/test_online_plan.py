"""What is planned to run, and what it costs."""

import pytest
import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.family import NormSite, Site
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import MapShape, Scheme
from bitfold.pipeline.online import online_cost, online_maps, stored_maps, with_identities
from bitfold.recipe import Recipe
from bitfold.transforms import SiteTransform, Transform
from models_zoo import Zoo

FIRST, SECOND = "input_layernorm", "post_attention_layernorm"


class Blocks(SiteTransform):
    """Blocks of a size behind one norm."""

    norm: str
    size: int

    def fit(
        self, site: Site, weights: object, statistics: object, schemes: object, heads: object
    ) -> Transform | None:
        return None

    kind: str = "blocks"

    def online_map(self, site: Site, width: int, heads: object) -> MapShape | None:
        if not isinstance(site, NormSite) or site.norm != self.norm:
            return None
        return MapShape(self.kind, (width // self.size, self.size))


def _blocks(count: int, size: int) -> MapShape:
    return MapShape("blocks", (count, size))


def _skeleton(checkpoint: Zoo) -> Skeleton:
    return Skeleton(Checkpoint(checkpoint("llama", torch.float32)))


def _attention(skeleton: Skeleton, scheme: str = "w4a16") -> dict[str, Scheme]:
    asked = Scheme.parse(scheme)
    of_heads = Scheme(query=asked.query, key=asked.key, value=asked.value)
    return {f"{skeleton.block_name(index)}.self_attn": of_heads for index in range(2)}


def _recipe(*parts: Blocks) -> Recipe:
    return Recipe(method="blocks", scheme=Scheme.parse("w4a16g32"), transforms=parts)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), {}),
        ((Blocks(norm=FIRST, size=64),), {FIRST: _blocks(1, 64)}),
        (
            (Blocks(norm=FIRST, size=16), Blocks(norm=SECOND, size=8)),
            {FIRST: _blocks(4, 16), SECOND: _blocks(8, 8)},
        ),
        ((Blocks(norm=FIRST, size=16), Blocks(norm=FIRST, size=32)), {FIRST: _blocks(2, 32)}),
    ],
)
def test_the_plan_of_every_block(
    parts: tuple[Blocks, ...], expected: dict[str, MapShape], checkpoint: Zoo
) -> None:
    skeleton = _skeleton(checkpoint)
    found = online_maps(skeleton, _recipe(*parts), _attention(skeleton))
    assert found == {
        f"model.layers.{index}.{norm}": entry
        for norm, entry in expected.items()
        for index in range(2)
    }


def test_the_cost(checkpoint: Zoo) -> None:
    skeleton = _skeleton(checkpoint)
    assert online_cost(skeleton, {}, torch.bfloat16) is None
    entries = {"a": _blocks(4, 16), "b": _blocks(1, 64)}
    cost = online_cost(skeleton, entries, torch.bfloat16)
    assert cost is not None
    # Two blocks: q and o 64², k and v 32 · 64, three of 64 · 96.
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert (cost.operations, cost.linear_multiply_adds) == (4 * 16**2 + 64**2, linear)
    assert cost.bytes == 2 * cost.operations
    assert cost.sentence.startswith("Not folded: 2 maps")


def test_hadamard_and_kronecker_matrices_cost_less(checkpoint: Zoo) -> None:
    """On queries and keys one stands on every head."""
    skeleton = _skeleton(checkpoint)
    maps = {
        "model.layers.0.mlp.down_proj": MapShape("hadamard", (1, 96, 1)),
        "model.layers.0.self_attn": MapShape("hadamard", (1, 16, 1)),
        "model.layers.0.input_layernorm": MapShape("kronecker", (8, 8)),
        "model.layers.1.self_attn": MapShape("heads", (2, 16)),
    }
    cost = online_cost(skeleton, maps, torch.bfloat16)
    assert cost is not None
    assert cost.operations == 96 * (12 + 3) + (4 + 2) * 16 * (4 + 16) + 64 * (8 + 8)
    assert cost.bytes == 2 * (96 + 16 + 64 + 64 + 2 * 16 * 16)
    assert stored_maps(maps)[2:4] == [
        "model.layers.0.input_layernorm.online.left",
        "model.layers.0.input_layernorm.online.right",
    ]


def test_two_maps_that_are_no_matrices_of_one_kind_are_refused(checkpoint: Zoo) -> None:
    parts = (Blocks(norm=FIRST, size=8), Blocks(norm=FIRST, size=8, kind="kronecker"))
    skeleton = _skeleton(checkpoint)
    with pytest.raises(RecipeError, match=r"leaves two maps at input_layernorm"):
        online_maps(skeleton, _recipe(*parts), _attention(skeleton))


@pytest.mark.parametrize("method", ["quarot", "flat"])
@pytest.mark.parametrize(("scheme", "turned"), [("w4a4", 0), ("w4a4kv4", 2), ("w4a4q4", 2)])
def test_queries_and_keys_are_turned_only_where_they_are_rounded(
    method: str, scheme: str, turned: int, checkpoint: Zoo
) -> None:
    skeleton, recipe = _skeleton(checkpoint), Recipe.make(method, scheme)
    found = online_maps(skeleton, recipe, _attention(skeleton, scheme))
    assert sum(name.endswith("self_attn") for name in found) == turned
    assert found["model.layers.1.mlp.down_proj"].width == 96


def test_what_was_not_found_is_the_identity() -> None:
    found = torch.randn(4, 2, 2)
    weights: dict[str, Tensor] = {
        "w": torch.ones(3),
        "same.online.weight": found,
        "smaller.online.weight": found,
    }
    maps = {
        "same": _blocks(4, 2),
        "smaller": _blocks(2, 4),
        "missing": _blocks(2, 4),
        "product": MapShape("kronecker", (2, 4)),
    }
    planned = with_identities(weights, maps)
    assert torch.equal(planned["w"], weights["w"])
    assert torch.equal(planned["same.online.weight"], found)
    smaller, missing = (planned[f"{name}.online.weight"] for name in ("smaller", "missing"))
    assert torch.equal(torch.block_diag(*smaller), torch.block_diag(*found))
    assert torch.equal(missing, torch.eye(4).repeat(2, 1, 1))
    assert torch.equal(planned["product.online.left"], torch.eye(2))
    assert torch.equal(planned["product.online.right"], torch.eye(4))
