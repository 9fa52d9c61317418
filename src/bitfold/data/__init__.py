"""Calibration and evaluation text."""

from bitfold.data.calibration import Calibration, load_calibration
from bitfold.data.text import default_sequence_length, read_text, tokenize, windows

__all__ = [
    "Calibration",
    "default_sequence_length",
    "load_calibration",
    "read_text",
    "tokenize",
    "windows",
]
