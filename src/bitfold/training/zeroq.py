"""ZeroQ: quantization without data (Cai et al. 2020, arXiv 2001.00281).

inputs      x minimises Σ_i ‖μ̃_i(x) − μ_i‖² + ‖σ̃_i(x) − σ_i‖² over the batch norms i of the model, where μ̃, σ̃ are the
            statistics of what reaches them, and μ, σ those they keep (equation 3)
sensitivity Ω_i(k) = mean KL(M(x) ‖ M_i,k(x)) where layer i alone has weights of k bits (equation 2)
bits        of every layer: the least Σ Ω_i(k_i) within a budget, solved exactly
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.allocation.programme import Limit, choose
from bitfold.errors import FamilyError, RecipeError
from bitfold.numerics import TensorScheme, fake_quantize_dynamic

__all__ = ["bits_within", "distilled_inputs", "sensitivities"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def distilled_inputs(
    model: nn.Module,
    shape: Sequence[int],
    *,
    steps: int = 500,
    rate: float = 0.1,
    seed: int = 0,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Tensor:
    """Inputs [samples, ...] of this shape whose statistics before every batch norm are those the model has learned.

    They begin as Gaussian noise, and Adam moves them. The model stays as it is.

    Raises FamilyError for a model without batch norms: use data of the model's own then.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    if not norms:
        raise FamilyError(
            "The model has no batch norms with running statistics, which ZeroQ's inputs are matched to: calibrate on "
            "data, or do this before batch norms are folded."
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    training = model.training
    model.eval()
    distances: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(model.train, training)
        for norm in norms:
            hook = norm.register_forward_pre_hook(_measuring(norm, distances))
            stack.callback(hook.remove)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            distances.clear()
            model(x)
            (x.grad,) = torch.autograd.grad(torch.stack(distances).sum(), [x])
            optimizer.step()
            report(step + 1, steps, "distilling inputs")
    return x.detach()


def _measuring(
    norm: nn.Module, distances: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    assert isinstance(norm, _NORMS)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # noqa: PT018 - for type checkers
    deviation = (variance + norm.eps).sqrt()

    def measure(module: nn.Module, given: tuple[Tensor]) -> None:
        by_channel = given[0].transpose(0, 1).flatten(1)
        own = (by_channel.var(dim=1, unbiased=False) + norm.eps).sqrt()
        distance = (by_channel.mean(dim=1) - mean).square().sum()
        distances.append(distance + (own - deviation).square().sum())

    return measure


@torch.no_grad()
def sensitivities(
    model: nn.Module, inputs: Tensor, bits: Sequence[int], *, scheme: TensorScheme | None = None
) -> dict[str, dict[int, float]]:
    """Ω_i(k) of every `nn.Conv2d` and `nn.Linear` for each number of bits: mean KL in nats on these inputs.

    scheme: of the weights, but for their bits; symmetric with a scale for each channel if not given.
    """
    scheme = scheme or TensorScheme()
    training = model.training
    model.eval()
    target = F.log_softmax(model(inputs).flatten(0, -2).double(), dim=-1)
    found: dict[str, dict[int, float]] = {}
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Conv2d, nn.Linear):
            continue
        weight = layer.get_parameter("weight")
        kept, found[name] = weight.detach().clone(), {}
        for count in bits:
            of_bits = scheme.model_copy(update={"bits": count})
            weight.copy_(fake_quantize_dynamic(kept.flatten(1), of_bits).view_as(kept))
            given = F.log_softmax(model(inputs).flatten(0, -2).double(), dim=-1)
            kl = F.kl_div(given, target, log_target=True, reduction="batchmean")
            found[name][count] = max(0.0, float(kl))
        weight.copy_(kept)
    model.train(training)
    return found


def bits_within(
    model: nn.Module, measured: Mapping[str, Mapping[int, float]], average: float
) -> dict[str, int]:
    """Bits for every layer, of those that were measured: the least total sensitivity where a weight has at most so many
    bits on average. What `prepare` takes as options={"bits": …}.

    Raises RecipeError for a budget below the fewest bits.
    """
    counts = [model.get_submodule(name).get_parameter("weight").numel() for name in measured]
    costs = [list(row.values()) for row in measured.values()]
    amounts = [
        [float(count * bits) for bits in row]
        for count, row in zip(counts, measured.values(), strict=True)
    ]
    chosen = choose(costs, [Limit(amounts, average * sum(counts))])
    if chosen is None:
        fewest = min(bits for row in measured.values() for bits in row)
        raise RecipeError(
            f"{average:g} bits a weight are not enough, since every layer has {fewest} at least: allow more, "
            "or measure fewer bits."
        )
    options = [list(row) for row in measured.values()]
    return {name: bits[at] for name, bits, at in zip(measured, options, chosen, strict=True)}
