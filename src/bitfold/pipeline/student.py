"""The quantized model as a student: its distance to the original and the gradient of it, one block at a time.

A block's weights are made of its codes when it runs and forgotten after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitfold.distillation import Distillation, Trained, TrainedCodes
from bitfold.export.artifact import shard_name
from bitfold.numerics import TensorScheme, fake_quantize_dynamic
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.numerics.trainable_scale import dequantize_trainable
from bitfold.pipeline.backward import BlockRun, HeadLoss, gradient_through, leaves
from bitfold.pipeline.block import QuantizedBlock
from bitfold.pipeline.hooks import InputQuantizer, quantizing
from bitfold.pipeline.job import Job
from bitfold.pipeline.outer import outer_weights
from bitfold.pipeline.plan import HEAD
from bitfold.pipeline.shards import block_from_tensors
from bitfold.pipeline.streams import TOKENS_PER_BATCH, batches

__all__ = ["Student"]

# Codes of so many weights are kept between steps instead of being read again: the same however deep the model is.
_KEPT = 2**28


class Student:
    """The model in the shards at `path`, with the tensors that are trained.

    blocks: of each, trained tensors by relative name, `NAME.weight` standing for the scales of a quantized weight;
    outer: those outside the blocks, by full name.
    """

    def __init__(
        self, job: Job, path: Path, tokens: Tensor, original: Tensor, options: Distillation
    ) -> None:
        """tokens: ids [windows, length] to learn from; original: what the original's last block gives for them
        [windows, length, hidden]. options: say what is trained beside the scales.
        """
        self._job, self._path, self._tokens = job, path, tokens
        self._kept: dict[int, QuantizedBlock] = {}
        self._kept_weights = 0
        self._outer = job.skeleton.load_outer(job.dtype)
        self._head = HeadLoss(job.skeleton, self._outer, original, job.dtype)
        if HEAD in job.plan.schemes:
            stored = load_file(self._file(0), device=str(job.skeleton.device))
            self._outer = outer_weights(job.plan, stored, job.dtype)

        def wanted(name: str, value: Tensor) -> bool:
            return value.ndim == 1 and (options.biases if _of_linear(name, job) else options.norms)

        self.blocks: list[dict[str, Trained]] = []
        self.codes: list[dict[str, TrainedCodes]] = []
        for index in range(len(job.skeleton.blocks)):
            block = self._block(index)
            trained = {
                f"{name}.weight": Trained(tensor.scale, positive=True, scheme=tensor.scheme)
                for name, tensor in block.tensors.items()
                if not tensor.scheme.fp4  # a scale of 8 bits has no near neighbours
            }
            trained |= {
                name: Trained(value, positive=False)
                for name, value in block.plain.items()
                if wanted(name, value)
            }
            self.blocks.append(trained)
            self.codes.append(
                {
                    name: TrainedCodes(tensor.codes, tensor.scheme)
                    for name, tensor in block.tensors.items()
                    if options.codes and tensor.scheme.grid == "int"
                }
            )
        names = [name for name, value in self._outer.items() if value.ndim == 1]
        stored = job.skeleton.load_outer(names=names) if names and options.norms else {}
        self.outer = {name: Trained(value, positive=False) for name, value in stored.items()}

    @property
    def trained(self) -> list[Trained | TrainedCodes]:
        """All that is trained, in the order of the model."""
        return [one for _, one in self.named()]

    def named(self) -> Iterator[tuple[str, Trained | TrainedCodes]]:
        """The same, each with its kind: `scales`, `norms`, `biases` or `codes`."""
        for codes in self.codes:
            yield from (("codes", one) for one in codes.values())
        for block in self.blocks:
            for name, one in block.items():
                of_linear = _of_linear(name, self._job)
                kind = "biases" if of_linear else "norms"
                yield ("scales" if of_linear and name.endswith(".weight") else kind), one
        for one in self.outer.values():
            yield "norms", one

    def learned_block(self, index: int) -> QuantizedBlock:
        """Block `index` as it is to be stored now."""
        block, trained = self._block(index), self.blocks[index]
        codes = self.codes[index]
        tensors = block.tensors | {
            name: replace(
                tensor,
                scale=trained[f"{name}.weight"].stored(),
                codes=codes[name].stored() if name in codes else tensor.codes,
            )
            for name, tensor in block.tensors.items()
            if f"{name}.weight" in trained
        }
        plain = {
            name: trained[name].stored() if name in trained else value
            for name, value in block.plain.items()
        }
        return replace(block, tensors=tensors, plain=plain)

    @torch.no_grad()
    def loss(self, windows: Tensor) -> float:
        """Mean KL(original ‖ quantized) in nats per token on calibration windows of these indices, as loaders will
        compute it."""
        total = 0.0
        for part in _in_batches(windows, self._tokens.shape[1]):
            hidden = self._forward(part)
            total += self._head.value(self._outer_now(), hidden, part)
        return total / (len(windows) * self._tokens.shape[1])

    def gradient(self, windows: Tensor, low: bool) -> float:
        """The same; its gradient is added to every θ. The sum is taken back, not the mean, that half precision does
        not lose it. low: matrix products in bfloat16."""
        count = len(windows) * self._tokens.shape[1]
        with torch.autocast(self._job.skeleton.device.type, torch.bfloat16, enabled=low):
            total = self._gradient(windows)
        for one in self.trained:
            if one.theta.grad is not None:
                one.theta.grad /= count
        return total / count

    def _gradient(self, windows: Tensor) -> float:
        """The summed KL; adds its gradient to every θ."""

        def head(hidden: Tensor) -> tuple[float, Tensor]:
            with torch.enable_grad():
                weights = self._outer_now()
            return self._head.gradient(weights, hidden, windows)

        blocks, embedded = len(self.blocks), self._embedded(windows)
        return gradient_through(blocks, embedded, self._run_with_graph, self._run, head)[0]

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self, windows: Tensor) -> Tensor:
        """What the last block gives, [windows, length, hidden], on the CPU."""
        hidden = self._embedded(windows)
        for index in range(len(self.blocks)):
            hidden = self._run(index, hidden)
        return hidden

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        """What block `index` gives, as loaders compute it, [windows, length, hidden] on the CPU."""
        skeleton, dtype = self._job.skeleton, self._job.dtype
        block = self._block(index)
        weights = self._weights(index, block)
        with self._quantizing(index, block, block.inputs, fake_quantize_dynamic):
            parts = [
                skeleton.run(index, weights, part.to(skeleton.device, dtype)).cpu()
                for part in batches(hidden)
            ]
        return torch.cat(parts)

    def _embedded(self, windows: Tensor) -> Tensor:
        skeleton = self._job.skeleton
        parts = [
            skeleton.embed(self._outer, part.to(skeleton.device)).cpu()
            for part in batches(self._tokens[windows])
        ]
        return torch.cat(parts)

    def _weights(self, index: int, block: QuantizedBlock) -> dict[str, Tensor]:
        """The block's parameters once loaded; differentiable in what is trained."""
        dtype, trained, codes = self._job.dtype, self.blocks[index], self.codes[index]
        weights = {
            name: (trained[name].value() if name in trained else value).to(dtype)
            for name, value in block.plain.items()
        }
        for name, tensor in block.tensors.items():
            key = f"{name}.weight"
            if key not in trained:
                weights[key] = tensor.dequantize(block.unpacked_in or dtype).to(dtype)
                continue
            weights[key] = dequantize_trainable(
                tensor,
                trained[key].value(),
                block.unpacked_in or dtype,
                dtype,
                codes[name].value() if name in codes else None,
            )
        return weights

    def _quantizing(
        self,
        index: int,
        block: QuantizedBlock,
        inputs: Mapping[str, Callable[[Tensor], Tensor]],
        on_heads: Callable[[Tensor, TensorScheme], Tensor],
    ) -> AbstractContextManager[None]:
        skeleton = self._job.skeleton
        return quantizing(
            skeleton.blocks[index],
            inputs,
            skeleton.family.attention,
            block.heads,
            on_heads,
            block.head_tensors,
        )

    # -- backward ----------------------------------------------------------------------------------

    def _run_with_graph(self, index: int, given: Tensor) -> BlockRun:
        """The block run on hidden states [windows, length, hidden], ready to be taken back."""
        skeleton, dtype = self._job.skeleton, self._job.dtype
        block = self._block(index)
        inputs = {name: _through(quantizer) for name, quantizer in block.inputs.items()}
        with torch.enable_grad():
            weights, gather = leaves(self._weights(index, block))
        with self._quantizing(index, block, inputs, fake_quantize_trainable):
            run = partial(skeleton.run, index, weights)
            return BlockRun(lambda x: run(x.to(skeleton.device, dtype)), given, gather)

    def _outer_now(self) -> dict[str, Tensor]:
        """The weights outside the blocks, differentiable in what is trained of them."""
        learned = {n: o.value().to(self._job.dtype) for n, o in self.outer.items()}
        return dict(self._outer) | learned

    # -- shards ------------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._path / shard_name(number, len(self._job.skeleton.blocks) + 1)

    def _block(self, index: int) -> QuantizedBlock:
        """Block `index` as it was written, codes unpacked."""
        if index in self._kept:
            return self._kept[index]
        skeleton = self._job.skeleton
        tensors = load_file(self._file(index + 1), device=str(skeleton.device))
        block = block_from_tensors(skeleton, index, self._job.plan, tensors)
        # Copies, because matrix products may depend on how their operands are aligned.
        plain = {name: value.clone() for name, value in block.plain.items()}
        block = replace(block, plain=plain)
        size = sum(tensor.codes.numel() for tensor in block.tensors.values())
        size += sum(value.nbytes for value in plain.values())
        if self._kept_weights + size <= _KEPT:
            self._kept[index] = block
            self._kept_weights += size
        return block


