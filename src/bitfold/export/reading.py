"""A quantized checkpoint as it lies on disk, one layer at a time: what every exporter reads."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold.errors import CheckpointError, ExportError
from bitfold.export import bitsandbytes, compressed_tensors, native
from bitfold.export.compressed_tensors_reading import quantizes_heads, read_config
from bitfold.export.gptq import read_packed
from bitfold.export.layout import WeightFormat
from bitfold.models.checkpoint import Checkpoint
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme
from bitfold.numerics.nested_scale import NestedScale

__all__ = ["StoredModel", "read_model"]

# Behind a layer's name: what belongs to its quantized weight, or to how its input is quantized.
_PARTS = (
    *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_codebook", "weight_kept", "weight_columns", "weight_shift"),
    *("input_scale", "input_zero_point", "input_global_scale", "input_share", "input_clusters"),
    *("qweight", "qzeros", "scales", "g_idx"),
    *bitsandbytes.PARTS,
)
Decode = Callable[[str, Mapping[str, Tensor], TensorScheme], QuantizedTensor]


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint, and how its layers are quantized.

    schemes: of each quantized linear layer, by full name. runs: names at which maps run that nothing absorbs.
    quantizes_heads: whether queries, keys or values are quantized. decode: a weight from its tensors, by the layer's
    name. loose: of layers whose weights are quantized in a way that bitfold has no scheme for, what makes their values
    of the layer's tensors. Weights are read when they are asked for.
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, Scheme]
    runs: tuple[str, ...]
    quantizes_heads: bool
    decode: Decode
    loose: Mapping[str, bitsandbytes.Loose] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    def refuse_running(self, where: str) -> None:
        """Raises ExportError where maps run that an engine would not run."""
        if self.runs:
            raise ExportError(
                f"{self.checkpoint.path} has maps that run at inference ({self.runs[0]}), and there are none in "
                f"{where}: quantize by a method that folds all of them (`bitfold recipes` says which)."
            )

    @property
    def names(self) -> Iterator[str]:
        """The parameters that the model was made of, quantized or not, in the files' order."""
        seen: set[str] = set()
        for name in self.checkpoint.tensors:
            layer, part = _split(name)
            few = layer in self.schemes or layer in self.loose
            whole = f"{layer}.weight" if few and part in _PARTS else name
            if whole in seen or (not few and part in _PARTS):
                continue
            seen.add(whole)
            yield whole

    def file_of(self, name: str) -> str:
        """The file that a parameter lies in."""
        layer = name.removesuffix(".weight")
        stored = (name, *(f"{layer}.{part}" for part in _PARTS))
        return next(
            self.checkpoint.tensors[one].file for one in stored if one in self.checkpoint.tensors
        )

    def read(self, name: str) -> QuantizedTensor | Tensor:
        """The parameter of a full name: a weight [out, in] in few bits, or a tensor in the dtype it is stored in.

        Raises CheckpointError for a name that is not there, and for values that are not finite.
        """
        layer, _, part = name.rpartition(".")
        scheme = self.schemes.get(layer) if part == "weight" else None
        loose = self.loose.get(layer) if part == "weight" else None
        if loose is None and (scheme is None or scheme.weight is None):
            if name not in self.checkpoint.tensors:
                raise CheckpointError(
                    f"{self.checkpoint.path} has no tensor {name}: the checkpoint is incomplete; copy or make it again."
                )
            return self.checkpoint.read([name])[name]
        mine = [f"{layer}.weight", *(f"{layer}.{part}" for part in _PARTS)]
        tensors = self.checkpoint.read([one for one in mine if one in self.checkpoint.tensors])
        try:
            if loose is not None:
                return loose(layer, tensors)
            assert scheme is not None
            assert scheme.weight is not None
            return self.decode(layer, tensors, scheme.weight)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.checkpoint.path} does not hold the weight of {layer} as its config.json says "
                f"({' '.join(str(error).split())}): copy or make it again."
            ) from error

    def read_nested(self, layer: str) -> NestedScale | None:
        """The scales of a layer's weight where they are stored in few bits themselves: some of bitsandbytes' are."""
        names = [f"{layer}.{part}" for part in bitsandbytes.PARTS]
        there = [name for name in names if name in self.checkpoint.tensors]
        if f"{layer}.weight.nested_absmax" not in there or layer not in self.schemes:
            return None
        return bitsandbytes.nested(layer, self.checkpoint.read(there))

    def calibrated(self, layer: str) -> dict[str, Tensor]:
        """What was found on calibration text for the input of a linear layer, by its name behind the layer's."""
        found = {part: f"{layer}.{part}" for part in _PARTS if part.startswith("input_")}
        there = {part: name for part, name in found.items() if name in self.checkpoint.tensors}
        tensors = self.checkpoint.read(there.values())
        return {part: tensors[name] for part, name in there.items()}


def read_model(path: Path) -> StoredModel:
    """A checkpoint directory: quantized by bitfold, or in the format of compressed-tensors, GPTQ, AWQ or bitsandbytes,
    or not quantized.

    Raises CheckpointError where it is damaged, or quantized in a way that bitfold cannot read.
    """
    checkpoint = Checkpoint(path)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return StoredModel(checkpoint, {}, (), False, _nothing)
    method = settings.get("quant_method")
    if method == native.NAME:
        schemes, attention = native.read_config(settings)
        runs = tuple(native.read_online(settings))
        return StoredModel(checkpoint, schemes, runs, bool(attention), _native)
    if method == compressed_tensors.NAME:
        return _compressed(checkpoint, settings)
    if method in ("gptq", "awq"):
        scheme, decode = read_packed(settings, path)
        layers = [n.removesuffix(".qweight") for n in checkpoint.tensors if n.endswith(".qweight")]
        return StoredModel(
            checkpoint, dict.fromkeys(layers, Scheme(weight=scheme)), (), False, decode
        )
    if method == bitsandbytes.NAME:
        few, loose = bitsandbytes.read_layers(checkpoint)
        schemes = {layer: Scheme(weight=weight) for layer, weight in few.items()}
        return StoredModel(checkpoint, schemes, (), False, bitsandbytes.decode, loose)
    raise CheckpointError(
        f"{path} is quantized as '{method}', which bitfold does not read: it reads its own artifacts, "
        "compressed-tensors, gptq, awq and bitsandbytes."
    )


def _compressed(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> StoredModel:
    if settings.get("transform_config"):
        raise CheckpointError(
            f"{checkpoint.path} has transforms that run (transform_config), which bitfold does not read: their maps "
            "would be lost."
        )
    widths = _widths(checkpoint)
    read = read_config(settings, widths)
    formats = {name: format for name, (_, format) in read.items()}

    def decode(layer: str, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> QuantizedTensor:
        return compressed_tensors.from_tensors(layer, tensors, scheme, formats[layer])

    return StoredModel(
        checkpoint,
        {name: scheme for name, (scheme, _) in read.items()},
        (),
        quantizes_heads(settings, _matrices(checkpoint)),
        decode,
    )


def _native(layer: str, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> QuantizedTensor:
    return native.from_tensors(layer, tensors, scheme, WeightFormat(native.NAME, ""))


def _nothing(layer: str, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> QuantizedTensor:
    raise AssertionError(f"{layer} is not quantized")


def _split(name: str) -> tuple[str, str]:
    """A layer, and which of its tensors: those of bitsandbytes have names of their own behind the weight's."""
    layer, dot, part = name.partition(".weight.")
    if dot:
        return layer, f"weight.{part}"
    layer, _, part = name.rpartition(".")
    return layer, part


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
