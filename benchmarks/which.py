"""The page "which method shall I use": every method with what it lost and cost, from the tables in docs/results.

    python benchmarks/which.py

Measures nothing: reads the JSON beside those tables and writes docs/which.md. What to use when is said in this file.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from measuring import Row, markdown_table

RESULTS = Path(__file__).parent.parent / "docs" / "results"
OUT = RESULTS.parent / "which.md"
MODELS = ("tiny-llama", "tiny-llama-outliers")
SCHEMES = ("w4a16g128", "w3a16g128", "w2a16g64", "w4a4")
ABSENT = "–"


@dataclass(frozen=True)
class Method:
    """A line: what it is called in the tables, of which type it is, and when to use it."""

    name: str
    type: str
    when: str


WEIGHTS = [
    Method("rtn", "PTQ, no data", "8 bits; a first look; very large models in seconds"),
    Method("smoothquant", "PTQ, folded diagonal", "w8a8 with outliers in the inputs"),
    Method("awq", "PTQ, folded diagonal, searched", "4 bits, where others' AWQ files are expected"),
    Method("gptq", "PTQ, second order", "4 and 3 bits in seconds, no folding"),
    Method("gptaq", "PTQ, second order, asymmetric", "as gptq; better behind quantized inputs"),
    Method("qep+gptq", "PTQ, second order, errors passed on", "the best of the quick ones at few bits"),
    Method("quantease", "PTQ, coordinate descent", "2 and 3 bits without folding; what QAT begins with"),
    Method("signround", "PTQ, learned rounding", "3 and 2 bits, when minutes do not matter"),
    Method("omniquant", "PTQ, learned diagonal and clipping", "to compare with: affine contains it"),
    Method("affine", "PTQ, learned affine maps, folded", "outliers; inputs in few bits; runs anywhere"),
    Method("rptq", "PTQ, clustered channels", "to compare with: rotations do more"),
    Method("quarot", "PTQ, rotations, some run", "w4a4 in seconds, run by bitfold"),
    Method("spinquant", "PTQ, learned rotations, some run", "w4a4, run by bitfold"),
    Method("flat+gptaq", "PTQ, learned maps that run", "w4a4 with the least loss, run by bitfold"),
    Method("affine-plus", "PTQ, everything that folds", "w4a4 in engines that run nothing extra"),
    Method("vq", "PTQ, codebooks", "2 bits, where size is all and bitfold runs it"),
    Method("auto", "PTQ, composed", "**the default**: weights in 4 to 2 bits"),
]  # fmt: skip
TRAINED = [
    Method("PTQ int8, per channel", "static PTQ", "CNNs; the first thing to try"),
    Method("int8 dynamic", "dynamic PTQ", "encoders and LSTMs, no data"),
    Method("int8, torch", "dynamic PTQ of PyTorch", "to compare with"),
    Method("int8 static", "static PTQ", "encoders in engines that want fixed ranges"),
    Method("PTQ int4 weights, int8 inputs", "static PTQ", "when a point may be lost, no training"),
    Method("ZeroQ's inputs: int4 weights, int8 inputs", "data-free PTQ", "CNNs whose data are gone"),
    Method("PTQ int4", "static PTQ", "not for encoders: train"),
    Method("QAT min-max, 4 bits", "QAT", "as lsq, ranges without a gradient"),
    Method("LSQ, 4 bits", "QAT, learned steps", "**the default of training**"),
    Method("LSQ, 3 bits", "QAT, learned steps", "a third less memory than 4 bits"),
    Method("LSQ, 2 bits", "QAT, learned steps", "the smallest that are still integers everywhere"),
    Method("PACT, 4 bits", "QAT, learned clip", "inputs in few bits behind a ReLU"),
    Method("DoReFa, 2 bits", "QAT, tanh", "to compare with"),
    Method("TWN", "QAT, ternary by rule", "weights of −1, 0, 1, nothing to tune"),
    Method("ternary, learned threshold", "QAT, ternary", "weights of −1, 0, 1"),
    Method("BinaryConnect", "QAT, ±1", "to compare with: scales cost nothing"),
    Method("binary weights with XNOR-Net's scales", "QAT, ±α", "1 bit, inputs as they are"),
    Method("XNOR-Net", "QAT, signs for inputs too", "when the product of signs must be fast"),
    Method("BNN", "QAT, signs, no scales", "the same, the least arithmetic"),
]  # fmt: skip
# The same method by the names of the two tables.
NAMES = {
    "PTQ int8, per channel": ("PTQ int8, per channel", None),
    "int8, torch": (None, "int8 dynamic, torch's own"),
    "PTQ int4 weights, int8 inputs": (
        "PTQ int4 weights, int8 inputs, per channel",
        "PTQ int4 weights, int8 inputs",
    ),
    "PTQ int4": ("PTQ int4, per channel", "PTQ int4"),
    "QAT min-max, 4 bits": ("QAT min-max, 4 bits", "QAT int4 weights, int8 inputs"),
    "PACT, 4 bits": ("PACT, 4 bits", "PACT, 4 bits, inputs too"),
}


def main() -> None:
    OUT.write_text(page(), encoding="utf-8")
    print(OUT)


def rows_of(name: str) -> list[Row]:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def of_weights() -> tuple[list[str], list[list[str]]]:
    rows = rows_of("weights") + rows_of("four-bits")
    found = {(row["model"], row["scheme"], row["method"]): row for row in rows}
    lines = []
    for method in WEIGHTS:
        cells = [f"`{method.name}`", method.type]
        own = [found.get((model, scheme, method.name)) for scheme in SCHEMES for model in MODELS]
        for first, second in zip(own[::2], own[1::2], strict=True):
            both = [
                ABSENT if r is None else f"{r['texts']['heldout']['kl_mean']:.3f}"
                for r in (first, second)
            ]
            cells.append(" / ".join(both) if first or second else ABSENT)
        seconds = [row["process_cpu_seconds"] for row in own if row is not None]
        cells += [f"{statistics.mean(seconds):.0f}", method.when]
        lines.append(cells)
    header = ["method", "type", "4 bits", "3 bits", "2 bits", "4 bits, inputs too", "CPU s", "when"]
    return header, lines


def of_training() -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows_of("qat"):
        grid = "−1, 0, 1" if row["ternary"] else "4 levels"
        cells = [row["way"], grid, f"{row['bits']:.2f}", f"{row['kl']:.3f}"]
        lines.append([*cells, f"{row['cpu_seconds']:.0f}"])
    return ["method", "grid", "bits", "KL", "CPU s"], lines


def of_networks() -> tuple[list[str], list[list[str]]]:
    digits, sentences = rows_of("digits"), rows_of("sentences")
    lines = []
    for method in TRAINED:
        names = NAMES.get(method.name, (method.name, method.name))
        points = [to_float(digits, names[0]), to_float(sentences, names[1])]
        seconds = [cost(digits, names[0]), cost(sentences, names[1])]
        lines.append([method.name, method.type, *points, *seconds, method.when])
    header = ["method", "type", "digits", "sentences", "CPU s, digits", "CPU s, sentences", "when"]
    return header, lines


def to_float(rows: list[Row], way: str | None) -> str:
    """Points of accuracy to fp32, of the same seed."""
    like = "fp32, Hardtanh" if way in ("XNOR-Net", "BNN") else "fp32"
    base = {row["seed"]: row["accuracy"] for row in rows if row["way"] == like}
    own = [row["accuracy"] - base[row["seed"]] for row in rows if row["way"] == way]
    return f"{statistics.mean(own):+.2f}" if own else ABSENT


def cost(rows: Iterable[Row], way: str | None) -> str:
    own = [row["seconds"] for row in rows if row["way"] == way]
    return f"{statistics.mean(own):.0f}" if own else ABSENT


def of_adapters() -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows_of("adapters"):
        what, base = row["name"]
        before, after = row["perplexity_before"], row["perplexity_after"]
        share = row["share"]
        cells = [what, base, f"{after / before:.2f}", f"{share:.2%}"]
        lines.append([*cells, f"{row['process_cpu_seconds']:.0f}"])
    return ["method", "base", "perplexity ÷ before", "trained", "CPU s"], lines


TEXT = """# Which method shall I use?

