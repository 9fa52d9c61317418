"""The gradient that is taken back block by block is that of the whole model; its loss is what loaders compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.numerics import to_groups
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.pipeline.block import run_quantized
from bitfold.pipeline.hooks import quantizing
from bitfold.pipeline.job import Job, prepare
from bitfold.pipeline.outer import outer_tensors
from bitfold.pipeline.shards import block_tensors
from bitfold.pipeline.step import step
from bitfold.pipeline.student import Student
from bitfold.pipeline.workdir import Workdir
from bitfold.recipe import Recipe
from models_zoo import TOKENS, Zoo

WINDOWS = torch.tensor([1, 0])


def student_of(
    checkpoint: Zoo, family: str, scheme: str, out: Path, dtype: torch.dtype, *settings: str
) -> tuple[Job, Student, Tensor]:
    """A job whose shards are written, its student, and the original's last hidden states."""
    np.save(out / "ids.npy", TOKENS.numpy())
    model = checkpoint(family, dtype)
    job = prepare(
        str(model),
        out / "out",
        Recipe.make("rtn+distil", scheme, set=settings),
        calibration=[out / "ids.npy"],
        samples=2,
        sequence_length=None,
        device="cpu",
        dtype=dtype,
    )
    workdir = Workdir(out / "out")
    count = len(job.skeleton.blocks)
    with torch.no_grad(), workdir.opened("1"):
        streams = job.start_streams()
        shards = [outer_tensors(job.skeleton, job.plan)]
        for index in range(count):
            block = step(job, index, streams)
            shards.append(block_tensors(job.skeleton, index, job.plan, block))
        for number, tensors in enumerate(shards):
            workdir.write_tensors(f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors", tensors)
        assert streams.original is not None
        assert job.stream_tokens is not None
        options = job.plan.recipe.distillation
        assert options is not None
        student = Student(job, workdir.path, job.stream_tokens, streams.original, options)
    return job, student, streams.original


def whole(job: Job, student: Student, original: Tensor) -> Tensor:
    """The loss by one graph through the whole model, weights by the plain formula."""
    skeleton, dtype = job.skeleton, job.dtype
    outer = skeleton.load_outer(dtype)
    hidden = skeleton.embed(outer, TOKENS[WINDOWS])
    for index, trained in enumerate(student.blocks):
        block = student.learned_block(index)
        weights = {
            name: trained[name].value() if name in trained else value
            for name, value in block.plain.items()
        }
        for name, tensor in block.tensors.items():
            codes = to_groups(tensor.codes, tensor.scheme)
            units = codes.to(dtype)
            if moved := student.codes[index].get(name):
                position = moved.value().to(dtype).reshape(codes.shape)
                units = units + position - position.detach()  # straight through
            if tensor.zero is not None:
                units = units - tensor.zero.to(dtype).reshape(*codes.shape[:-1], 1)
            scale = trained[f"{name}.weight"].value().reshape(*codes.shape[:-1], 1)
            weights[f"{name}.weight"] = (units * scale).reshape(tensor.shape)
        inputs = {
            name: lambda x, scheme=quantizer.scheme: fake_quantize_trainable(x, scheme)
            for name, quantizer in block.inputs.items()
        }
        family = skeleton.family
        with quantizing(
            skeleton.blocks[index], inputs, family.attention, block.heads, fake_quantize_trainable
        ):
            hidden = skeleton.run(index, weights, hidden)
    learned = outer | {name: one.value() for name, one in student.outer.items()}
    log_q = skeleton.head(learned, hidden).log_softmax(-1)
    log_p = skeleton.head(outer, original[WINDOWS]).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("family", ["llama-biased", "qwen3", "opt", "gemma3"])
@pytest.mark.parametrize("scheme", ["w3a16g16", "w4a4q4kv4"])
@pytest.mark.parametrize("graphs", [0, 2**30])
def test_gradients_are_those_of_the_whole_model(
    family: str,
    scheme: str,
    graphs: int,
    checkpoint: Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitfold.pipeline.backward._GRAPHS", graphs)
    job, student, original = student_of(
        checkpoint, family, scheme, tmp_path, torch.float64, "distil.codes=true"
    )
    loss = student.gradient(WINDOWS, False)
    mine = [one.theta.grad for one in student.trained]
    for one in student.trained:
        one.theta.grad = None
    expected = whole(job, student, original)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for found, one in zip(mine, student.trained, strict=True):
        assert found is not None
        assert one.theta.grad is not None
        error = (found - one.theta.grad).norm() / one.theta.grad.norm().clamp(min=1e-12)
        assert error < 1e-5  # transformers' norms compute in float32


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize(
    ("scheme", "setting"),
    [
        ("w3a16g32", "weight.symmetric=false"),
        ("w4a4q4kv4", "activation.static=false"),
        ("w8a8", "activation.static=true"),
    ],
)
def test_the_loss_is_what_loaders_compute(
    family: str, scheme: str, setting: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    job, student, original = student_of(
        checkpoint, family, scheme, tmp_path, torch.bfloat16, setting
    )
    with torch.no_grad():
        for one in student.trained:
            one.theta.fill_(0.03)
        outer = job.skeleton.load_outer(job.dtype)
        mine = outer | {n: one.stored().to(job.dtype) for n, one in student.outer.items()}
        hidden = job.skeleton.embed(outer, TOKENS)
        for index in range(len(student.blocks)):
            block = student.learned_block(index)
            hidden = run_quantized(job.skeleton, index, block, job.dtype)(hidden)
        log_q = job.skeleton.head(mine, hidden).float().log_softmax(-1)
        log_p = job.skeleton.head(outer, original).float().log_softmax(-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert student.loss(torch.arange(2)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        ("activation.static=true",),
        ("activation.clusters=8",),
        ("activation.clusters=8", "activation.static=true"),
    ],
)
def test_gradients_pass_ranges_of_calibration(
    checkpoint: Zoo, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    _, student, _ = student_of(checkpoint, "llama", "w4a8", tmp_path, torch.float32, *settings)
    student.gradient(WINDOWS, False)
    first = next(iter(student.blocks[0].values()))
    assert first.theta.grad is not None
    assert float(first.theta.grad.abs().max()) > 0
