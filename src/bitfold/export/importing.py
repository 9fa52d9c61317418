"""A quantized checkpoint of others as one that bitfold runs: `bitfold.import_checkpoint`."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bitfold.errors import CheckpointError, OutputError
from bitfold.export import native
from bitfold.export.directory import appearing, bytes_of, write_directory
from bitfold.export.exported import Exported
from bitfold.export.layout import Choice, LayerEntry, Layout, WeightFormat
from bitfold.export.reading import StoredModel, read_model
from bitfold.numerics import QuantizedTensor, Scheme

__all__ = ["import_checkpoint"]

Progress = Callable[[int, int, str], None]
_FORMAT = WeightFormat(native.NAME, "")


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint in the format of GPTQ, AWQ or compressed-tensors in bitfold's own: the same integers, scales
    and zero-points, to be loaded after `import bitfold`, evaluated, and exported to other formats.

    out: a directory, which appears whole or not at all.

    >>> bitfold.import_checkpoint("llama-gptq", "llama-w4")  # doctest: +SKIP

    Raises CheckpointError for a checkpoint that cannot be read or is not quantized, OutputError where it cannot be
    written.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().absolute()
    if out.exists() and not (overwrite and out.is_dir()):
        raise OutputError(
            f"{out} is there already: add --overwrite to replace it, or choose another -o."
        )
    if not out.parent.is_dir():
        raise OutputError(f"There is no directory {out.parent}: make it, or choose another -o.")
    model = read_model(source)
    if not model.schemes:
        raise CheckpointError(
            f"{source} is not quantized: there is nothing to import; `bitfold quantize` takes it as it is."
        )
    if model.runs or model.quantizes_heads:
        raise CheckpointError(
            f"{source} quantizes more than weights and inputs: load it as it is, bitfold and transformers do."
        )
    config = model.config | native.extra_config(Layout({}), model.config)
    config["quantization_config"] = _settings(model)
    with appearing(out) as partial:
        types = write_directory(
            model, partial, _pack, config, progress or (lambda done, total, what: None)
        )
    return Exported(out, native.NAME, bytes_of(out), types, ())


def _settings(model: StoredModel) -> dict[str, object]:
    """The `quantization_config`: weights as they were found to be, which says more than the source's own."""
    linears = {}
    for layer, scheme in model.schemes.items():
        weight = model.read(f"{layer}.weight")
        found = weight.scheme if isinstance(weight, QuantizedTensor) else None
        made = Scheme(weight=found, activation=scheme.activation)
        linears[layer] = LayerEntry(made, weight.shape[1])
    return native.config(Layout(linears), Choice(dict.fromkeys(linears, _FORMAT)))


def _pack(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    return native.to_tensors(layer, weight, _FORMAT)
