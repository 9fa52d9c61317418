"""What runs behind a module does so in a loaded model and in the simulation alike, and leaves nothing behind there."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import MapShape, apply_map, for_queries
from bitfold.runtime.online import OnlineMap, attach, running_online
from models_zoo import Zoo

FAMILIES = {
    "llama": "input_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "opt": "final_layer_norm",
}


def _attached(blocks: Tensor) -> torch.nn.Module:
    norm = torch.nn.LayerNorm(8)
    attach(norm, OnlineMap(MapShape("blocks", tuple(blocks.shape[:2]))))
    norm.get_parameter("online.weight").data = blocks
    return norm


@pytest.mark.parametrize("count", [1, 4])
def test_a_module_hands_its_output_through(count: int) -> None:
    blocks = torch.randn(count, 8 // count, 8 // count)
    x = torch.randn(3, 8)
    plain = torch.nn.LayerNorm(8)
    expected = plain(x) @ torch.block_diag(*blocks).T
    assert torch.allclose(_attached(blocks)(x), expected, atol=1e-6)
    with running_online(torch.nn.ModuleDict({"n": plain}), {"n.online.weight": blocks}):
        assert torch.allclose(plain(x), expected, atol=1e-6)


def test_a_linear_layer_is_given_what_the_map_makes_of_its_input() -> None:
    """Before what looks at the input is: hooks that were there already see the map's result."""
    signs = torch.randint(0, 2, (1, 8, 1)) * 2.0 - 1
    x, seen = torch.randn(3, 8), []
    expected_input = apply_map(x, {"signs": signs})
    plain, loaded = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    loaded.load_state_dict(plain.state_dict())
    for linear in (plain, loaded):
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attach(loaded, OnlineMap(MapShape("hadamard", (1, 8, 1))))
    loaded.get_parameter("online.signs").data = signs
    expected = plain(expected_input)
    with running_online(torch.nn.ModuleDict({"l": plain}), {"l.online.signs": signs}):
        assert torch.equal(plain(x), expected)
    assert torch.equal(loaded(x), expected)
    assert all(torch.equal(one, expected_input) for one in seen[1:])
    assert len(seen) == 3


def test_matrices_of_heads_are_inverted_only_when_they_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def counted(keys: Tensor) -> Tensor:
        made.append(1)
        return for_queries(keys)

    monkeypatch.setattr("bitfold.runtime.online.for_queries", counted)
    online = OnlineMap(MapShape("heads", (2, 8)))
    keys, query = online.get_parameter("keys"), torch.randn(1, 4, 3, 8)
    keys.data = torch.randn(2, 8, 8)
    first = online.turn_heads("query", query)
    assert torch.equal(online.turn_heads("query", query), first)
    assert made == [1]
    with torch.no_grad():
        keys.mul_(2)
    assert torch.allclose(online.turn_heads("query", query), first / 2, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(online.turn_heads("query", query), first / 2, atol=1e-5)
        other = OnlineMap(MapShape("heads", (2, 8)))  # made there: its tensors count no versions
        other.get_parameter("keys").copy_(keys)
        assert torch.allclose(other.turn_heads("query", query), first / 2, atol=1e-5)
    made.clear()
    made.extend([1, 1])
    online.double()
    assert online.turn_heads("query", query.double()).dtype == torch.float64
    assert made == [1, 1, 1]


def test_a_copy_runs_its_own() -> None:
    norm = _attached(torch.randn(1, 8, 8))
    copy = deepcopy(norm)
    copy.get_parameter("online.weight").data.zero_()
    x = torch.randn(3, 8)
    assert copy(x).abs().sum() == 0
    assert norm(x).abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_runs_what_is_among_its_weights(family: str, checkpoint: Zoo) -> None:
    """As part of a differentiable function, and not once the call is over."""
    skeleton = Skeleton(Checkpoint(checkpoint(family, torch.float32)))
    weights = skeleton.load_block(0)
    hidden = torch.randn(2, 5, 64)
    plain = skeleton.run(0, weights, hidden)
    name = f"{FAMILIES[family]}.online.weight"
    same = skeleton.run(0, weights | {name: torch.eye(64)[None]}, hidden)
    assert torch.allclose(same, plain, atol=1e-5)
    matrix = (torch.randn(4, 16, 16) / 4).requires_grad_()
    other = skeleton.run(0, weights | {name: matrix}, hidden)
    assert (other - plain).abs().max() > 0.02
    other.sum().backward()
    assert matrix.grad is not None
    assert matrix.grad.abs().sum() > 0
    assert torch.equal(skeleton.run(0, weights, hidden), plain)
    assert "online" not in dict(skeleton.blocks[0].get_submodule(FAMILIES[family]).named_children())
