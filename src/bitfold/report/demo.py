"""The demo: the whole job on the embedded model, in about a minute."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT
from bitfold.errors import BitfoldError
from bitfold.evaluate.generation import generate
from bitfold.evaluate.perplexity import evaluate
from bitfold.report import terminal

__all__ = ["print_demo", "run_demo"]

RUNS = (("rtn", "w4a16g128"), ("awq", "w4a16g128"), ("rtn", "w3a16g128"), ("awq", "w3a16g128"))
PROMPT = "The history of the city"
LENGTH = 256


def run_demo(out: Path, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Quantize the embedded model by several methods into `out`; a row of figures for the original and for each.

    Each run is a process of its own, so that its peak memory is its own.
    """
    steps = 2 * len(RUNS) + 1
    progress(0, steps, "the original")
    rows = [_measure(DEMO_MODEL, "original", "bf16") | {"bits_per_weight": 16.0, "seconds": None}]
    rows[0] |= {"peak_rss_mb": None, "size_bytes": _size(DEMO_MODEL)}
    for number, (method, scheme) in enumerate(RUNS):
        progress(2 * number + 1, steps, f"{method} {scheme}")
        path = out / f"{method}-{scheme}"
        made = _quantize(path, method, scheme)
        progress(2 * number + 2, steps, f"measuring {method} {scheme}")
        costs = {
            key: made[key] for key in ("bits_per_weight", "size_bytes", "seconds", "peak_rss_mb")
        }
        rows.append(_measure(path, method, scheme) | costs | {"out": str(path)})
    return rows


def print_demo(rows: list[dict[str, Any]]) -> None:
    """The table, a sentence from each model, and what to try next."""
    console = terminal.console()
    columns = ["method", "bits/w", "size", "ppl", "KL", "top-1", "time", "memory"]
    cells = [
        [
            f"{row['method']} {row['scheme']}",
            f"{row['bits_per_weight']:.2f}",
            terminal.human_bytes(row["size_bytes"]),
            f"{row['perplexity']:.1f}",
            f"{row['kl_mean']:.4f}",
            f"{row['top1_agreement']:.1%}",
            "–" if row["seconds"] is None else terminal.human_seconds(row["seconds"]),
            "–" if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:.0f} MB",
        ]
        for row in rows
    ]
    title = f"tiny-llama (embedded, 5.8M parameters) on {rows[0]['tokens']:,} tokens of WikiText-2, {LENGTH} a window"
    console.print(terminal.table(columns, cells, title=title))
    console.print(
        "Bits per weight count scales and zero-points; KL is to the original, in nats per token.\n"
    )
    console.print(f"[bold]{PROMPT} …[/]")
    for row in rows:
        sentence = " ".join(row["sentence"].split())
        console.print(f"  [dim]{row['method']} {row['scheme']}:[/] {sentence}")
    console.print("\n[bold]Try next[/]")
    console.print("  bitfold quantize PATH/TO/MODEL -o OUT --scheme w4a16g128")
    console.print(f"  bitfold inspect {rows[-1]['out']}")
    console.print(f"  bitfold verify {rows[-1]['out']}")
    console.print("  bitfold recipes")


def _quantize(path: Path, method: str, scheme: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitfold", "quantize", str(DEMO_MODEL), "-o", str(path)]
    command += [
        "--method",
        method,
        "--scheme",
        scheme,
        "--samples",
        "64",
        "--sequence-length",
        str(LENGTH),
    ]
    done = subprocess.run(
        [*command, "--overwrite", "--json"], capture_output=True, text=True, check=False
    )
    try:
        made: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise BitfoldError(f"`{' '.join(command)}` failed: run it to see why.") from error
    if "error" in made:
        raise BitfoldError(made["error"])
    return made


def _measure(path: Path, method: str, scheme: str) -> dict[str, Any]:
    figures = evaluate(path, EVALUATION_TEXT, sequence_length=LENGTH, against=DEMO_MODEL).to_json()
    sentence = generate(path, PROMPT, max_new_tokens=24).text
    return {"method": method, "scheme": scheme, "sentence": sentence} | figures


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
