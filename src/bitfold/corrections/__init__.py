"""Ways of changing a weight before its range is chosen, one file each. A new one is a new file and a line here.

Each is a `Correction`: `apply(weight, scheme, statistics) → weight`. Unlike a transform it is no equivalence: it makes
up for errors, or prepares for rounding.
"""

from bitfold.corrections.correction import Correction
from bitfold.corrections.magr import Magr
from bitfold.corrections.qep import Qep

__all__ = ["CORRECTIONS", "Correction", "Magr", "Qep"]

CORRECTIONS: dict[str, type[Correction]] = {
    "qep": Qep,
    "magr": Magr,
}
