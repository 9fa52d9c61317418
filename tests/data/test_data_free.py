"""Windows that no one wrote."""

import pytest
import torch

from bitfold.assets import DEMO_MODEL
from bitfold.data import generated_windows, random_windows
from bitfold.data.data_free import LIKELIEST, marks_of, resampled_windows, write_windows
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


def test_half_of_a_copy_is_drawn_from_what_the_model_expects() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, 16, (40, 65), generator=generator)
    chances = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0] + [0.0] * 11)  # none of what is there
    logits = [chances.log().repeat(65, 1)] * 40
    copies = resampled_windows(tokens, logits, [2], 3, torch.Generator().manual_seed(1))
    assert copies.shape == (120, 65)
    again = resampled_windows(tokens, logits, [2], 3, torch.Generator().manual_seed(1))
    assert torch.equal(copies, again)
    original = tokens.repeat(3, 1)
    assert torch.equal(copies[:, 0], original[:, 0])  # nothing stands before it
    anew = copies != original
    drawn = copies[anew]
    assert float(anew[:, 1:].float().mean()) == pytest.approx(0.5, abs=0.03)
    assert set(drawn.tolist()) == {0, 1}  # 2 is a mark, others have no chance
    assert float((drawn == 0).float().mean()) == pytest.approx(2 / 3, abs=0.03)
    assert not torch.equal(copies[:40], copies[40:80])


def test_a_token_is_drawn_by_what_stands_before_it() -> None:
    tokens = torch.zeros(1, 5, dtype=torch.long)
    logits = torch.full((5, 4), -torch.inf)
    logits[torch.arange(5), torch.tensor([1, 2, 3, 1, 2])] = 0.0
    copies = resampled_windows(tokens, [logits], [], 16, torch.Generator().manual_seed(0))
    expected = torch.tensor([0, 1, 2, 3, 1])
    assert ((copies == expected) | (copies == 0)).all()
    assert (copies == expected).any(dim=0).all()


def test_marks_are_those_of_all_configs() -> None:
    first = type("Config", (), {"bos_token_id": 1, "eos_token_id": [2, 99]})
    second = type("Config", (), {"pad_token_id": 0, "eos_token_id": None})
    assert marks_of(16, first, second) == [0, 1, 2]


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        random_windows(0, 8, 16, 0)
