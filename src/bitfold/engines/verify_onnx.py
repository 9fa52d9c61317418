"""An ONNX directory held against the simulation: its bytes against their sums, ONNX Runtime's logits against those
recorded."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from bitfold.engines.exported import ExportVerification, verify_export
from bitfold.engines.onnx_runtime import OnnxRuntime
from bitfold.engines.recorded import probe_of, rounding_tolerance
from bitfold.engines.sums import check_files, check_tensors, read_sums
from bitfold.export.onnx_graph import DATA_FILE

__all__ = ["verify_onnx"]


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
    content = read_sums(directory, "onnx")
    check_files(directory, content)
    check_tensors(directory / DATA_FILE, content["tensors"])
    probe = probe_of(directory)
    return verify_export(
        directory,
        "ONNX Runtime",
        len(content["tensors"]),
        probe,
        rounding_tolerance(content, probe),
        lambda length: nullcontext(OnnxRuntime(directory)),
        (against, text),
        window_count,
        progress,
    )
