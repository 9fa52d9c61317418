"""Sensitivities against transformers' own model with the same weights rounded."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitfold.allocation import Candidate, LayerGroup, candidates, layer_groups, measure
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme, to_groups
from models_zoo import TOKENS, Zoo

SCHEME = Scheme.parse("w4a16g32").weight
assert SCHEME is not None


def nearest(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    limits = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    return QuantizedTensor.from_limits(weight, *limits, scheme, torch.float32).dequantize()


def rounder(index: int, weights: dict[str, torch.Tensor], given: torch.Tensor) -> Any:
    def rounded(names: Sequence[str], scheme: TensorScheme) -> dict[str, torch.Tensor]:
        return {name: nearest(weights[f"{name}.weight"], scheme) for name in names}

    return rounded


OPTIONS = {"dtype": torch.float32, "rounder": rounder}


def reference(zoo: Zoo, family: str, layers: list[str], candidate: Candidate) -> float:
    """Mean KL by transformers."""
    original = AutoModelForCausalLM.from_pretrained(zoo(family, torch.float32))
    other = AutoModelForCausalLM.from_pretrained(zoo(family, torch.float32))
    for name in layers:
        weight = other.get_submodule(name).weight
        assert candidate.scheme is not None
        weight.data = nearest(weight.data, candidate.scheme)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(model(TOKENS).logits[:, :-1].double(), -1)
            for model in (original, other)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("per", ["layer", "kind"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_against_transformers(checkpoint: Zoo, family: str, per: str) -> None:
    skeleton = Skeleton(Checkpoint(checkpoint(family, torch.float32)))
    groups = layer_groups(skeleton.family, 2, per=per, fuse=True)
    offered = candidates(SCHEME, (16, 8, 3), ())
    measured = measure(skeleton, dict.fromkeys(groups, offered), TOKENS, **OPTIONS)
    assert list(measured) == [group.name for group in groups]
    for group in (groups[0], groups[-1]):
        layers = [f"{skeleton.block_name(index)}.{name}" for index, name in group.layers]
        assert measured[group.name]["16"] == 0
        for candidate in offered[1:]:
            expected = reference(checkpoint, family, layers, candidate)
            found = measured[group.name][candidate.name]
            assert found == pytest.approx(expected, rel=2e-2, abs=2e-6)
        assert measured[group.name]["3g32"] > measured[group.name]["8g32"] >= 0


@pytest.mark.parametrize("per", ["layer", "kind"])
def test_who_rounds_is_shown_what_the_original_gives(checkpoint: Zoo, per: str) -> None:
    """Of every block that a group touches, whatever was rounded before it."""
    skeleton = Skeleton(Checkpoint(checkpoint("llama", torch.float32)))
    groups = layer_groups(skeleton.family, 2, per=per, fuse=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama", torch.float32))
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    seen = []

    def looking(index: int, weights: dict[str, torch.Tensor], given: torch.Tensor) -> Any:
        assert torch.allclose(given, states[index], atol=1e-5)
        seen.append(index)
        return rounder(index, weights, given)

    offered = candidates(SCHEME, (16, 2), ())
    measure(skeleton, dict.fromkeys(groups, offered), TOKENS, dtype=torch.float32, rounder=looking)
    assert seen == [0, 1]


def test_goes_on_and_repeats(checkpoint: Zoo) -> None:
    """What is known is not measured again; what is measured is the same to the bit, and saved block by block."""
    skeleton = Skeleton(Checkpoint(checkpoint("llama", torch.float32)))
    groups = layer_groups(skeleton.family, 2, per="layer", fuse=True)
    choices = dict.fromkeys(groups, candidates(SCHEME, (16, 4, 3), ()))
    saved, reports = [], []
    whole = measure(
        skeleton,
        choices,
        TOKENS,
        **OPTIONS,
        save=lambda measured: saved.append(dict(measured)),
        report=lambda done, total, what: reports.append((done, total)),
    )
    assert [len(measured) for measured in saved] == [4, 8]
    # 4 groups of 2 candidates through 2 blocks, then through 1.
    assert reports == [(done, 24) for done in range(24)]
    calls: list[int] = []
    again = measure(
        skeleton,
        choices,
        TOKENS,
        **OPTIONS,
        known=saved[0],
        report=lambda done, total, what: calls.append(total),
    )
    assert again == whole
    assert calls == [8] * 8
    assert measure(skeleton, choices, TOKENS, **OPTIONS, known=whole) == whole


def test_what_is_not_finite_is_no_candidate(
    checkpoint: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(Checkpoint(checkpoint("llama", torch.float32)))
    group = LayerGroup("down", ((1, "mlp.down_proj"),))
    run = skeleton.run

    def overflowing(index: int, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        levels = weights["mlp.down_proj.weight"][0, :32].unique().numel()
        return run(index, weights, x) * (float("inf") if levels <= 4 else 1)

    monkeypatch.setattr(skeleton, "run", overflowing)
    measured = measure(skeleton, {group: candidates(SCHEME, (8, 2), ())}, TOKENS, **OPTIONS)
    assert list(measured["down"]) == ["8g32"]
