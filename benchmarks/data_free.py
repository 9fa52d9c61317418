"""What calibration without data costs: real text, text of the model's own, and random tokens, by the same methods.

    python benchmarks/data_free.py --model DIR ... --calibration FILE --text FILE --method gptq awq --scheme w3a16g128

A finished row is kept: the same command goes on where it was stopped.
"""

import argparse
from functools import partial
from pathlib import Path

from children import examples, fix_environment
from measuring import (
    Asked,
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

IDENTITY = ("model", "scheme", "method", "source", "samples", "settings")


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--model", type=Path, nargs="+", required=True, help="directories of original checkpoints")
    add_measuring_arguments(parser)
    add("--samples", type=int, default=128)
    add("--scheme", default="w3a16g128")
    add("--method", nargs="+", default=["gptq"])
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/data_free.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/data_free"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    finished = Rows(options.rows, IDENTITY)
    sources = {"real text": options.calibration, "generate": "generate", "random": "random"}
    rows = []
    for model in options.model:
        measure = measure_of(model, options)
        for method in options.method:
            asked = Asked.parse(method, options.scheme)
            for name, source in sources.items():
                of = {"model": model.name, "scheme": options.scheme, "method": method}
                of |= {"source": name, "samples": options.samples, "settings": settings_of(options)}
                make = partial(quantize_and_measure, measure, asked, source, options.samples)
                rows.append(finished.get(of, make, f"{model.name} {method} {name}"))
    command = command_line()
    text = options.text.stem
    write_results(options.out, {"command": command, "rows": rows}, page(rows, text, command))
    show_table(*table(rows, text))


def table(rows: list[Row], text: str) -> tuple[list[str], list[list[str]]]:
    header = ["model", "method", "calibration", "KL", "÷ real text", "perplexity", "CPU s"]
    lines, real = [], 0.0
    for row in rows:
        figures = row["texts"][text]
        real = figures["kl_mean"] if row["source"] == "real text" else real
        cells = [row["model"], row["method"], row["source"]]
        cells += [f"{figures['kl_mean']:.4f} ± {figures['kl_se']:.4f}"]
        cells += [f"{figures['kl_mean'] / real:.2f}", f"{figures['perplexity']:.3f}"]
        lines.append([*cells, f"{row['process_cpu_seconds']:.0f}"])
    return header, lines


def page(rows: list[Row], text: str, command: str) -> str:
    figures = rows[0]["texts"][text]
    lines = [
        "# Calibration without data",
        "",
        f"Written by `{command}`.",
        "",
        provenance(rows),
        "",
        f"{rows[0]['scheme']}, {rows[0]['samples']} windows each. KL: to the original, mean in nats per token ± "
        f"standard error over {figures['windows']} windows of {text}, a text of the same mixture as the real "
        "calibration text; generate: windows that the model wrote; random: random tokens.",
        "",
        *markdown_table(*table(rows, text)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
