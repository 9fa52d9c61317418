"""What AffineQuant's options do: a study varies one of them on a checkpoint, and everything it changes is measured.

    python benchmarks/studies.py alpha ../shared/bench/tiny-llama-outliers \\
        --calibration ../shared/bench/calibration-128x256.npy --text ../shared/bench/text/heldout.txt
    python benchmarks/studies.py growth

    # a quick look
    python benchmarks/studies.py mask MODEL --calibration FILE --text FILE \\
        --set affine.epochs=2 --samples 16 --windows 32 -o /tmp/mask

Every run is a process of its own, so that its time and peak memory are its own. A finished row is kept at once: the
same command goes on where it was stopped, and a run that several studies have in common is made once. The results are
printed as a table, and written as Markdown and JSON.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from bitfold import BitfoldError
from children import Failed, examples, fix_environment
from growth import add_growth_arguments, run_growth
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

IDENTITY = ("checkpoint", "recipe", "settings")
# What a run may end with that is a result, not a mistake of whoever started it.
FINDINGS = ("EquivalenceError", "CheckpointError")


@dataclass(frozen=True)
class Variant:
    """One run of a study: its --set, and its calibration windows where they are what varies."""

    set: tuple[str, ...] = ()
    samples: int | None = None


@dataclass(frozen=True)
class Study:
    """summary: one line for --help. about: what the page says of it. variants: by the name a table gives them."""

    summary: str
    about: str
    variants: Mapping[str, Variant]


def varying(key: str, *values: Any) -> dict[str, Variant]:
    return {str(value): Variant((f"{key}={value}",)) for value in values}


STUDIES = {
    "precision": Study(
        "precision of A and its inverse",
        "`affine.precision`: of A and its inverse while learning; `mixed` is a float32 A and a float64 inverse. It "
        "concerns the matrices per head only.",
        varying("affine.precision", "float32", "mixed", "float64"),
    ),
    "alpha": Study(
        "the stability factor of the gradual mask",
        "`affine.alpha`: what the off-diagonal entries are multiplied by.",
        varying("affine.alpha", 1, 0.1, 0.01, 0.001, 0.0001),
    ),
    "mask": Study(
        "the gradual mask and diagonal dominance, on and off",
        "`affine.gradual`: whether the mask opens epoch by epoch, or is full from the start; `affine.dominance`: "
        "whether the matrices are kept diagonally dominant (`project`) or not (`off`). A margin below 0 is a matrix "
        "that is not.",
        {
            f"{mask}, {dominance}": Variant(
                # In quotes, because a bare `off` is false in YAML.
                (f"affine.gradual={gradual}", f"affine.dominance='{dominance}'")
            )
            for mask, gradual in (("gradual", "true"), ("full", "false"))
            for dominance in ("project", "off")
        },
    ),
    "epochs": Study(
        "passes over the calibration windows",
        "`affine.epochs`; 0 is the start alone, in closed form.",
        varying("affine.epochs", 0, 1, 2, 5, 10, 20, 40),
    ),
    "samples": Study(
        "calibration windows",
        "`--samples`, the first so many windows of the calibration file. The epochs are the same, so that twice the "
        "windows are twice the steps.",
        {str(count): Variant(samples=count) for count in (8, 16, 32, 64, 128)},
    ),
    "seed": Study(
        "the seed: what of a difference is chance",
        "`--seed`: the order of the windows. A difference in another study that is no larger than between these rows "
        "is none.",
        varying("seed", 0, 1, 2, 3, 4),
    ),
}


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    try:
        options.run(options)
    except BitfoldError as error:
        raise SystemExit(str(error)) from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(**examples(__doc__))
    parsers = parser.add_subparsers(metavar="STUDY", required=True, dest="study")
    for name, study in STUDIES.items():
        _add_study(parsers.add_parser(name, help=study.summary, description=study.summary), name)
    summary = "cost of a step against a block's width"
    growth = parsers.add_parser("growth", help=summary, description=summary)
    add_growth_arguments(growth)
    growth.set_defaults(run=run_growth)
    return parser.parse_args()


def _add_study(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("model", type=Path, help="directory of the original checkpoint")
    add_measuring_arguments(parser)
    add("--scheme", default="w4a4", help="NOTATION[:key=value,…] as in --set")
    add("--method", default="affine", help="METHOD[:key=value,…] that has an affine part")
    add("--samples", type=int, default=128, help="calibration windows")
    add("--set", nargs="+", action="extend", default=[], metavar="key=value", help="in all runs")
    add("--only", nargs="+", choices=list(STUDIES[name].variants), help="only these runs")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/studies.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, help=f"without suffix; default docs/results/{name}-MODEL")
    parser.set_defaults(run=run_study)


# -- a study -----------------------------------------------------------------------------------------


def run_study(options: argparse.Namespace) -> None:
    from bitfold.models.checkpoint import Checkpoint

    study, name = STUDIES[options.study], options.model.resolve().name
    finished, measure = Rows(options.rows, IDENTITY), measure_of(options.model, options)
    of = {"model": name, "checkpoint": Checkpoint(options.model).fingerprint()}
    of_original = of | {"recipe": None, "settings": settings_of(options)}

    def original() -> Row:
        return {"texts": measure(options.model, compare=False)}

    base = finished.get(of_original, original, f"{name} original")
    rows: dict[str, Row] = {}
    for variant in options.only or study.variants:
        wanted = study.variants[variant]
        asked = Asked.parse(options.method, options.scheme, *options.set, *wanted.set)
        samples = wanted.samples or options.samples
        settings = settings_of(options) | {"samples": samples}
        make = partial(measured, measure, asked, samples, options.calibration)
        of_run = of | {"recipe": asked.recipe(), "settings": settings}
        rows[variant] = finished.get(of_run, make, f"{name} {options.study} {variant}")
    content = {"command": command_line(), "study": options.study, "original": base, "rows": rows}
    out = options.out or Path("docs/results") / f"{options.study}-{name}"
    write_results(out, content, study_page(content, study, name, options))
    show_table([options.study, *SHOWN], cells(rows, SHOWN))
    for variant, row in rows.items():
        for what in happened(row):
            print(f"{options.study} {variant}: {what}")


def measured(measure: Measure, asked: Asked, samples: int, calibration: Path) -> Row:
    """A run's row; where what it found was no equivalence, or not finite, that is the row."""
    try:
        return quantize_and_measure(measure, asked, calibration, samples, what_was_found)
    except Failed as failure:
        if failure.kind not in FINDINGS:
            raise
        return {"failed": failure.sentence}


