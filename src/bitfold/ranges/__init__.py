"""Ways of choosing a range, one file each. A new one is a new file and a line here.

Each is a `Range`: `limits(groups, scheme, gram) → (minimum, maximum)`.
"""

from bitfold.ranges.kl import Kl
from bitfold.ranges.minmax import MinMax
from bitfold.ranges.mse import Mse
from bitfold.ranges.output_error import OutputError
from bitfold.ranges.percentile import Percentile
from bitfold.ranges.range import Range

__all__ = ["RANGES", "MinMax", "Range"]


RANGES: dict[str, type[Range]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": Mse,
    "kl": Kl,
    "output_error": OutputError,
}
