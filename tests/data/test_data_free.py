"""Windows that no one wrote."""

import pytest
import torch

from bitfold.assets import DEMO_MODEL
from bitfold.data import generated_windows, random_windows
from bitfold.data.data_free import LIKELIEST, write_windows
from bitfold.errors import DataError
from bitfold.runtime.load import load


@pytest.fixture(scope="module")
def model():
    return load(DEMO_MODEL, device="cpu", dtype="float32")


def test_random_windows_are_even_and_repeat_by_their_seed() -> None:
    found = random_windows(64, 128, 16, 3)
    assert found.tokens.shape == (64, 128)
    counts = torch.bincount(found.tokens.flatten(), minlength=16)
    assert counts.min() > 400  # 512 each, five standard deviations
    assert counts.max() < 624
    assert found.data_free
    assert torch.equal(found.tokens, random_windows(64, 128, 16, 3).tokens)
    assert found.sha256 != random_windows(64, 128, 16, 4).sha256


def test_what_the_model_writes_is_likely_to_it_and_repeats_by_its_seed(model) -> None:
    found = generated_windows(model, 8, 48, 0)
    assert found.tokens.shape == (8, 48)
    assert torch.equal(found.tokens, generated_windows(model, 8, 48, 0).tokens)
    assert found.sha256 != generated_windows(model, 8, 48, 1).sha256
    with torch.no_grad():
        logits = model(found.tokens).logits
    first = logits[:, :LIKELIEST].argmax(dim=-1)
    assert torch.equal(first, found.tokens[:, 1 : 1 + LIKELIEST])
    log_p = logits[:, :-1].log_softmax(dim=-1)
    nll = -log_p.gather(2, found.tokens[:, 1:, None])[:, LIKELIEST:].mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[:, LIKELIEST:].mean()
    assert float(nll) == pytest.approx(float(entropy), rel=0.15)  # drawn from its own distribution


def test_marks_of_beginning_and_end_are_never_drawn(model) -> None:
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [likeliest]
    try:
        found = write_windows(
            model, 4, 0, lambda done, total: None, torch.tensor([[5, 6, 7]] * 40), likeliest=1
        )
    finally:
        model.generation_config.eos_token_id = before
    assert torch.equal(found[:, :3], torch.tensor([[5, 6, 7]] * 40))
    assert (found[:, 3] != likeliest).all()


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        random_windows(0, 8, 16, 0)
