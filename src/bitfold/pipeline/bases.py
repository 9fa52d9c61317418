"""Learning the bases in which a model is quantized: its distance to the original as a function of rotations.

The weights stay those of the checkpoint. For a step every block's are turned into the present bases, block by block;
the gradient with respect to the turned weights goes on to the rotations. Embeddings and head are not turned: what the
embeddings give is, and what the last block gives is turned back.
"""

import math
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
from bitfold.pipeline.backward import BlockRun, HeadLoss, gradient_through, leaves
from bitfold.pipeline.job import Job
from bitfold.pipeline.plan import Plan
from bitfold.pipeline.problem import quantizing_trainably
from bitfold.pipeline.rewrite import Rewritten, fold_sites
from bitfold.pipeline.streams import Streams, advance, batches, embedded
from bitfold.pipeline.turned import Bases, TurnedSkeleton, turned_block
from bitfold.pipeline.workdir import Workdir
from bitfold.runtime.device import has_fast_bfloat16, quick_float32
from bitfold.transforms import SiteTransform, fold
from bitfold.transforms.groups import Transform
from bitfold.transforms.rotation import Rotation
from bitfold.transforms.spinquant import BasesProblem, LearnedBases, learn_bases

__all__ = ["Turning", "learned_bases", "take_bases"]

Report = Callable[[int, int, str], None]

