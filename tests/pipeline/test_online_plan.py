"""What is planned to run, and what it costs."""

import pytest
import torch
from torch import Tensor

from bitfold.export.layout import OnlineEntry
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.family import NormSite, Site
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.pipeline.online import online_cost, online_entries, with_identities
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

    def online_size(self, site: NormSite, width: int) -> int | None:
        return self.size if site.norm == self.norm else None


def _skeleton(checkpoint: Zoo) -> Skeleton:
    return Skeleton(Checkpoint(checkpoint("llama", torch.float32)))


def _recipe(*parts: Blocks) -> Recipe:
    return Recipe(method="blocks", scheme=Scheme.parse("w4a16g32"), transforms=parts)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), {}),
        ((Blocks(norm=FIRST, size=64),), {FIRST: OnlineEntry(1, 64)}),
        (
            (Blocks(norm=FIRST, size=16), Blocks(norm=SECOND, size=8)),
            {FIRST: OnlineEntry(4, 16), SECOND: OnlineEntry(8, 8)},
        ),
        ((Blocks(norm=FIRST, size=16), Blocks(norm=FIRST, size=32)), {FIRST: OnlineEntry(2, 32)}),
    ],
)
def test_the_plan_of_every_block(
    parts: tuple[Blocks, ...], expected: dict[str, OnlineEntry], checkpoint: Zoo
) -> None:
    found = online_entries(_skeleton(checkpoint), _recipe(*parts))
    assert found == {
        f"model.layers.{index}.{norm}": entry
        for norm, entry in expected.items()
        for index in range(2)
    }


def test_the_cost(checkpoint: Zoo) -> None:
    skeleton = _skeleton(checkpoint)
    assert online_cost(skeleton, {}, torch.bfloat16) is None
    entries = {"a": OnlineEntry(4, 16), "b": OnlineEntry(1, 64)}
    cost = online_cost(skeleton, entries, torch.bfloat16)
    assert cost is not None
    # Two blocks: q and o 64², k and v 32 · 64, three of 64 · 96.
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert (cost.multiply_adds, cost.linear_multiply_adds) == (4 * 16**2 + 64**2, linear)
    assert cost.bytes == 2 * cost.multiply_adds
    assert cost.sentence.startswith("Not folded: 2 matrices")


def test_what_was_not_found_is_the_identity() -> None:
    found = torch.randn(4, 2, 2)
    weights: dict[str, Tensor] = {"w": torch.ones(3), "same": found, "smaller": found}
    entries = {
        "same": OnlineEntry(4, 2),
        "smaller": OnlineEntry(2, 4),
        "missing": OnlineEntry(2, 4),
    }
    planned = with_identities(weights, entries)
    assert torch.equal(planned["w"], weights["w"])
    assert torch.equal(planned["same"], found)
    assert torch.equal(torch.block_diag(*planned["smaller"]), torch.block_diag(*found))
    assert torch.equal(planned["missing"], torch.eye(4).repeat(2, 1, 1))
