"""A directory for ExecuTorch or LiteRT held against the simulation: its bytes against their sums, its logits against
those recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfold.engines.exported import ExportVerification, verify_export
from bitfold.engines.phone_engine import PHONE_FORMATS, check_phone_python, phone_engine
from bitfold.engines.recorded import probe_of
from bitfold.engines.sums import check_files, check_tensors, format_of, read_sums
from bitfold.errors import VerificationError

__all__ = ["verify_phone"]

# Of the logits' standard deviation, root mean square. Inputs rounded as in the simulation, where a difference of 1e-7
# now and then gives another integer; and inputs that were not rounded there, or without zero-points.
# docs/results/phones.md has what was measured; weights in another order give 0.5 and more.
_SAME, _OTHER = 0.05, 0.25


def verify_phone(
    directory: Path,
    *,
    python: str | Path | None = None,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window_count: int = 16,
    progress: Callable[[str], None] = lambda what: None,
) -> ExportVerification:
    """Load a directory in its engine, and compare it with the simulation recorded when the artifact was made.

    python: of the environment that has the engine; None: this one. against, text: an artifact and a text on which both
    are compared too, on so many windows of at most 512 tokens. Raises VerificationError naming the tensor or file that
    was changed, or the difference; CheckpointError for what cannot be read; EngineError without the engine.
    """
    format = format_of(directory)
    if format is None or format not in PHONE_FORMATS:
        raise VerificationError(
            f"{directory} is for another engine than ExecuTorch and LiteRT: leave --engine out."
        )
    its = PHONE_FORMATS[format]
    progress("checking tensors")
    content: dict[str, Any] = read_sums(directory, format)
    check_files(directory, content)
    check_tensors(directory / its.file, content["tensors"])
    interpreter = check_phone_python(format, python)
    return verify_export(
        directory,
        its.name,
        len(content["tensors"]),
        probe_of(directory),
        _SAME if content.get("same_inputs") else _OTHER,
        lambda length: phone_engine(directory, format, interpreter),
        (against, text),
        window_count,
        progress,
    )
