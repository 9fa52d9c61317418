"""What was recorded of the simulation beside a graph, and how far from it a graph that computes the same may be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfold.pipeline.probe import PROBE_FILE, Probe

__all__ = ["probe_of", "rounding_tolerance"]

# Of the logits' standard deviation, root mean square; a wrong zero-point or order gives 0.5. Both compute in float32:
# 1e-6 here.
_EXACT = 1e-4
# compressed-tensors unpacks weights in the scales' dtype, and so does the simulation; engines unpack them in
# float32. bfloat16 made 0.0015 of it here.
_UNPACKED = 0.01
# Where inputs are rounded, a difference of 1e-7 now and then gives another integer, in PyTorch as here: 0.015 at 8 bits
# and 0.1 at 4, of six layers.
_ROUNDED, _ROUNDED_FEW = 0.05, 0.25
# The simulation ran in half precision, or the graph does: 0.05 with inputs of 8 bits, in PyTorch as here.
_HALF = 0.1


def probe_of(directory: Path) -> Probe | None:
    """The probe beside a graph; None for a model that was no artifact."""
    file = directory / PROBE_FILE
    return Probe.load(file) if file.is_file() else None


def rounding_tolerance(content: Mapping[str, Any], probe: Probe | None) -> float:
    """How far rounding may take the logits. content: of export.json."""
    if probe is None:
        return _EXACT
    bits = content.get("input_bits")
    if bits is not None and bits < 8:
        return _ROUNDED_FEW
    if probe.dtype not in ("float32", "float64") or content.get("form") == "tensorrt":
        return _HALF
    if bits is not None:
        return _ROUNDED
    return _UNPACKED if content.get("simulation_unpacks_in_half") else _EXACT
