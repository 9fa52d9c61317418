"""`bitfold quantize --to gguf,onnx`: the exports that follow a quantization, and where they go."""

from collections.abc import Mapping
from pathlib import Path

from bitfold.errors import ExportError, did_you_mean
from bitfold.export.exported import Exported, check_place
from bitfold.export.exporting import TARGETS, export_to
from bitfold.report.earlier_exports import earlier_export
from bitfold.report.progress import showing_progress

__all__ = ["export_all", "places"]


def places(to: str | None, out: Path, overwrite: bool) -> dict[str, Path]:
    """Where each format goes: a file OUT.gguf, a directory OUT-onnx. What a killed run had exported may be there.

    Raises ExportError for a format that there is not, OutputError where something else is there.
    """
    found = {}
    for name in to.split(",") if to else ():
        if name not in TARGETS:
            raise ExportError(
                f"There is no format '{name}' to export to: {did_you_mean(name, TARGETS)}"
            )
        directory = TARGETS[name].directory
        found[name] = out.with_name(f"{out.name}-{name}" if directory else f"{out.name}.{name}")
        if overwrite or earlier_export(out, name, found[name]) is None:
            check_place(found[name], name, directory=directory, overwrite=overwrite)
    return found


def export_all(artifact: Path, exports: Mapping[str, Path], overwrite: bool) -> list[Exported]:
    """The artifact in each format, but for those that it is there in already unless they are to be overwritten."""
    with showing_progress("exporting") as progress:
        return [
            (None if overwrite else earlier_export(artifact, name, path))
            or export_to(artifact, name, path, overwrite=overwrite, progress=progress)
            for name, path in exports.items()
        ]
