"""Whether the order of methods is the same in every family: checkpoints made from a Llama's, quantized and measured.

    python benchmarks/families.py ../shared/bench/tiny-llama --train ../shared/bench/text/technical-train.txt \\
        --calibration ../shared/bench/calibration-128x256.npy --text ../shared/bench/text/heldout.txt

    # a quick look at two of them
    python benchmarks/families.py ../shared/bench/tiny-llama --train TEXT --calibration FILE --text FILE \\
        --family mistral gemma --samples 16 --windows 32 --method rtn affine:affine.epochs=1 -o /tmp/families

The checkpoints are made first (make_families.py, which also stands alone) and kept in --work. The methods are named
from the one that should be worst to the one that should be best; one that has a larger KL than the one before it, by
more than --tolerance, is shown, and the command ends with 1. Finished rows are kept: the same command goes on where it
was stopped.
"""

import argparse
import gc
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from children import examples, fix_environment
from make_families import MADE, Training, add_making_arguments, make_family
from measuring import (
    Asked,
    Measure,
    Row,
    Rows,
    add_measuring_arguments,
    command_line,
    markdown_table,
    measure_of,
    provenance,
    quantize_and_measure,
    settings_of,
    show_table,
    write_results,
)

ORIGINAL = "original"
IDENTITY = ("family", "checkpoint", "recipe", "settings")


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    training = Training(minutes=options.minutes, seed=options.seed)
    finished = Rows(options.rows, IDENTITY)
    # transformers gives every Qwen2 checkpoint Qwen2's own cut of words, whatever its tokenizer says.
    to_source = measure_of(options.source, options, tokenizer=options.source)
    families = []
    for family in options.family:
        path = make_family(options.source, family, options.train, training, options.work)
        families.append(measured(family, path, to_source, finished, options))
        gc.collect()  # the last original's remembered logits
    content = {"command": command_line(), "families": families}
    write_results(options.out, content, page(content, options))
    show([cells(family, options.tolerance) for family in families])
    sys.exit(any(violations(family, options.tolerance) for family in families))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("source", type=Path, help="directory of a Llama checkpoint")
    add_making_arguments(parser)
    add_measuring_arguments(parser)
    add("--scheme", default="w4a4", help="NOTATION[:key=value,…] as in --set")
    add(
        "--method",
        nargs="+",
        default=["rtn", "omniquant", "affine"],
        help="METHOD[:key=value,…] as in --set, the worst first",
    )
    add("--samples", type=int, default=128, help="calibration windows")
    add("--tolerance", type=float, default=0.01, help="a KL may be so much larger than the last")
    add("--rows", type=Path, default=Path("out/benchmarks/families.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/families"), help="without suffix")
    return parser.parse_args()


# -- measuring ---------------------------------------------------------------------------------------


def measured(
    family: str, path: Path, to_source: Measure, finished: Rows, options: argparse.Namespace
) -> Row:
    """The rows of one family: the checkpoint itself, held against the source, and every method's artifact."""
    from bitfold.models.checkpoint import Checkpoint

    to_original = measure_of(path, options, tokenizer=options.source)
    settings = settings_of(options) | {"samples": options.samples}
    of = {"family": family, "checkpoint": Checkpoint(path).fingerprint(), "settings": settings}

    def original() -> Row:
        return {"texts": to_source(path, compare=True)}

    row = {"family": family, "made": json.loads((path / MADE).read_text())}
    row[ORIGINAL] = finished.get(of | {"recipe": None}, original, f"{family} {ORIGINAL}")
    row["methods"] = {}
    for method in options.method:
        asked = Asked.parse(method, options.scheme)
        make = partial(
            quantize_and_measure, to_original, asked, options.calibration, options.samples
        )
        of_method = of | {"recipe": asked.recipe()}
        row["methods"][method] = finished.get(of_method, make, f"{family} {method}")
    return row


