"""Linear layers and convolutions of signs, as XNOR-Net and BNN have them.

XNOR-Net (arXiv 1603.05279): a filter W is α sign(W) with α = mean |W| (equation 6), an input x is sign(x), and the
product may be scaled by K, the mean of |x| under the filter: for a convolution the mean over channels, averaged over
the filter's place (section 3.2), for a linear layer the mean of the token. BNN (arXiv 1602.02830) has neither, α = 1.

The layers infer and do not learn: no gradient goes through them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.runtime.xnor import Signs, pack_signs, panels_of, signed_linear, xnor_product

__all__ = ["XnorConv2d", "XnorLinear", "filter_scale"]


def filter_scale(weight: Tensor) -> Tensor:
    """α of XNOR-Net, the mean of |W| over each output channel: weight [out, ...] → [out] float32.

    >>> filter_scale(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
    tensor([2.0000, 0.2500])
    """
    return weight.detach().flatten(1).float().abs().mean(dim=1)


class _Signed(nn.Module):
    """What both layers hold: words [out, words] int64, scale [out] float32 or None, bias [out] float32 or None."""

    words: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, signs: Signs, scale: Tensor | None, bias: Tensor | None, scaled_input: bool
    ) -> None:
        super().__init__()
        self.bits, self.scaled_input = signs.bits, scaled_input
        out = len(signs.words)
        for name, given in (("scale", scale), ("bias", bias)):
            if given is not None and given.numel() != out:
                raise RecipeError(
                    f"The {name} of {out} channels has {given.numel()} numbers: give one for each channel"
                )
            held = None if given is None else given.detach().float().flatten().clone()
            self.register_buffer(name, held)
        self.register_buffer("words", signs.words)
        self._arranged: tuple[tuple[int, int], Tensor | None] | None = None

    def _weight(self) -> tuple[Signs, Tensor | None]:
        """The weight's signs, and their panels: arranged once, and again for what was loaded since."""
        signs, key = Signs(self.words, self.bits), (self.words.data_ptr(), self.words._version)
        if self._arranged is None or self._arranged[0] != key:
            self._arranged = (key, panels_of(signs))
        return signs, self._arranged[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arranged": None}


class XnorLinear(_Signed):
    """The product of the signs of inputs and of a weight.

    y = (sign(x) · sign(W)) α K + b, in float32, where α is `scale`, and K = mean |x| of a token if `scaled_input`,
    else 1.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        scaled_input: bool = False,
    ) -> None:
        """weight: [out, in], bias and scale: [out], in any dtype. scale: None is 1 (BNN); `filter_scale(weight)` is
        XNOR-Net's.

        Raises RecipeError for a weight that is no matrix, and for a scale or bias of another length.

        >>> XnorLinear(torch.tensor([[0.5, -2.0, 0.0]]), scale=torch.tensor([3.0]))(torch.tensor([[1.0, 1.0, -1.0]]))
        tensor([[-3.]])
        """
        super().__init__(pack_signs(weight), scale, bias, scaled_input)
        self.out_features, self.in_features = weight.shape

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise RecipeError(
                f"An input of shape {tuple(x.shape)} does not end with the layer's {self.in_features} features"
            )
        rows = x.reshape(-1, self.in_features)
        signs, panels = self._weight()
        of_row = rows.abs().mean(dim=1, dtype=torch.float32) if self.scaled_input else None
        found = signed_linear(
            rows, signs, panels, of_column=self.scale, of_row=of_row, bias=self.bias
        )
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaled_input={self.scaled_input}"


class XnorConv2d(_Signed):
    """The convolution of the signs of inputs and of filters.

    y = (sign(x) ∗ sign(W)) α K + b, in float32. What pads an input is 0, not +1: it multiplies nothing, as in
    conv2d(sign(x), sign(W)). K = A ∗ k if `scaled_input`, else 1: A is the mean of |x| over channels, padded alike,
    and k the box of 1 / (kh kw).
    """

    box: Tensor
    sums: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        scale: Tensor | None = None,
        scaled_input: bool = False,
    ) -> None:
        """weight: [out, in, kh, kw], in any dtype; stride, padding and dilation as nn.Conv2d takes them; the others as
        in `XnorLinear`.

        Raises RecipeError for a weight of another shape, a padding that is none, and a scale or bias of another length.
        """
        if weight.dim() != 4:
            raise RecipeError(
                f"Filters have the shape [out, in, height, width], and these have {tuple(weight.shape)}"
            )
        out, channels, *kernel = weight.shape
        # A pixel's channels begin a word: so pixels are gathered as whole words.
        pixels = pack_signs(weight.permute(0, 2, 3, 1).reshape(-1, channels))
        words = pixels.words.view(out, -1)
        super().__init__(Signs(words, weight[0].numel()), scale, bias, scaled_input)
        self.in_channels, self.out_channels, self.kernel = channels, out, (kernel[0], kernel[1])
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.pads = _pads(padding, self.kernel, self.dilation)
        area = kernel[0] * kernel[1]
        self.register_buffer("box", torch.full((1, 1, *self.kernel), 1 / area), persistent=False)
        sums = torch.where(weight.detach() < 0, -1.0, 1.0).double().sum(dim=1, keepdim=True)
        self.register_buffer("sums", sums)
        self._padded: tuple[tuple[int, ...], Tensor] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] → [batch, out, height, width], in the dtype of x."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise RecipeError(
                f"An input of shape {tuple(x.shape)} is not one of the layer's {self.in_channels} channels"
            )
        batch, _, height, width = x.shape
        signs, panels = self._weight()
        pixels = pack_signs(x.permute(0, 2, 3, 1).reshape(-1, self.in_channels)).words
        places = self._gathered(pixels.view(batch, height, width, -1))
        shape = (batch, *places.shape[1:3], self.out_channels)
        left = Signs(places.flatten(3).flatten(0, 2), self.bits)
        found = xnor_product(left, signs, panels).view(shape)
        if any(self.pads):
            # Words of padding are +1; what that adds is known of the filters alone.
            found -= self._of_padding(x)
        numbers = found.permute(0, 3, 1, 2).float()
        if self.scale is not None:
            numbers = numbers * self.scale[:, None, None]
        if self.scaled_input:
            mean = F.pad(x.float().abs().mean(dim=1, keepdim=True), self.pads)
            numbers = numbers * F.conv2d(mean, self.box, None, self.stride, 0, self.dilation)
        if self.bias is not None:
            numbers = numbers + self.bias[:, None, None]
        return numbers.contiguous().to(x.dtype)

    def _gathered(self, pixels: Tensor) -> Tensor:
        """[batch, height, width, words] → [batch, height', width', kh, kw, words]: what each filter's place sees."""
        found = F.pad(pixels, (0, 0, *self.pads))
        for axis, (size, step, apart) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=1
        ):
            span = (size - 1) * apart + 1
            if found.shape[axis] < span:
                raise RecipeError(
                    f"An input of {pixels.shape[1]} x {pixels.shape[2]} pixels is smaller than the layer's filter"
                )
            found = found.unfold(axis, span, step)[..., ::apart]
        return found.permute(0, 1, 2, 4, 5, 3)

    def _of_padding(self, x: Tensor) -> Tensor:
        """[height', width', out] int32: the products of ones where an input of this size is padded."""
        key = tuple(x.shape[2:])
        if self._padded is None or self._padded[0] != key:
            ones = F.pad(self.sums.new_zeros(1, 1, *key), self.pads, value=1.0)
            found = F.conv2d(ones, self.sums, None, self.stride, 0, self.dilation)
            self._padded = (key, found[0].permute(1, 2, 0).round().to(torch.int32).contiguous())
        return self._padded[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_padded": None}

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, stride={self.stride}, pads={self.pads}, "
            f"dilation={self.dilation}, scaled_input={self.scaled_input}"
        )


def _pair(given: int | tuple[int, int]) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else (given[0], given[1])


def _pads(
    padding: int | tuple[int, int] | str, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Left, right, top, bottom."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RecipeError(f"Unknown padding '{padding}': use numbers, 'same' or 'valid'")
        rows, columns = (
            (size - 1) * apart if padding == "same" else 0
            for size, apart in zip(kernel, dilation, strict=True)
        )
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    rows, columns = _pair(padding)
    return columns, columns, rows, rows
