"""An artifact in the format of another engine: `bitfold.export_to`."""

from collections.abc import Callable
from pathlib import Path

from bitfold.errors import ExportError, OutputError, did_you_mean
from bitfold.export.exported import Exported
from bitfold.export.gguf_file import export_gguf
from bitfold.export.packed_directory import export_awq, export_gptq
from bitfold.export.reading import StoredModel, read_model

__all__ = ["TARGETS", "export_to"]

Progress = Callable[[int, int, str], None]
Exporter = Callable[[StoredModel, Path, Progress], Exported]

# Of each format: what writes it, and whether it is a directory.
TARGETS: dict[str, tuple[Exporter, bool]] = {
    "gguf": (export_gguf, False),
    "gptq": (export_gptq, True),
    "awq": (export_awq, True),
}


def export_to(
    artifact: str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write an artifact, or a checkpoint that is not quantized, in the format of another engine.

    to: `gguf`, one file for llama.cpp; `gptq` and `awq`, directories for the engines that read those. out: the exact
    path. progress: (tensors done, of how many, which).

    >>> bitfold.export_to("llama-w4", "gguf", "llama-w4.gguf")  # doctest: +SKIP

    Raises ExportError for what the engine would run differently, CheckpointError for an artifact that cannot be read,
    OutputError where it cannot be written, MissingExtraError without the format's package.
    """
    if to not in TARGETS:
        raise ExportError(f"There is no format '{to}' to export to: {did_you_mean(to, TARGETS)}")
    write, a_directory = TARGETS[to]
    out = Path(out).expanduser().absolute()
    if out.exists() and out.is_dir() != a_directory:
        kinds = ("a file", "a directory")
        raise OutputError(
            f"{out} is {kinds[out.is_dir()]}, and {to} is {kinds[a_directory]}: choose another -o."
        )
    if out.exists() and not overwrite:
        raise OutputError(
            f"{out} is there already: add --overwrite to replace it, or choose another -o."
        )
    if not out.parent.is_dir():
        raise OutputError(f"There is no directory {out.parent}: make it, or choose another -o.")
    model = read_model(Path(artifact).expanduser())
    return write(model, out, progress or (lambda done, total, what: None))
