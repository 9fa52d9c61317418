"""Adapters on bases in few bits against full precision: a model moved from its own domain to another.

    python benchmarks/adapters.py ../shared/bench/tiny-llama \\
        --text ../shared/bench/text/wikitext2-valid.txt --evaluate ../shared/bench/text/wikitext2-test.txt \\
        --calibration ../shared/bench/calibration-128x256.npy --bitsandbytes /tmp/tiny-llama-bnb

Rows: QLoRA on an artifact, on nf4 with nested scales, on a checkpoint that bitsandbytes saved (with --bitsandbytes);
BitFit and both together on the artifact; LoRA and full fine-tuning in full precision. Every run is a process of its
own, so that its peak memory and time are its own; a finished row is kept at once, and the same command goes on where
it was stopped. Markdown and JSON go to docs/results/adapters.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bitfold import BitfoldError
from children import bitfold_json, child_json, examples, fix_environment
from measuring import (
    Row,
    Rows,
    command_line,
    markdown_table,
    provenance,
    show_table,
    write_results,
)

IDENTITY = ("name", "model", "settings")
HEADS = (
    *("what is trained", "base", "perplexity before", "after", "ratio", "trained parameters"),
    *("share", "base in memory, MB", "peak memory, MB", "seconds", "CPU seconds"),
)


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    try:
        if options.full:
            print(json.dumps(full_fine_tuning(options)))
        else:
            run(options)
    except BitfoldError as error:
        raise SystemExit(str(error)) from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("model", type=Path, help="directory of the original checkpoint")
    add("--text", type=Path, required=True, help="to train on")
    add("--evaluate", type=Path, required=True, help="perplexity on it, before and after")
    add("--calibration", type=Path, help="of the artifact; default: the embedded text")
    add("--method", default="awq", help="of the artifact")
    add("--scheme", default="w4a16g128", help="of the artifact")
    add("--artifact", type=Path, help="one that is there already, in place of making it")
    add("--bitsandbytes", type=Path, help="the model as bitsandbytes saved it, nf4")
    add("--steps", type=int, help="default: that of bitfold train")
    add("--sequence-length", type=int, help="default: that of bitfold train")
    add("--windows", type=int, default=128, help="of the evaluation text")
    add("--full-rate", type=float, default=1e-3, help="of full fine-tuning")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/adapters.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/adapters"), help="without suffix")
    add("--full", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    rows = Rows(options.rows, IDENTITY)
    settings = {
        "text": str(options.text),
        "evaluate": str(options.evaluate),
        "windows": options.windows,
        "steps": options.steps,
        "length": options.sequence_length,
        "full_rate": options.full_rate,
    }
    with tempfile.TemporaryDirectory() as place:
        artifact = options.artifact or Path(place) / "artifact"
        said = artifact_name(options)
        plans: list[tuple[str, str, Path, list[str]]] = [
            ("QLoRA", said, artifact, ["qlora"]),
            ("QLoRA", "nf4, nested scales", options.model, ["qlora"]),
            ("BitFit", said, artifact, ["bitfit"]),
            ("QLoRA + BitFit", said, artifact, ["qlora", "--bitfit"]),
            ("LoRA", "full precision", options.model, ["qlora", "--scheme", "w16a16"]),
        ]
        if options.bitsandbytes:
            name = "nf4 of bitsandbytes"
            plans.insert(2, ("QLoRA", name, options.bitsandbytes, ["qlora"]))
        found = []
        for what, base, path, command in plans:
            of = {"name": [what, base], "model": str(options.model), "settings": settings}

            def make(path: Path = path, command: list[str] = command) -> Row:
                if path == artifact and not path.exists():
                    make_artifact(options, path)
                arguments = [*command, path, *common(options), "-o", Path(place) / "out"]
                return bitfold_json("train", *arguments, "--overwrite")

            found.append(rows.get(of, make, f"{what} on {base}"))
        of = {
            "name": ["full fine-tuning", "full precision"],
            "model": str(options.model),
            "settings": settings,
        }
        found.append(rows.get(of, lambda: child_json(*sys.argv, "--full"), "full fine-tuning"))
    table = [cells(row) for row in found]
    show_table(HEADS, table)
    content = {"command": command_line(), "rows": found}
    write_results(options.out, content, page(options, found, table))


def artifact_name(options: argparse.Namespace) -> str:
    if options.artifact:
        return str(options.artifact.name)
    return f"{options.scheme} by {options.method}"


def make_artifact(options: argparse.Namespace, out: Path) -> None:
    given = [] if options.calibration is None else ["--calibration", options.calibration]
    asked = ["--method", options.method, "--scheme", options.scheme]
    bitfold_json("quantize", options.model, "-o", out, *asked, *given)


def common(options: argparse.Namespace) -> list[str | Path]:
    given: list[str | Path] = ["--text", options.text, "--evaluate", options.evaluate]
    given += ["--evaluate-windows", str(options.windows)]
    if options.steps is not None:
        given += ["--steps", str(options.steps)]
    if options.sequence_length is not None:
        given += ["--sequence-length", str(options.sequence_length)]
    return given


def full_fine_tuning(options: argparse.Namespace) -> Row:
    """All parameters, by the loop that adapters are trained by, with the same windows."""
    import torch

    import bitfold
    from bitfold.data import default_sequence_length
    from bitfold.evaluate.memory import peak_rss_mb
    from bitfold.runtime.device import quick_float32
    from bitfold.training.adapters import AdapterOptions
    from bitfold.training.loop import Loop
    from bitfold.training.losses import next_token_loss
    from bitfold.training.text import held_back, text_windows

    asked = {"rate": options.full_rate, "sequence_length": options.sequence_length}
    asked |= {} if options.steps is None else {"steps": options.steps}
    settings = AdapterOptions(**asked)
    model, tokenizer = bitfold.load(options.model), bitfold.load_tokenizer(options.model)
    length = settings.length(default_sequence_length(model.config))
    size = model.config.vocab_size
    rows, check = held_back(text_windows(options.text, tokenizer, length, size), 0.05, 0)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)

    def judge() -> float:
        parts = check.split(settings.batch)
        return sum(float(loss(ids)) * len(ids) for ids in parts) / len(check)

    def perplexity() -> float | None:
        texts = {"text": options.evaluate}
        more = {"sequence_length": length, "windows": options.windows}
        found = bitfold.evaluate(model, texts, tokenizer=tokenizer, **more)
        return found.texts["text"].perplexity

    before = perplexity()
    parameters = dict(model.named_parameters())
    width = model.config.hidden_size
    with quick_float32():
        result = Loop(model, parameters, loss, rows, settings.loop(width), check=judge).run()
    peak = peak_rss_mb()
    count = sum(parameter.numel() for parameter in parameters.values())
    return {
        "trained": count,
        "share": 1.0,
        "perplexity_before": before,
        "perplexity_after": perplexity(),
        "base_bytes": 0,
        "peak_rss_mb": peak,
        "seconds": result.seconds,
        "steps": len(result.losses),
        "notes": list(result.notes),
    }


def cells(row: Row) -> list[str]:
    before, after = row["perplexity_before"], row["perplexity_after"]
    packed = f"{row['base_bytes'] / 1e6:.1f}" if row["base_bytes"] else "-"
    return [
        *row["name"],
        f"{before:.2f}",
        f"{after:.2f}",
        f"{after / before:.3f}",
        f"{row['trained']:,}",
        f"{row['share']:.2%}",
        packed,
        f"{row['peak_rss_mb']:.0f}",
        f"{row['seconds']:.0f}",
        f"{row['process_cpu_seconds']:.0f}",
    ]


def page(options: argparse.Namespace, rows: list[Row], table: list[list[str]]) -> str:
    lines = [
        "# Adapters on a base in few bits",
        "",
        f"{options.model.name} trained on {options.text.name}, {rows[0]['steps']} steps, evaluated on the first "
        f"{options.windows} windows of {options.evaluate.name}. Peak memory is of the whole process up to the end of "
        "training, PyTorch's 300 to 400 MB included; seconds are of training alone, CPU seconds of the whole process, "
        "the two evaluations included.",
        "",
        *markdown_table(HEADS, table),
        "",
        f"Made by `{command_line()}`. {provenance(rows)}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
