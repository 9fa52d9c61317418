"""A quantized checkpoint of others, or a GGUF file, as one that bitfold runs: `bitfold.import_checkpoint`."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export import bitsandbytes, native
from bitfold.export.directory import appearing, bytes_of, write_directory
from bitfold.export.exported import Exported, Progress, check_place
from bitfold.export.gguf_importing import import_gguf
from bitfold.export.layout import Choice, LayerEntry, Layout, WeightFormat
from bitfold.export.reading import StoredModel, read_model
from bitfold.numerics import QuantizedTensor

__all__ = ["import_checkpoint"]

_FORMAT = WeightFormat(native.NAME, "")


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint in the format of GPTQ, AWQ, compressed-tensors or bitsandbytes in bitfold's own: the same
    integers, scales and zero-points, to be loaded after `import bitfold`, evaluated, and exported to other formats.

    source: its directory, or a GGUF file, which brings its own config and tokenizer (`gguf_importing`).
    out: a directory, which appears whole or not at all.

    >>> bitfold.import_checkpoint("llama-gptq", "llama-w4")  # doctest: +SKIP

    Raises CheckpointError for a checkpoint that cannot be read or is not quantized, OutputError where it cannot be
    written.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().absolute()
    check_place(out, "an imported checkpoint", directory=True, overwrite=overwrite)
    progress = progress or (lambda done, total, what: None)
    if source.is_file():
        return import_gguf(source, out, progress)
    model = read_model(source)
    if not model.schemes and not model.loose:
        raise CheckpointError(
            f"{source} is not quantized: there is nothing to import; `bitfold quantize` takes it as it is."
        )
    if model.runs or model.quantizes_heads:
        raise CheckpointError(
            f"{source} quantizes more than weights and inputs: load it as it is, bitfold and transformers do."
        )
    if bare := [name for name, scheme in model.schemes.items() if scheme.weight is None]:
        raise CheckpointError(
            f"{source} quantizes the input of {bare[0]} and not its weight: load it as it is, transformers does."
        )

    def pack(layer: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        beside = {f"{layer}.{part}": value for part, value in model.calibrated(layer).items()}
        return native.to_tensors(layer, weight, _FORMAT) | beside

    # Their inputs' widths are not said in this format.
    linears = {name: LayerEntry(scheme, 0) for name, scheme in model.schemes.items()}
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if linears:
        config |= native.extra_config(Layout({}), model.config)
        choice = Choice(dict.fromkeys(linears, _FORMAT))
        config["quantization_config"] = native.config(Layout(linears), choice)
    with appearing(out) as partial:
        types = write_directory(model, partial, pack, config, progress)
    return Exported(out, native.NAME, bytes_of(out), types, tuple(_notes(model)))


def _notes(model: StoredModel) -> Iterator[str]:
    """What did not come along as it was."""
    if model.loose:
        first, *others = model.loose
        more = f", and {len(others)} others" if others else ""
        yield f"{first}{more}: bitfold has no grid with their levels, their values are stored in floating point"
    settings = model.config.get("quantization_config", {})
    if settings.get("quant_method") == bitsandbytes.NAME and settings.get("load_in_8bit"):
        yield (
            "weights alone are imported: bitsandbytes rounds inputs to 8 bits, too, but for channels of large values, "
            "and bitfold leaves them as they are"
        )
