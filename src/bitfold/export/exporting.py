"""An artifact in the format of another engine: `bitfold.export_to`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bitfold.errors import ExportError, did_you_mean
from bitfold.export.executorch_file import export_executorch
from bitfold.export.exported import Exported, Progress, check_place
from bitfold.export.gguf_file import export_gguf
from bitfold.export.litert_file import export_litert
from bitfold.export.onnx_file import export_onnx
from bitfold.export.openvino_file import export_openvino
from bitfold.export.packed_directory import export_awq, export_gptq
from bitfold.export.reading import StoredModel, read_model
from bitfold.export.torch_file import export_torch

__all__ = ["TARGETS", "Target", "export_to"]

Exporter = Callable[[StoredModel, Path, Progress], Exported]


@dataclass(frozen=True)
class Target:
    """forms: what writes each form of the format, by its name; the first is usual. directory: whether it is one, or a
    file."""

    forms: Mapping[str, Exporter]
    directory: bool = False


# Tokens that a cache of a fixed size has room for.
_CONTEXTS = (1024, 256, 512, 2048, 4096, 8192)

TARGETS: dict[str, Target] = {
    "gguf": Target({"gguf": export_gguf}),
    "gptq": Target({"gptq": export_gptq}, directory=True),
    "awq": Target({"awq": export_awq}, directory=True),
    "onnx": Target(
        {form: partial(export_onnx, form=form) for form in ("fast", "compact", "tensorrt")},
        directory=True,
    ),
    "openvino": Target({"openvino": export_openvino}, directory=True),
    "torch": Target({"torch": export_torch}, directory=True),
    "executorch": Target(
        {str(n): partial(export_executorch, context=n) for n in _CONTEXTS}, directory=True
    ),
    "litert": Target(
        {str(n): partial(export_litert, context=n) for n in _CONTEXTS}, directory=True
    ),
}


def export_to(
    artifact: str | Path,
    to: str,
    out: str | Path,
    *,
    form: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write an artifact, or a checkpoint that is not quantized, in the format of another engine.

    to: `gguf`, one file for llama.cpp; `gptq` and `awq`, directories for the engines that read those; `onnx`, a
    directory for ONNX Runtime; `openvino`, one for OpenVINO; `torch`, one with a
    graph of torch.export; `executorch` and `litert`, those for phones. out: the exact path.
    form: of onnx `fast` (the usual one: all integers in 4 bits, or in two times 4), `compact` (in 2, 4 or 8) or
    `tensorrt` (explicit QuantizeLinear and DequantizeLinear of 8 bits, the rest in half precision); of executorch and
    litert how many tokens the cache has room for (1024).
    progress: (steps done, of how many, which).

    >>> bitfold.export_to("llama-w4", "gguf", "llama-w4.gguf")  # doctest: +SKIP

    Raises ExportError for what the engine would run differently, CheckpointError for an artifact that cannot be read,
    OutputError where it cannot be written, MissingExtraError without the format's package.
    """
    if to not in TARGETS:
        raise ExportError(f"There is no format '{to}' to export to: {did_you_mean(to, TARGETS)}")
    target = TARGETS[to]
    form = next(iter(target.forms)) if form is None else form
    if form not in target.forms:
        raise ExportError(f"{to} has no form '{form}': {did_you_mean(form, target.forms)}")
    out = Path(out).expanduser().absolute()
    check_place(out, to, directory=target.directory, overwrite=overwrite)
    model = read_model(Path(artifact).expanduser())
    return target.forms[form](model, out, progress or (lambda done, total, what: None))