def what_was_found(artifact: Path) -> Row:
    """The figures of the descents, block by block, and the errors of folding."""
    report = json.loads((artifact / "report.json").read_text())
    fits = [
        {"block": index, "best_epoch": None, "notes": [], "sites": []} | fit
        for index, block in enumerate(report["fits"])
        for fit in block
    ]
    return {"folding_errors": report["folding_errors"], "fits": fits}


# -- its table ---------------------------------------------------------------------------------------

COLUMNS = (
    "loss",
    "best epochs",
    "condition v→o",
    "condition, all",
    "margin",
    "merge error",
    "ppl",
    "KL",
    "± KL",
    "top-1",
    "s",
    "CPU s",
    "peak MB",
    "what happened",
)
# What fits a terminal of 80 columns; what happened stands below.
SHOWN = ("loss", "condition v→o", "margin", "merge error", "ppl", "KL", "CPU s", "peak MB")


def cells(rows: Mapping[str, Row], columns: Sequence[str]) -> list[list[str]]:
    found = {name: figures(row) for name, row in rows.items()}
    return [[name, *(row.get(column, "–") for column in columns)] for name, row in found.items()]


def figures(row: Row) -> dict[str, str]:
    """A run's cells by column; one that ended without an artifact has few."""
    told = {"what happened": "; ".join(happened(row))}
    if "failed" in row:
        return told
    fits = row["fits"]
    sites = [site for fit in fits for site in fit["sites"]]
    matrices = [site for site in sites if "margin" in site]
    best = ["–" if fit["best_epoch"] is None else str(fit["best_epoch"]) for fit in fits]
    told |= {
        "loss": f"{mean(fit['best'] / fit['start'] for fit in fits):.4f}" if fits else "–",
        "best epochs": " ".join(best),
        "condition v→o": largest(matrices, "condition"),
        "condition, all": largest(sites, "condition"),
        "margin": f"{min(site['margin'] for site in matrices):.3f}" if matrices else "–",
        "merge error": f"{max(row['folding_errors']):.1e}",
        "s": f"{row['seconds']:.0f}",
        "CPU s": f"{row['process_cpu_seconds']:.0f}",
        "peak MB": f"{row['peak_rss_mb']:.0f}",
    }
    return told | quality(next(iter(row["texts"].values())))


