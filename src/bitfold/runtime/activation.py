"""What happens to the input of a linear layer, the same in the simulation and in the artifact.

The arithmetic is compressed-tensors', to the bit, in every floating point dtype.
"""

from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics import TensorScheme, fake_quantize, fake_quantize_dynamic

__all__ = ["quantize_input"]


def quantize_input(
    x: Tensor, scheme: TensorScheme, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Fake-quantize the input of a linear layer; same shape and dtype as x.

    x:     [..., in_features]
    scale: [1], for static schemes; dynamic ones take their range from x itself.
    zero:  [1] int8, for static asymmetric schemes.

    Raises RecipeError when a static scheme has no scale, or an asymmetric one no zero-point.
    """
    if not scheme.static:
        return fake_quantize_dynamic(x, scheme)
    if scale is None or (zero is None and not scheme.symmetric):
        raise RecipeError(
            "A static activation needs its calibrated scale and zero-point: calibrate it, "
            "or set activation.static=false."
        )
    zero = None if scheme.symmetric or zero is None else zero.to(x.dtype)
    return fake_quantize(x, scale.to(x.dtype), zero, scheme)
