"""What a distillation learns from: text that is judged by is never trained on, nor made into more text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bitfold.distillation import Distil
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.material import BEGINNING, Material, gather
from bitfold.pipeline.streams import Streams, advance
from models_zoo import Zoo

TOKENS = torch.randint(0, 96, (9, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(checkpoint: Zoo) -> Any:
    """Material from the zoo's tokens, of a job that has no more than is asked of it."""

    def make(**options: int) -> tuple[Skeleton, Material]:
        skeleton = Skeleton(
            Checkpoint(Path(checkpoint("llama", torch.float32))), torch.device("cpu")
        )
        recipe = SimpleNamespace(seed=0)
        job = cast(
            "Any",
            SimpleNamespace(
                skeleton=skeleton, dtype=torch.float64, stream_tokens=TOKENS,
                plan=SimpleNamespace(recipe=recipe),
            ),
        )  # fmt: skip
        hidden = last_hidden(skeleton, TOKENS)
        streams = Streams(hidden, hidden, hidden, hidden)
        return skeleton, gather(job, streams, Distil(**options), 3, lambda *said: None)

    return make


@torch.no_grad()
def last_hidden(skeleton: Skeleton, tokens: torch.Tensor) -> torch.Tensor:
    hidden = skeleton.embed(skeleton.load_outer(torch.float64), tokens)
    for index in range(len(skeleton.blocks)):
        weights = skeleton.load_block(index, torch.float64)
        advance(hidden, lambda x, i=index, w=weights: skeleton.run(i, w, x), skeleton.device)
    return hidden


@pytest.mark.parametrize(
    "options", [{}, {"written": 5}, {"resampled": 2}, {"written": 3, "resampled": 1}]
)
def test_windows_are_split_and_followed_by_the_model_s_own(
    made: Any, options: dict[str, int]
) -> None:
    skeleton, material = made(**options)
    given = len(TOKENS)
    assert torch.equal(material.tokens[:given], TOKENS)
    assert not set(material.training.tolist()) & set(material.check.tolist())
    known = set(material.training.tolist()) | set(material.check.tolist())
    assert known == set(range(len(material.tokens)))
    mine = given - len(material.check)
    own = options.get("written", 0) + options.get("resampled", 0) * mine
    assert len(material.tokens) == given + own
    # What the original's last block gives for every window, own ones included.
    expected = last_hidden(skeleton, material.tokens)
    torch.testing.assert_close(material.original, expected, rtol=1e-9, atol=1e-9)


def test_own_text_comes_from_windows_that_are_trained_on(made: Any) -> None:
    _, material = made(resampled=2, written=4)
    given = len(TOKENS)
    training = TOKENS[material.training[material.training < given]]
    written, resampled = material.tokens[given:].split([4, 2 * len(training)])
    assert torch.equal(written[:, :BEGINNING], training[:4, :BEGINNING])
    same = (resampled == training.repeat(2, 1)).float().mean()
    assert 0.4 < float(same) < 0.7