def quality(text: Row) -> dict[str, str]:
    if text["perplexity"] is None or text["kl_mean"] is None:
        return {"ppl": "not finite", "KL": "not finite"}
    return {
        "ppl": f"{text['perplexity']:.3f}",
        "KL": f"{text['kl_mean']:.5f}",
        "± KL": f"{text['kl_se'] or 0:.5f}",
        "top-1": f"{text['top1_agreement']:.1%}",
    }


def largest(sites: list[Row], key: str) -> str:
    return f"{max(site[key] for site in sites):.3g}" if sites else "–"


def happened(row: Row) -> list[str]:
    """What a person should know of a run beside its figures: all that was not a plain descent to the last epoch."""
    if "failed" in row:
        return [row["failed"]]
    found = {
        "loss or gradient not finite, went back to the best state": [
            fit for fit in row["fits"] if fit["notes"]
        ],
        "loss above the start's": [
            fit for fit in row["fits"] if not all(loss <= fit["start"] for loss in fit["losses"])
        ],
        "left as it was": [
            fit for fit in row["fits"] if fit["losses"] and fit["best_epoch"] is None
        ],
        "an earlier epoch was the best": [
            fit for fit in row["fits"] if (fit["best_epoch"] or 10**9) < len(fit["losses"])
        ],
    }
    return [
        f"{what} (block {', '.join(str(fit['block']) for fit in fits)})"
        for what, fits in found.items()
        if fits
    ]


def study_page(content: Row, study: Study, name: str, options: argparse.Namespace) -> str:
    rows = content["rows"]
    original = next(iter(content["original"]["texts"].values()))
    extent = "all" if options.windows is None else "the first"
    lines = [
        f"# {options.study} on {name}",
        "",
        f"Written by `{content['command']}`.",
        "",
        provenance(rows.values()),
        "",
        study.about,
        "",
        f"Method {options.method}, scheme {options.scheme}"
        f"{', ' + ' '.join(options.set) if options.set else ''}. Calibration: `{options.calibration.name}`"
        f"{'' if options.study == 'samples' else f', {options.samples} samples'}. Evaluation on `{options.text.name}` "
        f"in float32, {extent} {original['windows']} windows of {options.length} tokens, each alone; the original's "
        f"perplexity is {original['perplexity']:.3f}.",
        "",
        "loss: of the best state ÷ of the start, mean over blocks; best epochs: block by block, – where nothing was "
        "better than the start; condition: the largest of any site, v→o being the matrices per head; margin: the least "
        "of their relative diagonal dominance; merge error: relative change of a block's output by folding alone, the "
        "largest; KL: to the original, mean in nats per token; ±: its standard error over windows; s: of `bitfold "
        "quantize` on the clock; CPU s: with the interpreter's start (about 4 s); peak MB: of that process.",
        "",
        *markdown_table([options.study, *COLUMNS], cells(rows, COLUMNS)),
        *notes(rows),
    ]
    return "\n".join(lines) + "\n"


def notes(rows: Mapping[str, Row]) -> list[str]:
    """What the reports say, each sentence once with how often it was said."""
    lines = []
    for name, row in rows.items():
        said = Counter(
            f"block {fit['block']}: {note}" for fit in row.get("fits", []) for note in fit["notes"]
        )
        lines += [f"- {name}, {note} ({count} ×)" for note, count in said.items()]
    return ["", "## Notes of the runs", "", *lines] if lines else []


if __name__ == "__main__":
    main()
