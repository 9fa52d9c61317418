"""What bitfold carries with it: a small model and two texts, so that it can be tried offline.

The README.md beside each says where it comes from and under which licence.
"""

from pathlib import Path

__all__ = ["CALIBRATION_TEXT", "DEMO_MODEL", "EVALUATION_TEXT"]

_HERE = Path(__file__).resolve().parent

DEMO_MODEL: Path = _HERE / "tiny-llama"
"""A 5.8M-parameter Llama checkpoint with its tokenizer."""

CALIBRATION_TEXT: Path = _HERE / "text" / "wikitext2-calibration.txt"
"""300 KB of WikiText-2's validation split, UTF-8."""

EVALUATION_TEXT: Path = _HERE / "text" / "wikitext2-evaluation.txt"
"""154 KB of WikiText-2's test split, UTF-8; shares no article with CALIBRATION_TEXT."""
