"""What happens to the input of a linear layer, the same in the simulation and in the artifact.

The arithmetic is compressed-tensors', to the bit, in every floating point dtype; so it is in clusters of channels,
which compressed-tensors does not have.
"""

from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.numerics.quantize import fake_quantize, fake_quantize_dynamic
from bitfold.numerics.scheme import TensorScheme

__all__ = ["quantize_input"]


def quantize_input(
    x: Tensor,
    scheme: TensorScheme,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    clusters: Tensor | None = None,
) -> Tensor:
    """Fake-quantize the input of a linear layer; same shape and dtype as x.

    x:        [..., in_features]
    scale:    [1], or one for each cluster, for static schemes, and the global scale of nvfp4, float32; of a clipped
              one the share of its range [1]; else x itself gives the range.
    zero:     int8 in the shape of scale, for static asymmetric schemes.
    clusters: [in_features] uint8, the cluster of each channel, where the scheme has clusters.

    Raises RecipeError when what is calibrated is missing: clusters, the scale or an asymmetric scheme's zero-point.
    """
    if scheme.clusters is not None and clusters is None:
        raise RecipeError(
            "Clusters of channels come from calibration text, and are not there: calibrate them, or choose a scheme "
            "without clusters."
        )
    if scheme.clipped:
        if scale is None:
            raise RecipeError(
                "The share of a clipped activation's range comes from calibration text, and is not there: calibrate "
                "it, or set activation.clipped=false."
            )
        return fake_quantize_dynamic(x, scheme, share=scale)
    if not scheme.static and scheme.grid != "nvfp4":
        return fake_quantize_dynamic(x, scheme, clusters=clusters)
    if scale is None or (zero is None and not scheme.symmetric):
        raise RecipeError(
            "A static activation needs its calibrated scale and zero-point, and an nvfp4 one its global scale: "
            "calibrate it, or choose a dynamic scheme."
        )
    if not scheme.static:
        return fake_quantize_dynamic(x, scheme, scale)
    zero = None if scheme.symmetric else zero
    if clusters is not None:
        at = clusters.long()
        scale, zero = scale[at], None if zero is None else zero[at]
    return fake_quantize(x, scale.to(x.dtype), None if zero is None else zero.to(x.dtype), scheme)
