"""Grids, schemes, quantize/dequantize, bit packing: pure functions on tensors."""

from bitfold.numerics.blocks import blocks_product, linear_blocks
from bitfold.numerics.clusters import channel_clusters, over_clusters
from bitfold.numerics.codebook import CodebookShape, entries_of, quantize_values
from bitfold.numerics.fp4 import global_scale, scale_dtype_of
from bitfold.numerics.packing import pack, packed_width, unpack
from bitfold.numerics.quantize import (
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    from_groups,
    quantize,
    scale_and_zero,
    to_groups,
)
from bitfold.numerics.scheme import Scheme, TensorScheme
from bitfold.numerics.tensor import QuantizedTensor, sharing_global_scale

__all__ = [
    "CodebookShape",
    "QuantizedTensor",
    "Scheme",
    "TensorScheme",
    "blocks_product",
    "channel_clusters",
    "dequantize",
    "entries_of",
    "fake_quantize",
    "fake_quantize_dynamic",
    "from_groups",
    "global_scale",
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
    "unpack",
]