_STREAM = "stream"
# What bfloat16 may change the first loss by, in share.
_LARGEST_CHANGE = 0.1
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
        # Turning is exact to float32 at least, whatever the model runs in: it must not be what is learned from.
        self._exact = torch.float64 if job.dtype == torch.float64 else torch.float32
        self._rounds_weights = rotation.rounds_weights or not _rounds_activations(job.plan)
        self._low: bool | None = None
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._kept_weights = 0
        self.stream = skeleton.bases.stream.clone().requires_grad_()
        site = next((site for site in job.plan.sites if isinstance(site, ValueOutput)), None)
        self.heads = []
        if rotation.heads and site is not None:
            start = rotation.head_matrices(site, job.plan.heads).to(self.stream)
            self.heads = [start.clone().requires_grad_() for _ in skeleton.blocks]
        self._balances: list[list[Transform]] = []
        original = self._balanced(embedded(self._plain, self._outer, self._tokens))
        self._head = HeadLoss(self._plain, self._outer, original, job.dtype)

    @torch.no_grad()
    def loss(self, windows: Tensor) -> float:
        """Mean KL(original ‖ quantized) in nats per token on calibration windows of these indices."""
        hidden = self._begin(windows)
        for index in range(len(self._plain.blocks)):
            hidden = self._run(index, hidden)
        total = self._head.value(self._outer, self._end(hidden), windows)
        return total / (len(windows) * self._tokens.shape[1])

    def gradient(self, windows: Tensor) -> float:
        """The same; its gradient is added to that of every basis. Products in bfloat16 where they are quick, and change
        the first loss by less than a tenth."""
        if self._low is None:
            self._low = self._may_be_low(windows)
        with torch.enable_grad():
            given = self._begin(windows)
        count = len(windows) * self._tokens.shape[1]
        with torch.autocast(self._plain.device.type, torch.bfloat16, enabled=self._low):
            total, backward = gradient_through(
                len(self._plain.blocks),
                given.detach(),
                self._run_with_graph,
                self._run,
                lambda hidden: self._head_gradient(hidden, windows, count),
            )
        given.backward(backward)
        return total / count

    def _may_be_low(self, windows: Tensor) -> bool:
        device = self._plain.device
        if self._job.dtype == torch.float64 or not has_fast_bfloat16(device):
            return False
        exact = self.loss(windows)
        with torch.autocast(device.type, torch.bfloat16):
            low = self.loss(windows)
        return abs(low - exact) <= _LARGEST_CHANGE * exact

    def _head_gradient(self, hidden: Tensor, windows: Tensor, count: int) -> tuple[float, Tensor]:
        """The summed KL of what the last block gave, in the stream's basis; and the gradient of the mean."""
        with torch.enable_grad():
            turned = hidden.requires_grad_()
            plain = self._end(turned)
        total, backward = self._head.gradient(self._outer, plain.detach(), windows)
        plain.backward(backward / count)
        assert turned.grad is not None
        return total, turned.grad

    def _begin(self, windows: Tensor) -> Tensor:
        """What the first block is given, on the CPU, differentiable in R."""
        return self._times(embedded(self._plain, self._outer, self._tokens[windows]), self.stream)

    def _end(self, hidden: Tensor) -> Tensor:
        """What the last block gave, in the original's basis."""
        return self._times(hidden, self.stream.T)

    def _times(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            turned = hidden.to(self._exact) @ matrix.to("cpu", self._exact)
        return turned.to(self._job.dtype)

    # -- blocks ------------------------------------------------------------------------------------

    def _run_with_graph(self, index: int, given: Tensor) -> BlockRun:
        with torch.enable_grad():
            weights, gather = leaves(self._weights(index))
        return BlockRun(partial(self._run_piece, index, weights), given, gather)

    @torch.no_grad()
    def _run(self, index: int, hidden: Tensor) -> Tensor:
        weights = self._weights(index)
        return torch.cat([self._run_piece(index, weights, part) for part in batches(hidden)])

    def _run_piece(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Block `index`, its layers' inputs, queries, keys and values quantized."""
        with quantizing_trainably(self._plain, index, self._job.plan):
            hidden = hidden.to(self._plain.device, self._job.dtype)
            return self._plain.run(index, weights, hidden).cpu()

    def _weights(self, index: int) -> dict[str, Tensor]:
        """The block's weights in the present bases, differentiable in them, with the maps that run."""
        plan = self._job.plan
        with torch.autocast(self._plain.device.type, enabled=False):
            bases = Bases(self.stream.to(self._exact), [one.to(self._exact) for one in self.heads])
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
        return {name: value.to(self._job.dtype) for name, value in weights.items()}

    def _block(self, index: int) -> dict[str, Tensor]:
        """The checkpoint's weights of a block, balanced."""
        if index in self._kept:
            return self._kept[index]
        weights = self._plain.load_block(index, self._exact)
        for diagonal in self._balances[index]:
            weights = fold(weights, diagonal, self._job.plan.heads)
        count = sum(value.numel() for value in weights.values())
        if self._kept_weights + count <= _KEPT:
            self._kept[index] = weights
            self._kept_weights += count
        return weights

    @torch.no_grad()
    def _balanced(self, hidden: Tensor) -> Tensor:
        """What the original's last block gives for what its first is given, which is overwritten.

        On the way the recipe's diagonals inside the MLPs are found: no basis changes what stands there, and an outlier
        of theirs would hide what the bases do.
        """
        plan, skeleton = self._job.plan, self._plain
        inner = [site for site in plan.sites if isinstance(site, UpDown | FcPair)]
        parts = [p for p in plan.recipe.transforms if isinstance(p, SiteTransform) and p.balances]
        streams = Streams(hidden[:1], hidden[:1], original=hidden, quantized=hidden)
        for index in range(len(skeleton.blocks)):
            weights = skeleton.load_block(index, self._job.dtype)
            found = Rewritten(weights)
            for part in parts:
                fold_sites(part, skeleton, index, plan, streams, found, inner)
            self._balances.append(found.transforms)
            advance(hidden, partial(skeleton.run, index, weights), skeleton.device)
        return hidden


@quick_float32()
def take_bases(job: Job, workdir: Workdir, report: Report) -> None:
    """Turn the job's skeleton into learned bases where the recipe asks for them: those that a killed run of the same
    request recorded, or new ones, which are recorded."""
    skeleton, rotation = job.skeleton, job.plan.recipe.learned_rotation
    if rotation is None:
        return
    assert isinstance(skeleton, TurnedSkeleton)  # see `settled`
    bases = _recorded(workdir)
    if bases is None:
        workdir.restart()
        found, bases = learned_bases(job, skeleton, rotation, report)
        tensors = {_STREAM: bases.stream}
        tensors |= {f"heads.{index}": one for index, one in enumerate(bases.heads)}
        entry = asdict(found) | {"note": found.sentence, "sums": tensor_sums(tensors)}
        # JSON has no numbers that are not finite.
        finite = {key: entry[key] for key in ("before", "after") if math.isfinite(entry[key])}
        entry |= {"before": None, "after": None} | finite
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
