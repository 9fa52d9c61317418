"""One block: capture inputs ► fit transforms ► fold ► choose ranges ► round."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfold.models.skeleton import Skeleton
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.pipeline.calibrated_heads import calibrated_heads
from bitfold.pipeline.hooks import InputQuantizer, capturing_inputs, quantizing
from bitfold.pipeline.inputs import calibration_needs, input_quantizers
from bitfold.pipeline.measure import input_statistics
from bitfold.pipeline.online import with_identities
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.rewrite import rewrite_block
from bitfold.pipeline.round import round_block
from bitfold.pipeline.streams import Streams
from bitfold.runtime.device import quick_float32

__all__ = ["QuantizedBlock", "quantize_block", "run_quantized"]


@dataclass(frozen=True)
class QuantizedBlock:
    """A block's result.

    tensors: quantized weights; plain: everything else, in the dtype of storage; inputs: how layers' inputs are
    quantized; all by name relative to the block. errors: relative error of each layer's output on the probe.
    unpacked_in: the dtype in which loaders compute the weights' values, where that is not the one they run in.
    fits: figures of the transforms' fits. notes: what the user should read. head_tensors: what was calibrated of
    queries, keys and values, by name (`runtime.attention.head_tensors`).
    """

    tensors: dict[str, QuantizedTensor]
    plain: dict[str, Tensor]
    inputs: dict[str, InputQuantizer]
    heads: Scheme
    errors: dict[str, float]
    folding_error: float
    unpacked_in: torch.dtype | None = None
    fits: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the block's parameters are once loaded: the simulation."""
        simulated = {name: value.to(dtype) for name, value in self.plain.items()}
        for name, tensor in self.tensors.items():
            simulated[f"{name}.weight"] = tensor.dequantize(self.unpacked_in or dtype).to(dtype)
        return simulated


@torch.no_grad()
@quick_float32()
def quantize_block(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    streams: Streams,
    dtype: torch.dtype,
    report: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> QuantizedBlock:
    """Rewrite and round block `index`; the streams are read, not advanced. `report` hears of the fits' progress.

    Raises EquivalenceError, naming the block and the error, where folding changed what the block computes.
    """
    recipe = plan.recipe
    prefix = skeleton.block_name(index)
    schemes = plan.block_schemes(prefix)
    weights = skeleton.load_block(index, dtype)

    rewritten = rewrite_block(skeleton, index, plan, streams, weights, report)
    folded = with_identities(rewritten.weights, plan.block_maps(prefix))
    quantized_names = {name for name, scheme in schemes.items() if scheme.weight is not None}
    plain = {
        name: value.to(plan.storage)
        for name, value in folded.items()
        if name.removesuffix(".weight") not in quantized_names
    }
    folded |= {name: value.to(dtype) for name, value in plain.items()}

    ranges = input_statistics(skeleton, index, plan, folded, streams, calibration_needs(recipe))
    inputs = input_quantizers(
        schemes, skeleton.family, ranges, folded, recipe.activation_range, plan.storage
    )
    tensors, rounding_notes = round_block(
        skeleton, index, plan, streams, folded, inputs, rewritten.clipping, report
    )
    heads = plan.attention[f"{prefix}.{skeleton.family.attention}"]
    errors = _layer_errors(skeleton, index, folded, tensors, inputs, streams.probe_quantized)
    block = QuantizedBlock(
        tensors,
        plain,
        inputs,
        heads,
        errors,
        rewritten.folding_error,
        plan.unpacked_in,
        rewritten.fits,
        [*(note for fit in rewritten.fits for note in fit.get("notes", ())), *rounding_notes],
    )
    found = calibrated_heads(skeleton, index, plan, heads, block.weights(dtype), streams, inputs)
    return replace(block, head_tensors=found)


def run_quantized(
    skeleton: Skeleton, index: int, block: QuantizedBlock, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The simulation of a quantized block, as a function of hidden states [batch, length, hidden]."""
    weights = block.weights(dtype)

    def run(hidden: Tensor) -> Tensor:
        module = skeleton.blocks[index]
        with (
            torch.no_grad(),
            quantizing(
                module,
                block.inputs,
                skeleton.family.attention,
                block.heads,
                calibrated=block.head_tensors,
            ),
        ):
            return skeleton.run(index, weights, hidden)

    return run


def _layer_errors(
    skeleton: Skeleton,
    index: int,
    folded: Mapping[str, Tensor],
    tensors: Mapping[str, QuantizedTensor],
    inputs: Mapping[str, InputQuantizer],
    probe: Tensor,
) -> dict[str, float]:
    """‖Q(X) Ŵᵀ − X Wᵀ‖ / ‖X Wᵀ‖ of each layer, its input X taken from the probe."""
    seen: dict[str, Tensor] = {}
    receivers = {shared[0]: _keep(seen, shared[0]) for shared in skeleton.family.inputs}
    with capturing_inputs(skeleton.blocks[index], receivers):
        skeleton.run(index, folded, probe.to(skeleton.device))
    errors = {}
    for name in skeleton.family.linears:
        if name not in tensors and name not in inputs:
            continue
        x = seen[skeleton.family.input_of(name)]
        weight = folded[f"{name}.weight"]
        exact = x @ weight.T
        rounded = tensors[name].dequantize(weight.dtype) if name in tensors else weight
        given = inputs[name](x) if name in inputs else x
        errors[name] = float((given @ rounded.T - exact).norm() / exact.norm().clamp(min=1e-30))
    return errors


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def receive(x: Tensor) -> None:
        seen[name] = x

    return receive
