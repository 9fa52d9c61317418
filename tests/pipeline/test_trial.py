"""How layers are rounded by themselves, for sensitivities."""

from pathlib import Path

import pytest
import torch

from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, to_groups
from bitfold.pipeline.plan import make_plan
from bitfold.pipeline.trial import trial_rounder, trial_rounding
from bitfold.ranges import MinMax
from bitfold.recipe import Recipe
from bitfold.rounding import Gptq, Nearest
from models_zoo import TOKENS, Zoo

FC1, FC2 = "fc1", "fc2"


@pytest.mark.parametrize(
    ("method", "kind"), [("rtn", Nearest), ("awq", Nearest), ("gptq", Gptq), ("signround", Gptq)]
)
def test_as_the_recipe_does_or_nearly(method: str, kind: type) -> None:
    assert type(trial_rounding(Recipe.make(method, "w3a16g32"))) is kind


def _rounded(
    path: Path, method: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The weights of OPT's second block, fc1 and fc2 rounded, and the inputs of fc2."""
    skeleton = Skeleton(Checkpoint(path))
    plan = make_plan(skeleton, Recipe.make(method, "w3a16g32"))
    outer = skeleton.load_outer()
    given = skeleton.embed(outer, TOKENS)
    given = skeleton.run(0, skeleton.load_block(0), given)
    weights = skeleton.load_block(1)
    inputs: list[torch.Tensor] = []
    hook = (
        skeleton.blocks[1]
        .get_submodule(FC2)
        .register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    )
    skeleton.run(1, weights, given)
    hook.remove()
    scheme = plan.recipe.scheme.weight
    assert scheme is not None
    rounded = trial_rounder(skeleton, plan)(1, weights, given)((FC1, FC2), scheme)
    return weights, rounded, inputs[0]


def test_to_nearest(checkpoint: Zoo) -> None:
    weights, rounded, _ = _rounded(checkpoint("opt", torch.float32), "rtn")
    assert set(rounded) == {FC1, FC2}
    scheme = Recipe.make("rtn", "w3a16g32").scheme.weight
    assert scheme is not None
    for name, value in rounded.items():
        weight = weights[f"{name}.weight"]
        limits = MinMax().limits(to_groups(weight, scheme), scheme)
        expected = QuantizedTensor.from_limits(weight, *limits, scheme, torch.float32)
        assert torch.equal(value, expected.dequantize())


def test_by_gptq_on_the_layers_own_inputs(checkpoint: Zoo) -> None:
    """Its output error is below that of rounding to nearest, on the inputs that it was shown."""
    path = checkpoint("opt", torch.float32)
    weights, nearest, x = _rounded(path, "rtn")
    _, rounded, _ = _rounded(path, "gptq")
    original = x @ weights[f"{FC2}.weight"].T
    errors = [float((x @ made[FC2].T - original).norm()) for made in (nearest, rounded)]
    assert errors[1] < 0.8 * errors[0]
