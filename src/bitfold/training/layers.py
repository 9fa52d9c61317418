"""Layers in training: their weights and inputs go through estimators, everything else is as it was."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.training.estimators import InputEstimator, SignInput, WeightEstimator

__all__ = ["Prepared", "PreparedConv2d", "PreparedEmbedding", "PreparedLinear"]


class Prepared(nn.Module):
    """A layer whose `weight` and `bias` are the parameters of the layer it stands for, so that state dicts, optimizers
    and tied weights go on as before. weights, inputs: the estimators, or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        layer: nn.Module,
        weights: WeightEstimator | None,
        inputs: InputEstimator | None,
    ) -> None:
        super().__init__()
        self.weight = layer.get_parameter("weight")
        bias = getattr(layer, "bias", None)
        self.register_parameter("bias", bias)
        self.weights, self.inputs = weights, inputs

    def matrix(self) -> Tensor:
        """The weight as estimators see it, [out, in]."""
        return self.weight.flatten(1)

    def rounded_weight(self) -> Tensor:
        """The weight in its own shape, on its grid."""
        if self.weights is None:
            return self.weight
        matrix = self.matrix()
        if self.training:
            with torch.no_grad():
                self.weights.bound(self.weight.data)
        rounded: Tensor = self.weights(matrix)
        return rounded.view_as(self.weight)


class PreparedLinear(Prepared):
    """A `nn.Linear` in training."""

    def __init__(
        self, layer: nn.Linear, weights: WeightEstimator | None, inputs: InputEstimator | None
    ) -> None:
        super().__init__(layer, weights, inputs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        scale = None
        if isinstance(self.inputs, SignInput) and self.inputs.scaled:
            scale = x.abs().mean(dim=-1, keepdim=True)
        if self.inputs is not None:
            x = self.inputs(x)
        if scale is None:
            return F.linear(x, self.rounded_weight(), self.bias)
        found = F.linear(x, self.rounded_weight()) * scale
        return found if self.bias is None else found + self.bias


class PreparedConv2d(Prepared):
    """A `nn.Conv2d` in training. Inputs are rounded before they are padded: 0 is a value of every grid but that of
    signs, where what is padded multiplies nothing."""

    def __init__(
        self, layer: nn.Conv2d, weights: WeightEstimator | None, inputs: InputEstimator | None
    ) -> None:
        super().__init__(layer, weights, inputs)
        height, width = layer.kernel_size
        self.kernel_size = (height, width)
        self.stride = (layer.stride[0], layer.stride[1])
        self.dilation = (layer.dilation[0], layer.dilation[1])
        self.groups, self.padding_mode = layer.groups, layer.padding_mode
        # Left, right, top, bottom: as F.pad takes them.
        self.padding = tuple(layer._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same of the output."""
        rounded = self._padded(x if self.inputs is None else self.inputs(x))
        scaled = isinstance(self.inputs, SignInput) and self.inputs.scaled
        bias = None if scaled else self.bias
        found = F.conv2d(
            rounded, self.rounded_weight(), bias, self.stride, 0, self.dilation, self.groups
        )
        if not scaled:
            return found
        found = found * self._sizes(x)
        return found if self.bias is None else found + self.bias[:, None, None]

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.padding, mode) if any(self.padding) else x

    def _sizes(self, x: Tensor) -> Tensor:
        """K of XNOR-Net (arXiv 1603.05279, section 3.2): mean|x| of what an output sees, [batch, 1, height, width]."""
        mean = self._padded(x.abs().mean(dim=1, keepdim=True))
        height, width = self.kernel_size
        box = torch.full((1, 1, height, width), 1 / (height * width)).to(mean)
        return F.conv2d(mean, box, None, self.stride, 0, self.dilation)


class PreparedEmbedding(Prepared):
    """A `nn.Embedding` in training."""

    def __init__(self, layer: nn.Embedding, weights: WeightEstimator) -> None:
        super().__init__(layer, weights, None)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., dim]"""
        return F.embedding(ids, self.rounded_weight(), self.padding_idx)
