"""After the last block: the whole is distilled from the original, and what was learned is put into the shards.

What is learned is written once, beside the shards (`distilled.safetensors`, whole or not at all), and recorded in the
state; only then are the shards rewritten, each by itself. So a kill before that finds them as they were and trains
again, and a kill after it puts the same tensors into them again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitfold.distillation import Distillation, DistilProblem
from bitfold.export.artifact import shard_name, tensor_sums
from bitfold.pipeline.block import run_quantized
from bitfold.pipeline.job import Job
from bitfold.pipeline.material import gather
from bitfold.pipeline.outer import outer_tensors, outer_weights
from bitfold.pipeline.shards import block_from_tensors, block_tensors, check_shard
from bitfold.pipeline.streams import Streams
from bitfold.pipeline.student import Student
from bitfold.pipeline.workdir import Workdir
from bitfold.runtime.device import has_fast_bfloat16, quick_float32

__all__ = ["learn", "put_in"]

Report = Callable[[int, int, str], None]


@quick_float32()
def learn(job: Job, workdir: Workdir, streams: Streams, report: Report) -> None:
    """Train the model in the shards, and record what was learned. The shards are read only.

    streams: after the last block.
    """
    options, notes = _within_reach(job, workdir)
    seed = job.plan.recipe.seed * 10_007 + 5_003
    material = gather(job, streams, options, seed, report)
    student = Student(job, workdir.path, material.tokens, material.original, options)
    problem = DistilProblem(
        trained=student.trained,
        loss=student.loss,
        gradient=student.gradient,
        training=material.training,
        check=material.check,
        exact=job.dtype == torch.float64,
        low_is_quick=has_fast_bfloat16(job.skeleton.device),
        seed=seed,
        report=report,
    )
    found = options.fit(problem)
    learned = _learned_tensors(job, workdir, student)
    entry = asdict(found) | {"notes": [*notes, *found.notes], "trained": _trained(student)}
    # JSON has no numbers that are not finite.
    entry |= {key: entry[key] if math.isfinite(entry[key]) else None for key in ("before", "after")}
    entry["note"] = _sentence(entry)
    workdir.finish_distillation(entry | {"sums": tensor_sums(learned)}, learned)


def _within_reach(job: Job, workdir: Workdir) -> tuple[Distillation, list[str]]:
    """The recipe's distillation, its codes left alone where they are too many; and what the user should read."""
    options = job.plan.recipe.distillation
    assert options is not None
    count = sum(block["weights"] for block in workdir.blocks)
    if not options.codes or count <= options.most_codes:
        return options, []
    note = (
        f"distillation: the codes stay, because {count:,} are more than distil.most_codes={options.most_codes:,} "
        "(training one takes 20 bytes of memory)"
    )
    return options.model_copy(update={"codes": False, "written": 0, "resampled": 0}), [note]


def put_in(job: Job, workdir: Workdir, learned: Mapping[str, Tensor], report: Report) -> Tensor:
    """Put learned tensors into the shards, whether they are there already or not; returns what the last block of the
    simulation now gives for the probe, [windows, length, hidden]."""
    skeleton, plan, dtype = job.skeleton, job.plan, job.dtype
    count = len(skeleton.blocks)
    device = str(skeleton.device)
    workdir.write_tensors(shard_name(0, count + 1), outer_tensors(skeleton, plan, learned))
    outer = outer_weights(plan, outer_tensors(skeleton, plan, learned), dtype)
    hidden = skeleton.embed(outer, job.probe.to(skeleton.device))
    del outer
    for index in range(count):
        report(index, count, f"writing block {index + 1} of {count} again")
        name = shard_name(index + 1, count + 1)
        stored = load_file(workdir.path / name, device=device)
        stored |= {key: learned[key].to(device) for key in stored.keys() & learned.keys()}
        block = block_from_tensors(skeleton, index, plan, stored)
        workdir.write_tensors(name, stored)
        check_shard(workdir.path / name, skeleton, index, plan, block)
        hidden = run_quantized(skeleton, index, block, dtype)(hidden)
    return hidden


def _learned_tensors(job: Job, workdir: Workdir, student: Student) -> dict[str, Tensor]:
    """The stored tensors that training changed, by full name."""
    skeleton, plan = job.skeleton, job.plan
    count = len(skeleton.blocks)
    changed: dict[str, Tensor] = {}
    for index in range(count):
        before = load_file(workdir.path / shard_name(index + 1, count + 1))
        block = student.learned_block(index)
        for name, value in block_tensors(skeleton, index, plan, block).items():
            if not torch.equal(before[name], value.cpu()):
                changed[name] = value.cpu()
    for name, one in student.outer.items():
        value = one.stored()
        if not torch.equal(value, one.start):
            changed[name] = value.cpu()
    return changed


def _trained(student: Student) -> dict[str, int]:
    """How many numbers of each kind were trained."""
    counts = {"scales": 0, "norms": 0, "biases": 0}
    for name, one in student.named():
        counts[name] = counts.get(name, 0) + one.theta.numel()
    return counts


def _sentence(entry: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in entry["trained"].items() if count)
    stay = "zero-points stay" if "codes" in entry["trained"] else "codes and zero-points stay"
    if entry["before"] is None:
        return f"Distillation ({counts}) changed nothing, because the KL is not finite."
    if entry["kept"] == 0:
        return (
            f"Distillation ({counts}) did not lower the KL of {entry['before']:.4f} on {entry['held_back']} held-back "
            "windows: nothing was changed."
        )
    return (
        f"Distilled ({counts}; {stay}): KL on {entry['held_back']} held-back windows "
        f"{entry['before']:.4f} → {entry['after']:.4f}, the state after step {entry['kept']} of {entry['steps']}."
    )
