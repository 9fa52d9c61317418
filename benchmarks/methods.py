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
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import bitfold_json, fix_environment, machine, source_version

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Row = dict[str, Any]
ORIGINAL = "original"


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
    rows = [row for row in read_rows(options.rows) if row["settings"] == settings]
    for model in options.model:
        wanted = [(ORIGINAL, ORIGINAL)]
        wanted += [(scheme, method) for scheme in options.scheme for method in options.method]
        done = {(row["scheme"], row["method"]) for row in rows if row["model"] == model.name}
        missing = [pair for pair in wanted if pair not in done]
        if missing:
            measure = Measure(model, texts, windows, options.length)
        for scheme, method in missing:
            start = time.perf_counter()
            row = {"model": model.name, "scheme": scheme, "method": method, "settings": settings}
            row |= {"bitfold": source_version(), "machine": machine()}
            if scheme == ORIGINAL:
                row |= {"bits_per_weight": None, "size_bytes": weigh(model)}
                row |= {"texts": measure(model, compare=False)}
            else:
                row |= quantize_and_measure(model, scheme, method, options, measure)
            rows.append(row)
            append_row(options.rows, row)
            seconds = time.perf_counter() - start
            print(f"{model.name} {scheme} {method}: {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = in_order(rows, options)
    reference = json.loads(options.reference.read_text())["rows"] if options.reference else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + shlex.join(sys.argv)
    content = {"command": command, "rows": rows}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(rows, reference, options, command))


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
    add("--out", type=Path, default=Path("docs/results/methods"), help="without suffix")
    options = parser.parse_args()
    options.reference_text = options.reference_text or named(options.text[0])[0]
    return options


def named(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise SystemExit(f"'{item}' is not NAME=VALUE")
    return name, value


def spec(text: str) -> tuple[str, list[str]]:
    """`awq:awq.steps=10,awq.weight_aware=false` as a name and its `--set` arguments."""
    name, _, items = text.partition(":")
    return name, [part for item in items.split(",") if item for part in ("--set", item)]


# -- measuring ---------------------------------------------------------------------------------------


class Measure:
    """Evaluates models on the texts against an original that is loaded once."""

    def __init__(
        self, original: Path, texts: Mapping[str, str], windows: Mapping[str, int], length: int
    ) -> None:
        import bitfold

        self.texts, self.windows, self.length = texts, windows, length
        self.original = remembering(bitfold.load(original))

    def __call__(self, model: Path, *, compare: bool) -> dict[str, Any]:
        """The figures of every text, by its name."""
        import bitfold

        return {
            name: bitfold.evaluate(
                model,
                file,
                sequence_length=self.length,
                windows=self.windows.get(name),
                against=self.original if compare else None,
            ).to_json()
            for name, file in self.texts.items()
        }


def remembering(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model, which keeps the logits of every batch it is given: it is asked for the same ones row after row."""
    compute, known = model.forward, {}

    def forward(input_ids: "Tensor", **options: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in known:
            known[key] = compute(input_ids=input_ids, **options)
        return known[key]

    model.forward = forward
    return model


def quantize_and_measure(
    model: Path, scheme: str, method: str, options: argparse.Namespace, measure: Measure
) -> Row:
    notation, scheme_settings = spec(scheme)
    name, method_settings = spec(method)
    with tempfile.TemporaryDirectory(prefix="bitfold-methods-") as directory:
        out = Path(directory) / "artifact"
        arguments: list[str | Path] = [
            "quantize",
            model,
            "-o",
            out,
            "--method",
            name,
            "--scheme",
            notation,
        ]
        arguments += [*scheme_settings, *method_settings, "--calibration", options.calibration]
        arguments += ["--samples", str(options.samples)]
        made = bitfold_json(*arguments)
        kept = (
            "bits_per_weight",
            "size_bytes",
            "seconds",
            "process_seconds",
            "process_cpu_seconds",
        )
        row = {key: made[key] for key in (*kept, "peak_rss_mb", "format", "notes")}
        row["texts"] = measure(out, compare=True)
        shutil.rmtree(out)
    return row


def weigh(model: Path) -> int:
    return sum(file.stat().st_size for file in model.iterdir() if file.is_file())


def read_rows(file: Path) -> list[Row]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def append_row(file: Path, row: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def in_order(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """The rows that were asked for, in the order in which they were asked for."""
    order = [(model.name, ORIGINAL, ORIGINAL) for model in options.model]
    order += [
        (model.name, scheme, method)
        for model in options.model
        for scheme in options.scheme
        for method in options.method
    ]
    by_key = {(row["model"], row["scheme"], row["method"]): row for row in rows}
    return [by_key[key] for key in order]


# -- the page ----------------------------------------------------------------------------------------


def page(rows: list[Row], reference: list[Row], options: argparse.Namespace, command: str) -> str:
    models = [model.name for model in options.model]
    used = sorted({row["bitfold"] for row in rows})
    where = sorted({row["machine"] for row in rows})
    lines = [
        "# Methods",
        "",
        f"Written by `{command}`.",
        "",
        f"bitfold {', '.join(used)}; {'; '.join(where)}.",
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
        "tokenizer and `bitfold verify`'s probe included; ppl: perplexity, and its ratio to the original's; KL: to the "
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
    header = ["scheme", "method", "bits", "size"]
    for name in texts:
        header += [f"{name} ppl", "ratio", "KL", "÷ rtn", "top-1"]
    header += ["s", "CPU s", "MB"]
    cells = [["–", ORIGINAL, "16", megabytes(original["size_bytes"])]]
    for name in texts:
        cells[0] += [f"{original['texts'][name]['perplexity']:.3f}", "1", "0", "", ""]
    cells[0] += ["", "", ""]
    for scheme in options.scheme:
        group = [row for row in others if row["scheme"] == scheme]
        floor = next((row for row in group if row["method"] == "rtn"), None)
        cells += [row_cells(row, original, floor, texts) for row in group]
        cells += [
            reference_cells(row, texts, options) for row in reference if row["scheme"] == scheme
        ]
    align = [":--", ":--"] + ["--:"] * (len(header) - 2)
    return [f"| {' | '.join(line)} |" for line in [header, align, *cells]]


def row_cells(row: Row, original: Row, floor: Row | None, texts: list[str]) -> list[str]:
    cells = [row["scheme"].replace(":", " "), row["method"].replace(":", " ")]
    cells += [f"{row['bits_per_weight']:.3f}", megabytes(row["size_bytes"])]
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


def reference_cells(row: Row, texts: list[str], options: argparse.Namespace) -> list[str]:
    activations = f", {row['activations']} activations" if row["activations"] else ""
    cells = [row["scheme"], f"{row['tool']} {row['version']}: {row['method']}{activations}"]
    cells += ["", ""]
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
