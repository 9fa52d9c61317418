"""The grids of 4-bit floating point numbers, whose group scales take 8 bits: mxfp4 and nvfp4.

    x̂ = s · q        q ∈ ±{0, ½, 1, 1½, 2, 3, 4, 6}   (E2M1: sign, two bits of exponent, one of mantissa)

With m the largest magnitude of a group:

    mxfp4   groups of 32, s = 2^⌊log₂ m − log₂ 3.5⌋: a power of two (E8M0), by which m / s is in [3.5, 7)
    nvfp4   groups of 16, s = e4m3(G · m/6) / G, G being one global scale of the whole tensor

Sources: OCP Microscaling Formats 1.0; NVIDIA's NVFP4. The rules for s are compressed-tensors', so that what is
quantized at run time comes out the same to the bit. There G may be any number. bitfold takes a power of two: s has
then 4 significant bits and s · q at most 6, so that every value is exact in bfloat16, in which loaders unpack weights.
"""

import torch
from torch import Tensor

from bitfold.numerics.scheme import GridName, TensorScheme

__all__ = [
    "FP4_LEVELS",
    "FP4_MAX",
    "fp4_codes",
    "fp4_scale",
    "fp4_scale_dynamic",
    "fp4_values",
    "global_scale",
    "round_to_fp4",
    "scale_dtype_of",
    "scale_parts",
]

FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_MAX = FP4_LEVELS[-1]
_NEGATIVE = 8  # the sign bit of a code
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
# Instead of a scale that is zero in E4M3: compressed-tensors' choice.
_E4M3_FOR_ZERO = 0.125
# 6 · 2^125 is finite in float32 and bfloat16, and ½ · 2^-127 is not zero.
_EXPONENTS = (-127, 125)
# With this one the smallest scales, and their products with codes, are normal numbers of float32.
_LARGEST_GLOBAL = 2.0**100
_SCALE_DTYPES: dict[GridName, torch.dtype] = {
    "mxfp4": torch.float8_e8m0fnu,
    "nvfp4": torch.float8_e4m3fn,
}


def scale_dtype_of(scheme: TensorScheme, storage: torch.dtype) -> torch.dtype:
    """The dtype of a weight's scales: the grid's own, or that of storage where the grid has none."""
    return _SCALE_DTYPES.get(scheme.grid, storage)


def round_to_fp4(x: Tensor) -> Tensor:
    """The nearest E2M1 number, ties to the even mantissa, what lies beyond ±6 to ±6; same shape and dtype."""
    halves, ones, twos = _steps_up(x)
    return halves.mul_(0.5).add_(ones).add_(twos, alpha=2).copysign_(x)


def fp4_codes(x: Tensor) -> Tensor:
    """E2M1 codes of the nearest numbers, uint8: the number of the magnitude, and 8 more where it is negative.

    There is one zero, 0; the code 8 of −0 is not made.
    """
    halves, ones, twos = _steps_up(x)
    number = halves.add_(ones).add_(twos)
    negative = number.copysign(x) < 0
    return number.add_(negative, alpha=_NEGATIVE).to(torch.uint8)


def fp4_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that E2M1 codes stand for."""
    every = [*FP4_LEVELS, *(-level for level in FP4_LEVELS)]
    return torch.tensor(every, dtype=dtype, device=codes.device)[codes.int()]


def fp4_scale(largest: Tensor, scheme: TensorScheme) -> Tensor:
    """Scales of groups of which the largest magnitudes are given, together all groups of one tensor; same shape, and
    floating point that the stored form holds exactly."""
    if scheme.grid == "mxfp4":
        return _power_of_two(largest)
    return _e4m3_scale(largest, global_scale(largest))


def fp4_scale_dynamic(largest: Tensor, scheme: TensorScheme, at: Tensor | None) -> Tensor:
    """The same at run time, in compressed-tensors' dtypes; `at` is the global scale [1], float32, of nvfp4, by default
    that of the groups themselves."""
    if scheme.grid == "mxfp4":
        scale = _power_of_two(largest).to(largest.dtype)
        return torch.where(scale == 0, torch.ones_like(scale), scale)  # an underflow of float16
    return _e4m3_scale(largest, global_scale(largest) if at is None else at)


def global_scale(largest: Tensor) -> Tensor:
    """The largest power of two that keeps G · m/6 within E4M3 for all magnitudes m that are given; [1], float32."""
    most = _E4M3_MAX * FP4_MAX
    return _power_below(most / largest.max().to(torch.float32).clamp(min=most / _LARGEST_GLOBAL))


def scale_parts(
    scale: Tensor, scheme: TensorScheme, storage: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored, in `scale_dtype_of`, and the global scale [1], float32, where the grid has one.

    scale: those of a whole tensor, of `fp4_scale` where the grid is one of these. Nothing is lost.
    """
    at = None
    if scheme.grid == "nvfp4":
        at = _power_below(_E4M3_MAX / scale.max().to(torch.float32))
        scale = scale * at
    return scale.to(scale_dtype_of(scheme, storage)), at


def _steps_up(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many steps of ½ (at most 4), 1 (2) and 2 (1) lie below the number nearest to |x|.

    Numbers are ½ apart up to 2, 1 apart up to 4, and 2 apart up to 6. Clamped instead of compared, which is several
    times as fast on a CPU.
    """
    magnitude = x.abs()
    ones = magnitude.clamp(2, 4).round_().sub_(2)
    twos = (magnitude * 0.5).clamp_(2, 3).round_().sub_(2)
    return magnitude.mul_(2).clamp_(max=4).round_(), ones, twos


def _power_of_two(largest: Tensor) -> Tensor:
    """mxfp4's scale, float32 at least."""
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32))
    wide = wide.clamp(min=torch.finfo(torch.float32).tiny)
    mantissa, exponent = torch.frexp(wide)  # the mantissa is in [½, 1)
    exponent = (exponent - 3 + (mantissa >= 0.875).int()).clamp(*_EXPONENTS)
    return torch.ldexp(torch.ones_like(wide), exponent)


def _e4m3_scale(largest: Tensor, at: Tensor) -> Tensor:
    """nvfp4's scale, float32 at least, with the global scale `at`."""
    scale = at * (largest / torch.tensor(FP4_MAX, dtype=largest.dtype, device=largest.device))
    rounded = scale.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).to(scale.dtype)
    return torch.where(rounded == 0, _E4M3_FOR_ZERO, rounded) / at


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above a positive number; [1]."""
    _, exponent = torch.frexp(x.reshape(1))
    return torch.ldexp(x.new_ones(1), exponent - 1)
