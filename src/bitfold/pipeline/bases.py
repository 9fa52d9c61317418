"""Learning the bases in which a model is quantized: its distance to the original as a function of rotations.

The weights stay those of the checkpoint. For a step every block's are turned into the present bases, block by block;
the gradient with respect to the turned weights goes on to the rotations. Embeddings and head are not turned: what the
embeddings give is, and what the last block gives is turned back.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitfold.distillation import split_windows
from bitfold.export.artifact import tensor_sums
from bitfold.models.family import FcPair, UpDown, ValueOutput
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import Scheme
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.part import Need
from bitfold.pipeline.backward import BlockRun, HeadLoss, gradient_through, leaves
from bitfold.pipeline.job import Job
from bitfold.pipeline.measure import input_statistics
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.problem import quantizing_trainably
from bitfold.pipeline.streams import TOKENS_PER_BATCH, Streams, advance
from bitfold.pipeline.turned import Bases, TurnedSkeleton, turned_block
from bitfold.pipeline.workdir import Workdir
from bitfold.runtime.device import has_fast_bfloat16
from bitfold.transforms import SiteTransform, fold
from bitfold.transforms.groups import Diagonal
from bitfold.transforms.rotation import Rotation
from bitfold.transforms.spinquant import BasesProblem, LearnedBases, learn_bases

__all__ = ["Turning", "learned_bases", "take_bases"]

Report = Callable[[int, int, str], None]

_STREAM = "stream"
# Weights of blocks that are kept between steps instead of being read again: the same however deep the model is.
_KEPT = 2**28


class Turning:
    """The model of a job in bases that can be learned.

    stream: R [hidden, hidden]; heads: of each block a matrix for the values of every KV head [K, H, H], none where the
    rotation leaves them alone. float64, on the skeleton's device; they require gradients.
    """

    def __init__(self, job: Job, skeleton: TurnedSkeleton, rotation: Rotation) -> None:
        assert job.stream_tokens is not None
        self._job, self._rotation, self._tokens = job, rotation, job.stream_tokens
        self._plain = Skeleton(skeleton.checkpoint, skeleton.device)
        self._outer = self._plain.load_outer(job.dtype)
        self._rounds_weights = rotation.rounds_weights or not _rounds_activations(job.plan)
        self._kept: dict[int, dict[str, Tensor]] = {}
        self.stream = skeleton.bases.stream.clone().requires_grad_()
        site = next((site for site in job.plan.sites if isinstance(site, ValueOutput)), None)
        self.heads = []
        if rotation.heads and site is not None:
            start = rotation.head_matrices(site, job.plan.heads).to(self.stream)
            self.heads = [start.clone().requires_grad_() for _ in skeleton.blocks]
        self._balances: list[list[Diagonal]] = []
        original = self._balanced(self._embedded(torch.arange(len(self._tokens))))
        self._head = HeadLoss(self._plain, self._outer, original, job.dtype)

    @torch.no_grad()
    def loss(self, windows: Tensor) -> float:
        """Mean KL(original ‖ quantized) in nats per token on calibration windows of these indices."""
        total, length = 0.0, self._tokens.shape[1]
        for part in windows.split(max(1, TOKENS_PER_BATCH // length)):
            hidden = self._embedded(part) @ self._turn
            for index in range(len(self._plain.blocks)):
                hidden = self._run(index, self._weights(index), hidden)
            total += self._head.value(self._outer, hidden @ self._turn.T, part)
        return total / (len(windows) * length)

    def gradient(self, windows: Tensor) -> float:
        """The same; its gradient is added to that of every basis. Products in bfloat16 where they are quick."""
        with torch.enable_grad():
            given = self._embedded(windows) @ self._turn
        device = self._plain.device
        low = self._job.dtype != torch.float64 and has_fast_bfloat16(device)
        count = len(windows) * self._tokens.shape[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            total, backward = gradient_through(
                len(self._plain.blocks),
                given.detach(),
                self._run_with_graph,
                lambda hidden: self._head_gradient(hidden, windows, count),
            )
        given.backward(backward)
        return total / count

    def _head_gradient(self, hidden: Tensor, windows: Tensor, count: int) -> tuple[float, Tensor]:
        """The summed KL of what the last block gave, in the stream's basis; and the gradient of the mean."""
        with torch.enable_grad():
            turned = hidden.requires_grad_()
            plain = turned @ self._turn.T
        total, backward = self._head.gradient(self._outer, plain.detach(), windows)
        plain.backward(backward / count)
        assert turned.grad is not None
        return total, turned.grad

    def _run_with_graph(self, index: int, given: Tensor) -> BlockRun:
        with torch.enable_grad():
            weights, gather = leaves(self._weights(index))
        return BlockRun(partial(self._run, index, weights), given, gather)

    def _run(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Block `index`, its layers' inputs, queries, keys and values quantized."""
        with quantizing_trainably(self._plain, index, self._job.plan):
            hidden = hidden.to(self._plain.device, self._job.dtype)
            return self._plain.run(index, weights, hidden).cpu()

    # -- weights -----------------------------------------------------------------------------------

    @property
    def _turn(self) -> Tensor:
        """R in the dtype that the model runs in, on the CPU as hidden states are."""
        return self.stream.to("cpu", self._job.dtype)

    def _weights(self, index: int) -> dict[str, Tensor]:
        """The block's weights in the present bases, differentiable in them, with the maps that run."""
        plan, dtype = self._job.plan, self._job.dtype
        bases = Bases(self.stream.to(dtype), [one.to(dtype) for one in self.heads])
        weights = turned_block(self._block(index), index, bases, self._plain)
        prefix = self._plain.block_name(index)
        maps = plan.block_maps(prefix)
        for site in plan.sites:
            if site.runs_at in maps:
                running = self._rotation.running(site, maps[site.runs_at], bases.stream)
                weights = weights if running is None else fold(weights, running, plan.heads)
        for name, scheme in plan.block_schemes(prefix).items():
            if self._rounds_weights and scheme.weight is not None:
                key = f"{name}.weight"
                weights[key] = fake_quantize_trainable(weights[key], scheme.weight)
        return weights

    def _block(self, index: int) -> dict[str, Tensor]:
        """The checkpoint's weights of a block, balanced."""
        if index in self._kept:
            return self._kept[index]
        weights = self._plain.load_block(index, self._job.dtype)
        for diagonal in self._balances[index]:
            weights = fold(weights, diagonal, self._job.plan.heads)
        count = sum(value.numel() for value in weights.values())
        if count * len(self._plain.blocks) <= _KEPT:
            self._kept[index] = weights
        return weights

    @torch.no_grad()
    def _balanced(self, hidden: Tensor) -> Tensor:
        """What the original's last block gives for what its first is given, which is overwritten.

        On the way the recipe's diagonals inside the MLPs are found: no basis changes what stands there, and an outlier
        of theirs would hide what the bases do.
        """
        plan, skeleton = self._job.plan, self._plain
        inner = [site for site in plan.sites if isinstance(site, UpDown | FcPair)]
        parts = [p for p in plan.recipe.transforms[1:] if isinstance(p, SiteTransform)]
        needs = frozenset[Need]().union(*(part.needs for part in parts)) - {"cross"}
        names = tuple(skeleton.family.measured_at(site) for site in inner)
        streams = Streams(hidden[:1], hidden[:1], original=hidden, quantized=hidden)
        for index in range(len(skeleton.blocks)):
            weights = skeleton.load_block(index, self._job.dtype)
            found = input_statistics(skeleton, index, plan, weights, streams, needs, names=names)
            schemes = plan.block_schemes(skeleton.block_name(index))
            fits = [
                part.fit(
                    site, weights, found[skeleton.family.measured_at(site)], schemes, plan.heads
                )
                for part in parts
                for site in inner
            ]
            self._balances.append([fit for fit in fits if isinstance(fit, Diagonal)])
            advance(hidden, partial(skeleton.run, index, weights), skeleton.device)
        return hidden

    def _embedded(self, windows: Tensor) -> Tensor:
        tokens = self._tokens[windows].to(self._plain.device)
        with torch.no_grad():
            return self._plain.embed(self._outer, tokens).cpu()


def take_bases(job: Job, workdir: Workdir, report: Report) -> None:
    """Turn the job's skeleton into learned bases where the recipe asks for them: those that a killed run of the same
    request recorded, or new ones, which are recorded."""
    skeleton, rotation = job.skeleton, job.plan.recipe.stream_transform
    if not (isinstance(rotation, Rotation) and rotation.steps):
        return
    if not isinstance(skeleton, TurnedSkeleton):
        return  # a stream that takes no rotation, where the recipe puts up with it
    bases = _recorded(workdir)
    if bases is None:
        workdir.restart()
        found, bases = learned_bases(job, skeleton, rotation, report)
        tensors = {_STREAM: bases.stream}
        tensors |= {f"heads.{index}": one for index, one in enumerate(bases.heads)}
        entry = asdict(found) | {"note": found.sentence, "sums": tensor_sums(tensors)}
        workdir.finish_bases(entry, tensors)
    skeleton.turn(bases)


def _recorded(workdir: Workdir) -> Bases | None:
    """What a killed run learned; None unless it is intact."""
    if workdir.bases is None:
        return None
    try:
        tensors = {name: value.clone() for name, value in load_file(workdir.learned_bases).items()}
        if tensor_sums(tensors) != workdir.bases["sums"]:
            return None
        heads = [tensors[f"heads.{index}"] for index in range(len(tensors) - 1)]
        return Bases(tensors[_STREAM], heads)
    except (OSError, SafetensorError, KeyError):
        return None


def learned_bases(
    job: Job, skeleton: TurnedSkeleton, rotation: Rotation, report: Report
) -> tuple[LearnedBases, Bases]:
    """What learning found, and the bases, on the CPU."""
    turning = Turning(job, skeleton, rotation)
    stream = skeleton.family.stream(skeleton.config)
    assert stream is not None
    assert job.stream_tokens is not None
    seed = job.plan.recipe.seed * 10_007 + 7_001
    training, check = split_windows(len(job.stream_tokens), rotation.held_back, seed)
    problem = BasesProblem(
        bases=[turning.stream, *turning.heads],
        loss=turning.loss,
        gradient=turning.gradient,
        training=training,
        check=check,
        keeps_ones=stream.reads_mean,
        seed=seed,
        report=report,
    )
    found = learn_bases(problem, rotation.steps, rotation.batch, rotation.angle)
    heads = [one.detach().cpu() for one in turning.heads]
    return found, Bases(turning.stream.detach().cpu(), heads)


def _rounds_activations(plan: Plan) -> bool:
    """Whether anything but weights is quantized."""
    linears = any(scheme.activation is not None for scheme in plan.schemes.values())
    return linears or any(scheme != Scheme() for scheme in plan.attention.values())
