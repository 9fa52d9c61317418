"""Training a language model through its rounding, against the best that PTQ makes of it in the same bits.

    python benchmarks/qat.py ../shared/bench/tiny-llama --text ../shared/bench/text/technical-train.txt \\
        --evaluate ../shared/bench/text/heldout.txt --calibration ../shared/bench/calibration-128x256.npy

Every run is a process of its own; a finished row is kept at once, and the same command goes on where it was stopped.
Markdown and JSON go to docs/results/qat.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bitfold import BitfoldError
from children import bitfold_json, examples, fix_environment
from measuring import (
    Row,
    Rows,
    command_line,
    markdown_table,
    provenance,
    show_table,
    write_results,
)

TERNARY = ("weight.symmetric=true", "weight.narrow=true")


@dataclass(frozen=True)
class Way:
    """One row: how, and with which settings of the scheme w2a16g64."""

    label: str
    command: tuple[str, ...]
    ternary: bool = False


WAYS = [
    Way("PTQ: round to nearest", ("quantize", "--method", "rtn")),
    Way("PTQ: auto", ("quantize", "--method", "auto")),
    Way("LSQ, begun by QuantEase", ("train", "--method", "lsq")),
    Way("LSQ, begun by its paper's rule", ("train", "--method", "lsq", "--start", "rtn")),
    Way("LSQ, no windows written", ("train", "--method", "lsq", "--written", "0")),
    Way("PTQ: auto", ("quantize", "--method", "auto"), ternary=True),
    Way("ternary, learned threshold", ("train", "--method", "ternary"), ternary=True),
    Way("TWN", ("train", "--method", "twn"), ternary=True),
    Way("LSQ on the ternary grid", ("train", "--method", "lsq"), ternary=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("model", type=Path, help="directory of the original checkpoint, teacher too")
    add("--text", type=Path, required=True, help="to train on")
    add("--evaluate", type=Path, required=True, help="perplexity and KL on it")
    add("--calibration", type=Path, required=True, help="of PTQ")
    add("--windows", type=int, default=200, help="of the evaluation text")
    add("--length", type=int, default=256, help="tokens of a window")
    add("--only", nargs="+", type=int, help="rows by number, from 0")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/qat.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/qat"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    finished = Rows(options.rows, ("way", "ternary", "windows"))
    asked = WAYS if options.only is None else [WAYS[number] for number in options.only]
    rows = []
    try:
        for way in asked:
            of = {"way": way.label, "ternary": way.ternary, "windows": options.windows}
            label = f"{way.label}{' (ternary)' if way.ternary else ''}"
            rows.append(finished.get(of, partial(measured, way, options), label))
    except BitfoldError as error:
        raise SystemExit(str(error)) from error
    content = {"command": command_line(), "rows": rows}
    write_results(options.out, content, page(options, rows))
    show_table(*table(rows))


def measured(way: Way, options: argparse.Namespace) -> Row:
    scheme: list[str] = ["--scheme", "w2a16g64"]
    for setting in TERNARY if way.ternary else ():
        scheme += ["--set", setting]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "artifact"
        given: list[str | Path] = [options.model, "-o", out, *scheme, *way.command[1:]]
        if way.command[0] == "quantize":
            made = bitfold_json("quantize", *given, "--calibration", options.calibration)
            artifact = made
        else:
            given += ["--text", options.text, "--teacher", options.model]
            made = bitfold_json("train", "qat", *given, "--sequence-length", str(options.length))
            artifact = made["artifact"]
        found = bitfold_json(
            "eval", out, "--text", options.evaluate, "--against", options.model, "--sequence-length",
            str(options.length), "--limit", str(options.windows),
        )  # fmt: skip
    return {
        "bits": artifact["bits_per_weight"],
        "perplexity": found["perplexity"],
        "kl": found["kl_mean"],
        "top1": found["top1_agreement"],
        "steps": made.get("steps"),
        "before": made.get("held_back_before"),
        "after": made.get("held_back_after"),
        "peak_rss_mb": made["peak_rss_mb"],
        "cpu_seconds": made["process_cpu_seconds"],
    }


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = [
        "grid",
        "method",
        "bits",
        "perplexity",
        "KL",
        "top-1",
        "held back",
        "CPU s",
        "peak MB",
    ]
    lines = []
    for row in rows:
        looked = "" if row["before"] is None else f"{row['before']:.4f} → {row['after']:.4f}"
        cells = ["−1, 0, 1" if row["ternary"] else "4 levels", row["way"], f"{row['bits']:.3f}"]
        cells += [f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}", looked]
        lines.append([*cells, f"{row['cpu_seconds']:.0f}", f"{row['peak_rss_mb']:.0f}"])
    return header, lines


def page(options: argparse.Namespace, rows: list[Row]) -> str:
    lines = [
        "# A language model trained through its rounding",
        "",
        f"Written by `{command_line()}`.",
        "",
        provenance(rows),
        "",
        f"{options.model.name} at w2a16g64, in groups of 64; evaluated on {options.evaluate.name}, the first "
        f"{options.windows} windows of {options.length} tokens; KL: to the original, mean in nats per token; top-1: "
        f"how often the likeliest token is the original's. PTQ is calibrated on {options.calibration.name}, training "
        f"sees {options.text.name}, text of one kind, and (but in one row) as many windows that the original wrote "
        "itself; it imitates the original. Steps and rates are the command's defaults. held back: KL on windows of the "
        "training text that were kept out, before and after. CPU s: of the whole command. More rows of PTQ, on the "
        "same windows: [weights.md](weights.md).",
        "",
        *markdown_table(*table(rows)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
