"""What each method is worth: quantize checkpoints by several methods and schemes, and measure every result.

    python benchmarks/methods.py --model DIR ... --calibration FILE --text heldout=FILE wikitext2=FILE \\
        --scheme w8a8 w8a8:activation.static=true w4a16g128 --method rtn awq awq:awq.steps=10 \\
        --windows wikitext2=400 --reference reference.json --out docs/results/methods

Every artifact is made by `bitfold quantize --json` in a process of its own, so that its time and peak memory are its
own, and measured by `bitfold.evaluate` against the original. A finished row is appended to the rows file at once: the
same command goes on where it was stopped. At the end a Markdown table and a JSON file are written.
"""

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from children import fix_environment
from measuring import (
    Asked,
    Measure,
    Row,
    Rows,
    command_line,
    provenance,
    quantize_and_measure,
    write_results,
)

ORIGINAL = "original"
# What a row is of.
IDENTITY = ("model", "scheme", "method", "settings")


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    texts = dict(named(item) for item in options.text)
    windows = {name: int(count) for name, count in map(named, options.windows)}
    if unknown := windows.keys() - texts.keys():
        raise SystemExit(f"--windows names {', '.join(unknown)}, which --text does not")
    settings = {
        "texts": {name: Path(file).name for name, file in texts.items()},
        "windows": windows,
        "length": options.length,
        "samples": options.samples,
        "calibration": options.calibration.name,
    }
    finished = Rows(options.rows, IDENTITY)
    wanted = [(ORIGINAL, ORIGINAL)]
    wanted += [(scheme, method) for scheme in options.scheme for method in options.method]
    rows = []
    for model in options.model:
        measure = Measure(model, texts, windows, options.length)
        for scheme, method in wanted:
            of = {"model": model.name, "scheme": scheme, "method": method, "settings": settings}
            make = partial(measured, measure, scheme, method, options)
            row = finished.find(of)
            if row is None and not options.finished:
                row = finished.get(of, make, f"{model.name} {scheme} {method}")
            rows += [] if row is None else [row]
    reference = json.loads(options.reference.read_text())["rows"] if options.reference else []
    command = command_line()
    content = {"command": command, "rows": rows}
    write_results(options.out, content, page(rows, reference, options, command))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, nargs="+", required=True, help="directories of original checkpoints")
    add("--calibration", type=Path, required=True)
    add("--samples", type=int, default=128)
    add("--text", nargs="+", required=True, metavar="NAME=FILE")
    add("--windows", nargs="*", default=[], metavar="NAME=N", help="only a text's first N windows")
    add("--length", type=int, default=256, help="tokens of an evaluation window")
    add("--scheme", nargs="+", required=True, help="NOTATION[:key=value,…] as in --set")
    add("--method", nargs="+", required=True, help="METHOD[:key=value,…] as in --set")
    add("--reference", type=Path, help="JSON of other tools' rows: {how, rows}")
    add("--reference-text", help="the text that the reference was measured on; default: the first")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/methods.jsonl"), help="finished rows")
    add("--finished", action="store_true", help="make nothing: the page of the finished rows")
    add("--out", type=Path, default=Path("docs/results/methods"), help="without suffix")
    options = parser.parse_args()
    options.reference_text = options.reference_text or named(options.text[0])[0]
    return options


