"""Statistics of inputs: products in half precision where the checkpoint is stored so and they are quick, else exact."""

from pathlib import Path

import pytest
import torch

from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline import measure
from bitfold.pipeline.plan import make_plan
from bitfold.pipeline.streams import Streams
from bitfold.recipe import Recipe
from bitfold.statistics import InputStatistics
from models_zoo import Zoo

NEEDS = frozenset({"gram", "cross", "channels"})
LAST = "mlp.down_proj"


@pytest.mark.parametrize(
    ("stored", "run", "low"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float64, False),
    ],
)
def test_products_are_low_only_where_the_checkpoint_is(
    stored: torch.dtype,
    run: torch.dtype,
    low: bool,
    checkpoint: Zoo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skeleton = Skeleton(Checkpoint(Path(checkpoint("llama", stored))), torch.device("cpu"))
    plan = make_plan(skeleton, Recipe.make("qep+gptq", "w4a16"))
    weights = skeleton.load_block(0, run)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 24, skeleton.config.hidden_size, generator=generator).to(run)
    streams = Streams(hidden, hidden, hidden + 0.1 * hidden.roll(1), hidden)

    def found(quick: bool) -> InputStatistics:
        monkeypatch.setattr(measure, "has_fast_bfloat16", lambda device: quick)
        of = measure.input_statistics(
            skeleton, 0, plan, weights, streams, NEEDS, original=weights, names=(LAST,)
        )
        return of[LAST]

    exact, quick = found(False), found(True)
    # A difference of two inputs keeps fewer digits than they have.
    for name, most in (("gram", 0.02), ("cross", 0.1), ("absmax", 0.02)):
        wanted, got = getattr(exact, name), getattr(quick, name)
        assert got.dtype == run  # sums are never in half precision
        change = float((got - wanted).norm() / wanted.norm())
        assert (0 < change < most) if low else change == 0, (name, change)