def _of_linear(name: str, job: Job) -> bool:
    """Whether a block's parameter of one dimension is the bias of a linear layer."""
    return name.rpartition(".")[0] in job.skeleton.family.linears


def _in_batches(windows: Tensor, length: int) -> Sequence[Tensor]:
    return windows.split(max(1, TOKENS_PER_BATCH // length))


def _through(quantizer: InputQuantizer) -> Callable[[Tensor], Tensor]:
    """The same quantization, with gradients: of what a static range clips there are none."""
    scheme = quantizer.scheme
    if scheme.fp4 or (scheme.clusters is not None and not scheme.static):
        return lambda x: x + (quantizer(x) - x).detach()
    if not scheme.static:
        share = quantizer.scale if scheme.clipped else None
        ratios = None if share is None else (share, share)
        return lambda x: fake_quantize_trainable(x, scheme, ratios)

    def quantize(x: Tensor) -> Tensor:
        with torch.no_grad():
            largest = torch.finfo(x.dtype).max
            ends = x.new_tensor([-largest, largest]).unsqueeze(-1)
            low, high = quantizer(ends.expand(-1, x.shape[-1])).unbind()
            rounded = quantizer(x)
        clipped = x.clamp(low, high)
        return clipped + (rounded - clipped).detach()

    return quantize
