"""The errors bitfold raises on purpose.

    BitfoldError            one clear sentence: what is wrong, where, and how to mend it
    ├── RecipeError         a method, scheme, option or key that cannot be
    ├── CheckpointError     a model directory that is missing, corrupt or contradicts itself
    ├── FamilyError         an architecture bitfold has no table for, or whose layers were not all reached
    ├── DataError           calibration or evaluation text that cannot be used
    ├── OutputError         a place where the result cannot be written
    ├── EquivalenceError    a rewriting that changed what the model computes
    ├── ExportError         a format that cannot hold a result
    ├── VerificationError   an artifact that is not what was simulated
    ├── EngineError         an engine that is not there, or that cannot run an artifact
    └── MissingExtraError   an optional dependency that is not installed

The command line prints the sentence and exits with 1; anything else that is raised is a defect of bitfold.
"""

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "BitfoldError",
    "CheckpointError",
    "DataError",
    "EngineError",
    "EquivalenceError",
    "ExportError",
    "FamilyError",
    "MissingExtraError",
    "OutputError",
    "RecipeError",
    "VerificationError",
    "did_you_mean",
]


class BitfoldError(Exception):
    """Base of every error that is the input's or the machine's, not bitfold's.

    >>> BitfoldError("There is no file a.txt")
    BitfoldError('There is no file a.txt.')
    """

    def __init__(self, sentence: str) -> None:
        """Whatever libraries put into it, a sentence is one line and ends with a full stop."""
        super().__init__(re.sub(r"\s*\n\s*", " ", sentence).rstrip(". ") + ".")


class RecipeError(BitfoldError):
    """A method, scheme, option or key that cannot be."""


class CheckpointError(BitfoldError):
    """A model directory that is missing, corrupt or contradicts itself."""


class FamilyError(BitfoldError):
    """An architecture bitfold has no table for, or whose layers were not all reached."""


class DataError(BitfoldError):
    """Calibration or evaluation text that cannot be used."""


class OutputError(BitfoldError):
    """A place where the result cannot be written."""


class EquivalenceError(BitfoldError):
    """A rewriting that changed what the model computes."""


class ExportError(BitfoldError):
    """A format that cannot hold a result."""


class VerificationError(BitfoldError):
    """An artifact that is not what was simulated."""


class EngineError(BitfoldError):
    """An engine that is not there, or that cannot run an artifact."""


class MissingExtraError(BitfoldError):
    """An optional dependency that is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, and all of them.

    >>> did_you_mean("smothquant", ["rtn", "smoothquant"])
    "did you mean 'smoothquant'? Known: rtn, smoothquant"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'? Known: {', '.join(names)}"
    return f"choose one of {', '.join(names)}"
