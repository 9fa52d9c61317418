"""Quantize a checkpoint by two methods, and compare what each lost.

    python examples/quantize_and_compare.py [MODEL] [TEXT]

Without arguments it takes the model and the text that bitfold carries.
"""

import sys
import tempfile
from pathlib import Path

import bitfold
from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL
    text = sys.argv[2] if len(sys.argv) > 2 else EVALUATION_TEXT
    with tempfile.TemporaryDirectory() as directory:
        for method in ("rtn", "awq"):
            out = Path(directory) / method
            made = bitfold.quantize(
                model, out, method=method, scheme="w3a16g128", samples=32, sequence_length=256
            )
            assert isinstance(made, bitfold.Quantization)  # a dry run would give an Estimate
            bitfold.verify(out)
            figures = bitfold.evaluate(out, text, sequence_length=256, windows=50, against=model)
            (found,) = figures.texts.values()
            print(
                f"{method}: {made.bits_per_weight:.2f} bits per weight, {made.seconds:.1f} s, "
                f"perplexity {found.perplexity:.2f}, KL {found.kl_mean:.4f}, "
                f"top token agrees {found.top1_agreement:.1%}"
            )


if __name__ == "__main__":
    main()