def named(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise SystemExit(f"'{item}' is not NAME=VALUE")
    return name, value


# -- measuring ---------------------------------------------------------------------------------------


def measured(measure: Measure, scheme: str, method: str, options: argparse.Namespace) -> Row:
    if scheme == ORIGINAL:
        texts = measure(measure.path, compare=False)
        return {"bits_per_weight": None, "size_bytes": weigh(measure.path), "texts": texts}
    asked = Asked.parse(method, scheme)
    return quantize_and_measure(measure, asked, options.calibration, options.samples)


def weigh(model: Path) -> int:
    return sum(file.stat().st_size for file in model.iterdir() if file.is_file())


# -- the page ----------------------------------------------------------------------------------------


def page(rows: list[Row], reference: list[Row], options: argparse.Namespace, command: str) -> str:
    models = [model.name for model in options.model]
    lines = [
        "# Methods",
        "",
        f"Written by `{command}`"
        + (
            "; without `--finished` it makes the rows that are missing."
            if options.finished
            else "."
        ),
        "",
        provenance(rows),
        "",
        *explanation(rows, options),
    ]
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        theirs = [row for row in reference if row["model"] == model]
        lines += ["", f"## {model}", "", *model_table(mine, theirs, options)]
    if reference:
        lines += ["", "## The same method in other tools", ""]
        lines += comparison(rows, reference, options)
    return "\n".join(lines) + "\n"


def explanation(rows: list[Row], options: argparse.Namespace) -> Iterable[str]:
    yield (
        f"Calibration: `{options.calibration.name}`, {options.samples} samples. Evaluation in float32, windows of "
        f"{options.length} tokens, each alone:"
    )
    yield ""
    for name, figures in rows[0]["texts"].items():
        limited = any(item.startswith(f"{name}=") for item in options.windows)
        extent = "the first" if limited else "all"
        yield f"- {name}: {extent} {figures['windows']} windows, {figures['tokens']:,} predicted tokens."
    yield ""
    yield (
        "bits: per quantized weight, scales and zero-points counted; size: MB of the whole artifact, embeddings, "
        "tokenizer and `bitfold verify`'s probe included; runs: what is not folded, operations a token in share of the "
        "linear layers' multiply-adds; ppl: perplexity, and its ratio to the original's; KL: to the "
        "original, mean in nats per token ± standard error over windows; ÷ rtn: KL over that of rtn; top-1: how often "
        "the likeliest token is the original's; s: seconds of `bitfold quantize` on the clock, without Python's start; "
        "CPU s: on the processor, the start (about 4 s) included; MB: its peak resident memory."
    )
    if options.reference:
        yield (
            f"Rows in *italics* are other tools' from `{options.reference.name}`, measured on every 4th window of "
            f"text of the same mixture as {options.reference_text}; figures differ by about 3% between such texts."
        )


def model_table(rows: list[Row], reference: list[Row], options: argparse.Namespace) -> list[str]:
    original, *others = rows
    texts = list(original["texts"])
    header = ["scheme", "method", "bits", "size", "runs"]
    for name in texts:
        header += [f"{name} ppl", "ratio", "KL", "÷ rtn", "top-1"]
    header += ["s", "CPU s", "MB"]
    cells = [["–", ORIGINAL, "16", megabytes(original["size_bytes"]), ""]]
    for name in texts:
        cells[0] += [f"{original['texts'][name]['perplexity']:.3f}", "1", "0", "", ""]
    cells[0] += ["", "", ""]
    for place, scheme in enumerate(options.scheme):
        group = [row for row in others if row["scheme"] == scheme]
        later = options.scheme[
            place + 1 :
        ]  # where several of ours stand beside a row of theirs, the last does
        floor = next((row for row in group if row["method"] == "rtn"), None)
        cells += [row_cells(row, original, floor, texts) for row in group]
        theirs = [
            row
            for row in reference
            if compares(row, scheme) and not any(compares(row, other) for other in later)
        ]
        cells += [reference_cells(row, texts, options) for row in theirs]
    if not any(line[header.index("runs")] for line in cells):
        lines = [header, *cells]
        header, *cells = [line[:4] + line[5:] for line in lines]
    align = [":--", ":--"] + ["--:"] * (len(header) - 2)
    return [f"| {' | '.join(line)} |" for line in [header, align, *cells]]


def row_cells(row: Row, original: Row, floor: Row | None, texts: list[str]) -> list[str]:
    cells = [row["scheme"].replace(":", " "), row["method"].replace(":", " ")]
    cells += [f"{row['bits_per_weight']:.3f}", megabytes(row["size_bytes"])]
    cells.append(f"{row['online']['share']:.1%}" if row.get("online") else "")
    for name in texts:
        figures = row["texts"][name]
        if figures["perplexity"] is None or figures["kl_mean"] is None:
            cells += ["not finite", "", "", "", ""]
            continue
        ratio = figures["perplexity"] / original["texts"][name]["perplexity"]
        cells += [f"{figures['perplexity']:.3f}", f"{ratio:.4f}"]
        cells.append(f"{figures['kl_mean']:.5f} ± {figures['kl_se']:.5f}")
        cells.append(f"{figures['kl_mean'] / floor['texts'][name]['kl_mean']:.2f}" if floor else "")
        cells.append(f"{figures['top1_agreement']:.1%}")
    costs = (row["seconds"], row["process_cpu_seconds"])
    return [*cells, *(f"{seconds:.1f}" for seconds in costs), f"{row['peak_rss_mb']:.0f}"]


def compares(row: Row, scheme: str) -> bool:
    """Whether another tool's row stands beside ours of a scheme: in this notation; of activations that are rounded in
    another way too, which it says."""
    notation, _, settings = scheme.partition(":")
    return bool(row["scheme"] == notation) and (not settings or settings.startswith("activation."))


def reference_cells(row: Row, texts: list[str], options: argparse.Namespace) -> list[str]:
    activations = f", {row['activations']} activations" if row["activations"] else ""
    cells = [row["scheme"], f"{row['tool']} {row['version']}: {row['method']}{activations}"]
    cells += ["", "", ""]
    for name in texts:
        if name != options.reference_text:
            cells += ["", "", "", "", ""]
            continue
        ratio, kl = row["perplexity_ratio"], row["kl_mean"]
        cells += ["", f"{ratio:.4f}" if ratio else "", f"{kl:.5f}" if kl else "", "", ""]
    cells += [f"{row['seconds']:.1f}" if row["seconds"] is not None else "", ""]
    cells += [f"{row['peak_rss_mb']:.0f}" if row["peak_rss_mb"] is not None else ""]
    return [f"*{cell}*" if cell else "" for cell in cells]


def comparison(rows: list[Row], reference: list[Row], options: argparse.Namespace) -> Iterable[str]:
    """Rows of the reference whose method is one of ours, by the first word of its name."""
    yield "| model | scheme | method | tool | KL theirs | KL bitfold | ratio | s theirs | s bitfold | CPU s |"
    yield "| :-- | :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |"
    for row in rows:
        for peer in reference:
            theirs = (peer["model"], peer["scheme"], peer["method"].lower().split()[0])
            if theirs != (row["model"], row["scheme"], row["method"]) or not peer["kl_mean"]:
                continue
            kl = row["texts"][options.reference_text]["kl_mean"]
            seconds = "" if peer["seconds"] is None else f"{peer['seconds']:.1f}"
            activations = f", {peer['activations']} activations" if peer["activations"] else ""
            yield (
                f"| {row['model']} | {row['scheme']} | {row['method']} | {peer['tool']} {peer['version']}{activations} "
                f"| {peer['kl_mean']:.5f} | {kl:.5f} | {kl / peer['kl_mean']:.3f} | {seconds} | {row['seconds']:.1f} "
                f"| {row['process_cpu_seconds']:.1f} |"
            )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


if __name__ == "__main__":
    main()
