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
    scale: [1], for static schemes, and the global scale of nvfp4, float32; else x itself gives the range.
    zero:  [1] int8, for static asymmetric schemes.

    Raises RecipeError when what is calibrated is missing, the scale or an asymmetric scheme's zero-point.
    """
    if not scheme.calibrated:
        return fake_quantize_dynamic(x, scheme)
    if scale is None or (zero is None and not scheme.symmetric):
        raise RecipeError(
            "A static activation needs its calibrated scale and zero-point, and an nvfp4 one its global scale: "
            "calibrate it, or choose a dynamic scheme."
        )
    if not scheme.static:
        return fake_quantize_dynamic(x, scheme, scale)
    zero = None if scheme.symmetric or zero is None else zero.to(x.dtype)
    return fake_quantize(x, scale.to(x.dtype), zero, scheme)
