"""Calibration and evaluation text."""

from bitfold.data.calibration import Calibration, check_samples, load_calibration
from bitfold.data.data_free import GENERATE, RANDOM, generated_windows, random_windows
from bitfold.data.text import (
    check_sequence_length,
    default_sequence_length,
    read_text,
    tokenize,
    windows,
)

__all__ = [
    "GENERATE",
    "RANDOM",
    "Calibration",
    "check_samples",
    "check_sequence_length",
    "default_sequence_length",
    "generated_windows",
    "load_calibration",
    "random_windows",
    "read_text",
    "tokenize",
    "windows",
]
