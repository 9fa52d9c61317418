"""A graph of `torch.export` held against the simulation: its bytes against their sums, its logits against those
recorded."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from bitfold.engines.exported import ExportVerification, verify_export
from bitfold.engines.recorded import probe_of, rounding_tolerance
from bitfold.engines.sums import check_files, check_tensors, read_sums
from bitfold.engines.torch_program import TorchProgram
from bitfold.export.torch_file import PROGRAM_FILE

__all__ = ["verify_torch"]


def verify_torch(
    directory: Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window_count: int = 16,
    progress: Callable[[str], None] = lambda what: None,
) -> ExportVerification:
    """Load a directory by torch.export, and compare it with the simulation recorded when the artifact was made.

    against, text: an artifact and a text on which both are compared too, on so many windows of at most 512 tokens.
    Raises VerificationError naming the tensor or file that was changed, or the difference; CheckpointError for what
    cannot be read.
    """
    progress("checking tensors")
    content = read_sums(directory, "torch")
    check_files(directory, content)
    check_tensors(directory / PROGRAM_FILE, content["tensors"])
    probe = probe_of(directory)
    return verify_export(
        directory,
        "torch.export",
        len(content["tensors"]),
        probe,
        rounding_tolerance(content, probe),
        lambda length: nullcontext(TorchProgram(directory)),
        (against, text),
        window_count,
        progress,
    )
