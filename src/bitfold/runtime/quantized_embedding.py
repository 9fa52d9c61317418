"""An embedding that keeps its rows packed, and unpacks those that are asked for."""

from typing import Self

import torch
from torch import Tensor, nn

from bitfold.numerics import QuantizedTensor, pack, unpack

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` with a scale for each row.

    weight: [rows, ⌈dim · bits / 32⌉] int32, packed codes. weight_scale: [rows, 1].
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.padding_idx = bits, padding_idx
        codes = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("weight", pack(codes, bits))
        self.register_buffer(
            "weight_scale", torch.ones(num_embeddings, 1, dtype=dtype, device=device)
        )

    @classmethod
    def of(cls, weight: QuantizedTensor, padding_idx: int | None = None) -> Self:
        """The layer of symmetric integers [rows, dim] with a scale for each row."""
        scheme = weight.scheme
        assert (scheme.grid, scheme.symmetric, scheme.granularity) == ("int", True, "channel")
        rows, columns = weight.shape
        layer = cls(
            rows,
            columns,
            scheme.bits,
            padding_idx=padding_idx,
            dtype=weight.scale.dtype,
            device=weight.codes.device,
        )
        packed = pack(weight.codes, scheme.bits)
        layer.load_state_dict({"weight": packed, "weight_scale": weight.scale})
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., dim], in the dtype of the scales."""
        words, scale = self.weight[ids.flatten()], self.weight_scale[ids.flatten()]
        values = unpack(words, self.bits, self.embedding_dim).to(scale.dtype) * scale
        return values.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int{self.bits}"