def violations(family: Row, tolerance: float) -> list[str]:
    """The methods that are worse than the one named before them."""
    divergences = {name: kl(row) for name, row in family["methods"].items()}
    return [
        f"{later} ÷ {earlier} {divergences[later] / divergences[earlier]:.3f}"
        for earlier, later in pairwise(divergences)
        if not divergences[later] <= divergences[earlier] * (1 + tolerance)
    ]


def figures(row: Row) -> dict[str, Any]:
    return next(iter(row["texts"].values()))


def kl(row: Row) -> float:
    """Its KL; infinite where a logit was not finite."""
    found = figures(row)["kl_mean"]
    return float("inf") if found is None else float(found)


# -- the page ----------------------------------------------------------------------------------------


def cells(family: Row, tolerance: float) -> dict[str, str]:
    """By column; those with ± and ppl of a method are for the page alone."""
    original = figures(family[ORIGINAL])
    line = {
        "family": family["family"],
        "original ppl": f"{original['perplexity']:.2f}",
        "KL to the source": f"{kl(family[ORIGINAL]):.4f}",
    }
    for name, row in family["methods"].items():
        found = figures(row)
        perplexity = found["perplexity"]
        line[f"{name} KL"] = f"{kl(row):.4f}"
        line[f"{name} ±"] = f"{found['kl_se'] or 0:.4f}"
        line[f"{name} ppl"] = "not finite" if perplexity is None else f"{perplexity:.2f}"
    for (earlier, before), (later, row) in pairwise(family["methods"].items()):
        line[f"{later} ÷ {earlier}"] = f"{kl(row) / kl(before):.3f}"
    return line | {"order": "; ".join(violations(family, tolerance)) or "as expected"}


def show(families: list[dict[str, str]]) -> None:
    shown = [
        name for name in families[0] if name == "original ppl" or not name.endswith((" ±", " ppl"))
    ]
    show_table(shown, [[family[name] for name in shown] for family in families])


def page(content: Row, options: argparse.Namespace) -> str:
    families = content["families"]
    rows = [row for family in families for row in family["methods"].values()]
    found, table = figures(rows[0]), [cells(family, options.tolerance) for family in families]
    extent = "all" if options.windows is None else "the first"
    lines = [
        "# Families",
        "",
        f"Written by `{content['command']}`.",
        "",
        provenance(rows),
        "",
        f"Scheme {options.scheme}. Calibration: `{options.calibration.name}`, {options.samples} samples. Evaluation "
        f"on `{options.text.name}` in float32, {extent} {found['windows']} windows of {options.length} tokens, each "
        f"alone, cut by {options.source.name}'s tokenizer. KL: to the family's own original, mean in nats per token; "
        f"±: its standard error over windows; KL to the source: of that original to {options.source.name}. Order: "
        f"every method's KL is at most {1 + options.tolerance:g} times that of the one before it.",
        "",
        *markdown_table(list(table[0]), [list(line.values()) for line in table]),
        "",
        "## How the checkpoints were made",
        "",
        f"From {options.source.name} by `benchmarks/make_families.py`: its weights moved, and what the architecture "
        "has beside them put where it changes least; then, where there are steps, trained towards the source's outputs "
        f"on `{options.train.name}`. KL to the source on {options.train.name}, before and after:",
        "",
        *markdown_table(
            ["family", "KL moved", "KL trained", "steps", "tokens", "CPU s"],
            [making_cells(family) for family in families],
        ),
    ]
    return "\n".join(lines) + "\n"


def making_cells(family: Row) -> list[str]:
    made = family["made"]
    line = [family["family"], f"{made['kl_moved']:.4f}"]
    if "steps" not in made:
        return [*line, "", "", "", ""]
    line += [f"{made['kl_trained']:.4f}", str(made["steps"]), f"{made['tokens']:,}"]
    return [*line, f"{made['cpu_seconds']:.0f}"]


if __name__ == "__main__":
    main()
