"""Nothing is trusted: an artifact's files are held against what was simulated, block by block and as a whole."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bitfold.errors import CheckpointError, VerificationError
from bitfold.export.artifact import shard_name, tensor_sum
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.headers import read_json
from bitfold.pipeline.block import run_quantized
from bitfold.pipeline.job import Job
from bitfold.pipeline.outer import outer_weights
from bitfold.pipeline.probe import PROBE_FILE, Probe
from bitfold.pipeline.shards import block_from_tensors
from bitfold.pipeline.workdir import MARKER, finished_request
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.load import load

__all__ = ["Verification", "check_artifact", "verify", "verify_blocks"]

# Of the logits' standard deviation. The same numbers in the same dtype differ only by the order of summation.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
TOLERANCE_HALF = 0.1


@dataclass(frozen=True)
class Verification:
    """difference: largest absolute difference of the probe's logits, over their standard deviation."""

    out: str
    tensors: int
    positions: int
    max_difference: float
    difference: float
    tolerance: float
    dtype: str
    ok: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_blocks(job: Job, path: Path, logits: Tensor, progress: Callable[[int], None]) -> None:
    """Run the probe through the shards written at `path`, one in memory, and compare with the simulation's logits.

    Raises VerificationError where they differ.
    """
    skeleton, dtype = job.skeleton, job.dtype
    count = len(skeleton.blocks)
    device = str(skeleton.device)
    outer = outer_weights(
        job.plan, load_file(path / shard_name(0, count + 1), device=device), dtype
    )
    hidden = skeleton.embed(outer, job.probe.to(skeleton.device))
    for index in range(count):
        progress(index)
        tensors = load_file(path / shard_name(index + 1, count + 1), device=device)
        block = block_from_tensors(skeleton, index, job.plan, tensors)
        hidden = run_quantized(skeleton, index, block, dtype)(hidden)
    difference = _relative(skeleton.head(outer, hidden), logits)
    tolerance = TOLERANCE.get(str(dtype).removeprefix("torch."), TOLERANCE_HALF)
    if not difference <= tolerance:
        raise VerificationError(
            f"The written shards give logits that differ from the simulation by {difference:.2e} of their spread: "
            "nothing was published; this is a defect of bitfold or of the disk."
        )


def verify(
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Load an artifact the way a user does and compare it with the simulation recorded at quantization.

    Raises VerificationError naming the tensor that was changed, or the difference of the logits; CheckpointError when
    it cannot be loaded.
    """
    out = find_checkpoint(out)
    say = progress or (lambda what: None)
    say("checking tensors")
    count = _check_sums(out)
    probe = Probe.load(out / PROBE_FILE)
    say("loading")
    model = load(out, device=device, dtype=probe.dtype)
    say("comparing logits")
    with torch.no_grad():
        logits = model(input_ids=probe.tokens.to(model.device), use_cache=False).logits
    found = probe.pick(logits)
    difference = _relative(found, probe.logits)
    tolerance = TOLERANCE.get(probe.dtype, TOLERANCE_HALF)
    if not difference <= tolerance:
        raise VerificationError(
            f"{out} gives logits that differ from the simulation by {difference:.2e} of their spread "
            f"(at most {tolerance:g} is rounding): the artifact or the installed engine changed; quantize again, "
            "or install the versions in its provenance.json."
        )
    return Verification(
        out=str(out),
        tensors=count,
        positions=probe.logits.shape[0] * probe.logits.shape[1],
        max_difference=float((found - probe.logits).abs().max()),
        difference=difference,
        tolerance=tolerance,
        dtype=probe.dtype,
    )


def _check_sums(out: Path) -> int:
    """Hold every stored tensor against the sum recorded for it; returns how many there are."""
    sums = _read_sums(out)
    checkpoint = Checkpoint(out)
    if odd := sorted(set(sums).symmetric_difference(checkpoint.tensors)):
        was = "is missing from" if odd[0] in sums else "was added to"
        raise VerificationError(f"{odd[0]} {was} {out}: quantize again.")
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if tensor_sum(handle.get_tensor(name)) != sums[name]:
                    raise VerificationError(
                        f"{name} in {file} is not what was written: the file was changed or damaged; quantize again."
                    )
    return len(sums)


def check_artifact(out: Path) -> None:
    """Raise VerificationError for a directory that bitfold did not write."""
    if finished_request(out) is None:
        raise VerificationError(
            f"{out} is no artifact of bitfold (it has no readable {MARKER}): "
            "give a directory that `bitfold quantize` wrote."
        )


def _read_sums(out: Path) -> dict[str, str]:
    check_artifact(out)
    try:
        return read_json(out / "checksums.json")
    except CheckpointError as error:
        raise VerificationError(
            f"The checksums of {out} are missing or damaged: quantize again."
        ) from error


def _relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.to(found.device)
    return float((found - expected).abs().max() / expected.float().std())