Written by `python benchmarks/which.py` from the tables in [results/](results/): every figure was measured there, on
one thread of the machine that the table names. – : not measured, or the method is not for it.

1. **A language model, weights in 4 to 2 bits**: `bitfold quantize MODEL`, which is `auto`. It needs text of your
   domain (`--calibration`) more than anything else. Seconds matter: `--method qep+gptq`. Below 3 bits: `--effort
   high`, then training.
2. **Inputs in 4 bits, too**: does your engine run what bitfold runs? `flat+gptaq` or `spinquant`. Else
   `affine-plus`, which leaves nothing to run and takes its time.
3. **8 bits for weights and inputs**: `smoothquant` at w8a8.
4. **2 bits, or ternary weights, and text and hours to train**: `bitfold train qat --teacher MODEL`. It begins with
   PTQ's codes, and gains most where PTQ loses most.
5. **A new trade for a model that is small already**: `bitfold train qlora` on the artifact; `bitfit` where the file
   must be tiny.
6. **An encoder or a convolutional network**: int8 by PTQ; 4 bits by PTQ where a point may be lost, else `prepare`
   with `lsq`. 3 and 2 bits: `lsq` only. Ternary weights cost no more than 2 bits and multiply nothing. Signs for
   inputs are for products that must be fast above all.
7. **No data**: `--calibration generate` for language models, ZeroQ's inputs for networks with batch norms.

## Language models, without training

KL to the original in nats per token, on tiny-llama / on its twin with the outliers of a large model, 200 windows of
held-out text; CPU s: mean over these schemes. More models, texts, schemes:
[results/weights.md](results/weights.md), [results/four-bits.md](results/four-bits.md),
[results/mixed.md](results/mixed.md).
"""


def page() -> str:
    parts = [
        TEXT,
        *markdown_table(*of_weights()),
        "",
        "## Language models, trained through their rounding",
        "",
        "tiny-llama in groups of 64, KL as above ([results/qat.md](results/qat.md)).",
        "",
        *markdown_table(*of_training()),
        "",
        "## Networks and encoders",
        "",
        "Points of accuracy to fp32: a convolutional network on digits, MiniLM on sentences "
        "([results/digits.md](results/digits.md), [results/sentences.md](results/sentences.md)). Bits are those of "
        "weights; of inputs too on digits, but for ternary and binary weights; on sentences inputs have 8, but 4 with "
        "PACT and `PTQ int4`.",
        "",
        *markdown_table(*of_networks()),
        "",
        "## Adapters",
        "",
        "tiny-llama from its own domain to WikiText-2 in 30 steps ([results/adapters.md](results/adapters.md)).",
        "",
        *markdown_table(*of_adapters()),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
