"""An ONNX directory held against the simulation: its bytes against their sums, ONNX Runtime's logits against those
recorded."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfold.engines.exported import ExportVerification, verify_export
from bitfold.engines.onnx_runtime import OnnxRuntime
from bitfold.errors import CheckpointError, VerificationError
from bitfold.export.artifact import tensor_sum
from bitfold.export.onnx_graph import DATA_FILE
from bitfold.export.sums import SUMS_FILE
from bitfold.models.checkpoint import sha256_of
from bitfold.models.headers import read_json
from bitfold.pipeline.probe import PROBE_FILE, Probe

__all__ = ["verify_onnx"]

# Of the logits' standard deviation, root mean square; a wrong zero-point or order gives 0.5. Both compute in float32:
# 1e-6 here.
_EXACT = 1e-4
# compressed-tensors unpacks weights in the scales' dtype, and so does the simulation; ONNX Runtime unpacks them in
# float32. bfloat16 made 0.0015 of it here.
_UNPACKED = 0.01
# Where inputs are rounded, a difference of 1e-7 now and then gives another integer, in PyTorch as here: 0.015 at 8 bits
# and 0.1 at 4, of six layers.
_ROUNDED, _ROUNDED_FEW = 0.05, 0.25
# The simulation ran in half precision, or the graph does: 0.05 with inputs of 8 bits, in PyTorch as here.
_HALF = 0.1


def verify_onnx(
    directory: Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window_count: int = 16,
    progress: Callable[[str], None] = lambda what: None,
) -> ExportVerification:
    """Load a directory in ONNX Runtime, and compare it with the simulation recorded when the artifact was made.

    against, text: an artifact and a text on which both are compared too, on so many windows of at most 512 tokens.
    Raises VerificationError naming the tensor or file that was changed, or the difference; CheckpointError for what
    cannot be read; MissingExtraError without ONNX Runtime.
    """
    progress("checking tensors")
    content = _read(directory)
    _check(directory, content)
    there = (directory / PROBE_FILE).is_file()
    probe = Probe.load(directory / PROBE_FILE) if there else None
    return verify_export(
        directory,
        "ONNX Runtime",
        len(content["tensors"]),
        probe,
        _EXACT if probe is None else _tolerance(content, probe),
        lambda length: nullcontext(OnnxRuntime(directory)),
        (against, text),
        window_count,
        progress,
    )


def _read(directory: Path) -> dict[str, Any]:
    """What export.json says."""
    file = directory / SUMS_FILE
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory, which an ONNX export is: name one.")
    if not file.is_file():
        raise VerificationError(
            f"{directory} was not written by bitfold (it has no {SUMS_FILE}): there is nothing to verify it against."
        )
    content = read_json(file)
    try:
        whole = content["format"] == "onnx" and all(
            {"offset", "length", "sum"} <= entry.keys() for entry in content["tensors"].values()
        )
        whole = whole and isinstance(content["files"], dict)
    except (KeyError, AttributeError):
        whole = False
    if not whole:
        raise VerificationError(f"{file} is damaged, or of another format: export it again.")
    return content


def _check(directory: Path, content: Mapping[str, Any]) -> None:
    """Raises VerificationError for the first weight, or file, that is not what was written."""
    for name, wanted in content["files"].items():
        file = directory / name
        if not file.is_file():
            raise VerificationError(f"{name} is missing from {directory}: export it again.")
        if sha256_of(file) != wanted:
            raise VerificationError(
                f"{file} is not what was written: the file was changed or damaged; export it again."
            )
    data = directory / DATA_FILE
    if not data.is_file():
        raise VerificationError(f"{DATA_FILE} is missing from {directory}: export it again.")
    ends = [entry["offset"] + entry["length"] for entry in content["tensors"].values()]
    if data.stat().st_size != max(ends, default=0):
        raise VerificationError(
            f"{data} has {data.stat().st_size} bytes of {max(ends, default=0)}: it was cut off or changed; export it "
            "again."
        )
    with data.open("rb") as stream:
        for name, entry in content["tensors"].items():
            stream.seek(entry["offset"])
            raw = np.frombuffer(bytearray(stream.read(entry["length"])), dtype=np.uint8)
            if tensor_sum(torch.from_numpy(raw)) != entry["sum"]:
                raise VerificationError(
                    f"{name} in {data} is not what was written: the file was changed or damaged; export it again."
                )


def _tolerance(content: Mapping[str, Any], probe: Probe) -> float:
    """How far rounding may take the logits."""
    bits = content.get("input_bits")
    if bits is not None and bits < 8:
        return _ROUNDED_FEW
    if probe.dtype not in ("float32", "float64") or content.get("form") == "tensorrt":
        return _HALF
    if bits is not None:
        return _ROUNDED
    return _UNPACKED if content.get("simulation_unpacks_in_half") else _EXACT
