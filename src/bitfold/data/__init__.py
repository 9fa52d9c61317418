"""Calibration and evaluation text."""

from bitfold.data.calibration import Calibration, check_samples, load_calibration
from bitfold.data.text import (
    check_sequence_length,
    default_sequence_length,
    read_text,
    tokenize,
    windows,
)

__all__ = [
    "Calibration",
    "check_samples",
    "check_sequence_length",
    "default_sequence_length",
    "load_calibration",
    "read_text",
    "tokenize",
    "windows",
]
