"""A quantized checkpoint as it lies on disk, one layer at a time: what every exporter reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export import compressed_tensors, native
from bitfold.export.compressed_tensors_reading import quantizes_heads, read_config
from bitfold.export.layout import WeightFormat
from bitfold.models.checkpoint import Checkpoint
from bitfold.numerics import QuantizedTensor, Scheme

__all__ = ["StoredModel", "read_model"]

# Behind a layer's name: what belongs to its quantized weight, or to how its input is quantized.
_PARTS = (
    *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_codebook", "weight_kept", "weight_columns"),
    *("input_scale", "input_zero_point", "input_global_scale", "input_share", "input_clusters"),
)


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint, and how its layers are quantized.

    schemes: of each quantized linear layer, by full name. runs: names at which maps run that nothing absorbs.
    quantizes_heads: whether queries, keys or values are quantized. Weights are read when they are asked for.
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, Scheme]
    runs: tuple[str, ...]
    quantizes_heads: bool
    _formats: Mapping[str, WeightFormat]

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @property
    def names(self) -> Iterator[str]:
        """The parameters that the model was made of, quantized or not, in the files' order."""
        seen: set[str] = set()
        for name in self.checkpoint.tensors:
            layer, _, part = name.rpartition(".")
            whole = f"{layer}.weight" if layer in self.schemes and part in _PARTS else name
            if whole in seen or (layer not in self.schemes and part in _PARTS):
                continue
            seen.add(whole)
            yield whole

    def read(self, name: str) -> QuantizedTensor | Tensor:
        """The parameter of a full name: a weight [out, in] in few bits, or a tensor in the dtype it is stored in.

        Raises CheckpointError for a name that is not there, and for values that are not finite.
        """
        layer, _, part = name.rpartition(".")
        scheme = self.schemes.get(layer) if part == "weight" else None
        if scheme is None or scheme.weight is None:
            if name not in self.checkpoint.tensors:
                raise CheckpointError(
                    f"{self.checkpoint.path} has no tensor {name}: the checkpoint is incomplete; copy or make it again."
                )
            return self.checkpoint.read([name])[name]
        mine = [f"{layer}.weight", *(f"{layer}.{part}" for part in _PARTS)]
        tensors = self.checkpoint.read([one for one in mine if one in self.checkpoint.tensors])
        format = self._formats[layer]
        module = native if format.name == native.NAME else compressed_tensors
        try:
            return module.from_tensors(layer, tensors, scheme.weight, format)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.checkpoint.path} does not hold the weight of {layer} as its config.json says "
                f"({' '.join(str(error).split())}): copy or make it again."
            ) from error

    def calibrated(self, layer: str) -> dict[str, Tensor]:
        """What was found on calibration text for the input of a linear layer, by its name behind the layer's."""
        found = {part: f"{layer}.{part}" for part in _PARTS if part.startswith("input_")}
        there = {part: name for part, name in found.items() if name in self.checkpoint.tensors}
        tensors = self.checkpoint.read(there.values())
        return {part: tensors[name] for part, name in there.items()}


def read_model(path: Path) -> StoredModel:
    """A checkpoint directory, quantized by bitfold or in the compressed-tensors format, or not quantized.

    Raises CheckpointError where it is damaged, or quantized in a way that bitfold cannot read.
    """
    checkpoint = Checkpoint(path)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return StoredModel(checkpoint, {}, (), False, {})
    method = settings.get("quant_method")
    if method == native.NAME:
        schemes, attention = native.read_config(settings)
        formats = {name: WeightFormat(native.NAME, "") for name in schemes}
        return StoredModel(
            checkpoint, schemes, tuple(native.read_online(settings)), bool(attention), formats
        )
    if method != compressed_tensors.NAME:
        raise CheckpointError(
            f"{path} is quantized as '{method}', which bitfold does not read here: give an artifact of bitfold or a "
            "checkpoint in the compressed-tensors format."
        )
    if settings.get("transform_config"):
        raise CheckpointError(
            f"{path} has transforms that run (transform_config), which bitfold does not read: their maps would be lost."
        )
    widths = _widths(checkpoint)
    read = read_config(settings, widths)
    return StoredModel(
        checkpoint,
        {name: scheme for name, (scheme, _) in read.items()},
        (),
        quantizes_heads(settings, _matrices(checkpoint)),
        {name: format for name, (_, format) in read.items()},
    )


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """All that may be a linear layer."""
    names = (name.removesuffix("_packed").removesuffix(".weight") for name in checkpoint.tensors)
    return [name for name in names if name not in checkpoint.tensors]


def _widths(checkpoint: Checkpoint) -> dict[str, int]:
    """The inputs of each linear layer whose weight, or input, has something quantized about it."""
    ends = tuple(f".{part}" for part in ("weight_scale", "input_scale", "input_global_scale"))
    layers = dict.fromkeys(n.rpartition(".")[0] for n in checkpoint.tensors if n.endswith(ends))
    widths: dict[str, int] = {}
    for layer in layers:
        if (weight := checkpoint.tensors.get(f"{layer}.weight")) is not None:
            widths[layer] = weight.shape[-1]
        elif f"{layer}.weight_shape" in checkpoint.tensors:
            shape = checkpoint.read([f"{layer}.weight_shape"])[f"{layer}.weight_shape"]
            widths[layer] = int(shape[-1])
        elif (packed := checkpoint.tensors.get(f"{layer}.weight_packed")) is not None:
            widths[layer] = 2 * packed.shape[-1]  # fp4: two codes in a byte
    return widths
