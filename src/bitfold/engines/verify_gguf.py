"""A GGUF file held against the simulation: its bytes against their sums, llama.cpp's logits against those recorded."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bitfold.engines.exported import ExportVerification, verify_export
from bitfold.engines.llama_cpp import LlamaCpp
from bitfold.errors import CheckpointError, VerificationError
from bitfold.export.artifact import tensor_sum
from bitfold.export.gguf_model import gguf_package
from bitfold.pipeline.probe import Probe

__all__ = ["verify_gguf"]

# Of the logits' standard deviation, root mean square. llama.cpp rounds what a weight in few bits is multiplied with to
# 8 bits, in blocks of 32 or 256. On tiny-llama (with outliers in brackets) that was 0.003 (0.001) at w8a16, 0.008
# (0.023) at w4a16g128 and 0.022 (0.17) at w2a16, by rtn; rows of queries and keys in our order instead of llama.cpp's
# made it 0.39 to 0.58, zero-points that are one too high 1.5 to 2.6.
TOLERANCE = 0.25


def verify_gguf(
    file: Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    window_count: int = 16,
    progress: Callable[[str], None] = lambda what: None,
) -> ExportVerification:
    """Load a file in llama.cpp, and compare it with the simulation that was recorded when the artifact was made.

    against, text: an artifact and a text on which both are compared too, on so many windows of at most 512 tokens.
    Raises VerificationError naming the tensor that was changed, or the difference; CheckpointError for a file that
    cannot be read; MissingExtraError without llama.cpp.
    """
    progress("checking tensors")
    count, probe = _read(file)
    return verify_export(
        file,
        "llama.cpp",
        count,
        probe,
        TOLERANCE,
        lambda length: LlamaCpp(file, context=length),
        (against, text),
        window_count,
        progress,
    )


def _read(file: Path) -> tuple[int, Probe | None]:
    """How many tensors are what was written, and the probe, if there is one."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: reader.get_field(name) for name in ("bitfold.sums", "bitfold.verification")}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        read = {name: None if field is None else field.contents() for name, field in fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is no GGUF file, or damaged ({' '.join(str(error).split())}): export it again."
        ) from error
    if read["bitfold.sums"] is None:
        raise VerificationError(
            f"{file} was not written by bitfold: there is nothing to verify it against."
        )
    sums = dict(line.split(" ") for line in read["bitfold.sums"])
    if odd := sorted(set(sums).symmetric_difference(tensors)):
        was = "is missing from" if odd[0] in sums else "was added to"
        raise VerificationError(f"{odd[0]} {was} {file}: export it again.")
    for name, data in tensors.items():
        raw = torch.from_numpy(np.array(data).view(np.uint8))
        if tensor_sum(raw) != sums[name]:
            raise VerificationError(
                f"{name} in {file} is not what was written: the file was changed or damaged; export it again."
            )
    recorded = read["bitfold.verification"]
    return len(sums), None if recorded is None else Probe.load(io.BytesIO(bytes(recorded)))
