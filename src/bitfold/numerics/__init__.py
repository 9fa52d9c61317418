"""Grids, schemes, quantize/dequantize, bit packing: pure functions on tensors."""

from bitfold.numerics.blocks import blocks_product, linear_blocks
from bitfold.numerics.clusters import channel_clusters, over_clusters
from bitfold.numerics.codebook import CodebookShape, entries_of, quantize_values
from bitfold.numerics.fp4 import global_scale, scale_dtype_of
from bitfold.numerics.hadamard import hadamard_matrix, hadamard_size
from bitfold.numerics.maps import MapShape, aligned, apply_map, for_queries, turn_heads
from bitfold.numerics.packing import pack, packed_width, unpack
from bitfold.numerics.quantize import (
    dequantize,
    dynamic_scale_and_zero,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_static,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.scheme import Scheme, TensorScheme
from bitfold.numerics.tensor import QuantizedTensor, sharing_global_scale

__all__ = [
    "CodebookShape",
    "MapShape",
    "QuantizedTensor",
    "Scheme",
    "TensorScheme",
    "aligned",
    "apply_map",
    "blocks_product",
    "channel_clusters",
    "dequantize",
    "dynamic_scale_and_zero",
    "entries_of",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_static",
    "for_queries",
    "from_groups",
    "global_scale",
    "hadamard_matrix",
    "hadamard_size",
    "linear_blocks",
    "over_clusters",
    "pack",
    "packed_width",
    "quantize",
    "quantize_values",
    "scale_and_zero",
    "scale_dtype_of",
    "sharing_global_scale",
    "to_groups",
    "turn_heads",
    "unpack",
]
