"""Exports that a killed `bitfold quantize --to` had finished: told by the logits that travel with them."""

from pathlib import Path
from typing import Any

from bitfold.engines.sums import check_files, format_of, read_sums
from bitfold.errors import BitfoldError
from bitfold.export.directory import bytes_of
from bitfold.export.exported import Exported
from bitfold.export.exporting import TARGETS
from bitfold.export.gguf_reading import open_gguf
from bitfold.export.sums import SUMS_FILE
from bitfold.models.checkpoint import Checkpoint
from bitfold.pipeline.probe import PROBE_FILE

__all__ = ["earlier_export"]

_NOTE = "it was there already, made of this artifact"


def earlier_export(artifact: Path, name: str, path: Path) -> Exported | None:
    """What stands at `path`, if it is the artifact in a format, whole; else None.

    Exports carry the logits that were recorded with the artifact (`verification.npz`), to the byte. Of files whose
    tensors have sums of their own the length is looked at, not the bytes: that is what `bitfold verify` is for.
    """
    try:
        recorded = (artifact / PROBE_FILE).read_bytes()
        if not path.exists() or path.is_dir() != TARGETS[name].directory:
            return None
        if path.is_dir():
            own = (path / PROBE_FILE).read_bytes() == recorded and _whole(path, name)
        else:
            own = bytes(open_gguf(path).settings["bitfold.verification"]) == recorded
        size = bytes_of(path) if path.is_dir() else path.stat().st_size
    except (OSError, BitfoldError, KeyError, TypeError, ValueError):
        return None
    return Exported(path, name, size, {}, (_NOTE,)) if own else None


def _whole(directory: Path, name: str) -> bool:
    """Whether an exported directory is of a format, in its usual form, and nothing is missing."""
    if not (directory / SUMS_FILE).is_file():  # gptq and awq, in safetensors
        settings: Any = Checkpoint(directory).config["quantization_config"]
        return bool(settings["quant_method"] == name)
    if format_of(directory) != name:
        return False
    content = read_sums(directory, name)
    check_files(directory, content)
    end = max(entry["offset"] + entry["length"] for entry in content["tensors"].values())
    others = {file.name for file in directory.iterdir()} - {*content["files"], SUMS_FILE}
    sizes = [(directory / other).stat().st_size for other in others]
    usual = next(iter(TARGETS[name].forms))
    return content.get("form", usual) == usual and sizes == [end]
