"""What comes out in each engine, beside what the engine's own quantizer makes of the same bits.

    python benchmarks/exports.py --model DIR ... --calibration FILE --text FILE --windows 20

A row is a file in its engine: size, perplexity there and in PyTorch, how far the logits are from the simulation, KL to
the original, tokens a second by CPU time on one thread, memory. bitfold's are by --method, quantized `--for` the
engine; the engine's own have the same tensors quantized, in the same types. ONNX Runtime's quantizer wants the package
onnx-ir. A finished row is kept: the same command goes on where it was stopped.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from children import bitfold_json, child_json, examples, fix_environment
from measuring import (
    Row,
    Rows,
    add_measuring_arguments,
    command_line,
    markdown_table,
    provenance,
    settings_of,
    show_table,
    write_results,
)

IDENTITY = ("engine", "model", "by", "scheme", "settings")
SYMMETRIC = "weight.symmetric=true"
# Engine: schemes that it holds in the fewest bits, and the types of its own quantizer in as many.
GGUF = {
    "w2a16g256": ("Q2_K",),
    f"w3a16g16:{SYMMETRIC}": ("Q3_K",),
    f"w4a16g32:{SYMMETRIC}": ("Q4_0", "Q4_K"),
    f"w5a16g32:{SYMMETRIC}": ("Q5_0", "Q5_K"),
    f"w6a16g16:{SYMMETRIC}": ("Q6_K",),
    f"w8a16g32:{SYMMETRIC}": ("Q8_0",),
}
ONNX = {"w4a16g32": ("rtn 4", "k_quant 4"), "w8a16g32": ("rtn 8",), f"w8a8:{SYMMETRIC}": ()}
SCHEMES: dict[str, dict[str, tuple[str, ...]]] = {"gguf": GGUF, "onnx": ONNX}
NAMES = {"gguf": "llama.cpp", "onnx": "ONNX Runtime"}
PROMPT, NEW, TURNS = 256, 64, 5


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--model", type=Path, nargs="+", required=True, help="directories of original checkpoints")
    add_measuring_arguments(parser)
    add("--engine", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    add("--method", default="auto")
    add("--rows", type=Path, default=Path("out/benchmarks/exports.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/exports"), help="without suffix")
    options = parser.parse_args()
    fix_environment(1)
    finished = Rows(options.rows, IDENTITY)
    rows: list[Row] = []
    for model in options.model:
        known = json.loads((model / "config.json").read_text())["model_type"]
        for engine in options.engine:
            if engine == "gguf" and known == "opt":
                continue  # llama.cpp has no OPT
            rows += _rows_of(model, engine, options, finished)
    content = {"command": command_line(), "rows": rows}
    write_results(options.out, content, _page(rows))
    show_table(HEAD, _table(rows))


def _rows_of(model: Path, engine: str, options: argparse.Namespace, finished: Rows) -> list[Row]:
    """The original, and every scheme by bitfold and by the engine."""

    def row(by: str, scheme: str, make: Callable[[Path], tuple[Path, Path, Row]]) -> Row:
        def measured() -> Row:
            with tempfile.TemporaryDirectory(prefix="bitfold-exports-") as directory:
                made, artifact, more = make(Path(directory))
                figures = child_json(
                    __file__, "figures", engine, made, artifact, model, options.text,
                    str(options.windows),
                )  # fmt: skip
                return more | figures | child_json(__file__, "speed", engine, made)

        of = {"engine": engine, "model": model.name, "by": by, "scheme": scheme}
        return finished.get(of | {"settings": settings_of(options)}, measured, f"{of}")

    rows = [row("", "original", lambda directory: (*_plain(model, engine, directory), {}))]
    for scheme, types in SCHEMES[engine].items():
        rows.append(row("bitfold", scheme, partial(_ours, model, engine, scheme, options)))
        for type_ in types:
            for with_data in (False, True) if engine == "gguf" else (False,):
                name = f"{type_}, with importances" if with_data else type_
                make = partial(_own, model, engine, type_, with_data, options)
                rows.append(row(NAMES[engine], name, make))
    return rows


# -- what is made ------------------------------------------------------------------------------------


def _plain(model: Path, engine: str, directory: Path) -> tuple[Path, Path]:
    out = directory / "plain"
    bitfold_json("export", model, "--to", engine, "-o", out)
    return out, model


def _ours(
    model: Path, engine: str, scheme: str, options: argparse.Namespace, directory: Path
) -> tuple[Path, Path, Row]:
    notation, _, changed = scheme.partition(":")
    settings = [part for item in changed.split(",") if item for part in ("--set", item)]
    artifact = directory / "artifact"
    made = bitfold_json(
        "quantize", model, "-o", artifact, "--method", options.method, "--scheme", notation, *settings,
        "--calibration", options.calibration, "--to", engine,
    )  # fmt: skip
    (exported,) = made["exports"]
    more = {"types": exported["types"], "notes": exported["notes"], "method": options.method}
    return (
        Path(exported["path"]),
        artifact,
        more | {"quantizing_seconds": made["process_cpu_seconds"]},
    )


def _own(
    model: Path,
    engine: str,
    type_: str,
    with_data: bool,
    options: argparse.Namespace,
    directory: Path,
) -> tuple[Path, Path, Row]:
    from own_quantizers import importances, llama_cpp_quantized, onnx_runtime_quantized

    plain, _ = _plain(model, engine, directory)
    out = directory / "own"
    if engine == "onnx":
        algorithm, bits = type_.split()
        onnx_runtime_quantized(plain, out, int(bits), 32, algorithm)
    else:
        windows = np.load(options.calibration)
        llama_cpp_quantized(plain, out, type_, importances(model, windows) if with_data else None)
    return out, model, {}


# -- what is measured, each in a process of its own ----------------------------------------------------


def opened(engine: str, path: Path) -> Callable[[int], Any]:
    """The engine with a file, for windows of so many tokens."""
    from bitfold.engines.llama_cpp import LlamaCpp
    from bitfold.engines.onnx_runtime import OnnxRuntime

    if engine == "gguf":
        return lambda length: LlamaCpp(path, context=length, threads=1)
    return lambda length: nullcontext(OnnxRuntime(path, threads=1))


def figures(engine: str, path: Path, artifact: Path, model: Path, text: Path, windows: int) -> Row:
    """On a text: perplexity, distance to the simulation, and KL to the original."""
    from bitfold.engines.exported import compare_text

    to_original = compare_text(opened(engine, path), model, text, windows)
    to_artifact = (
        to_original
        if artifact == model
        else compare_text(opened(engine, path), artifact, text, windows)
    )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "perplexity": to_original.perplexity_engine,
        "perplexity_original": to_original.perplexity_simulation,
        "perplexity_simulation": to_artifact.perplexity_simulation,
        "kl_original": to_original.kl_mean,
        "kl_simulation": to_artifact.kl_mean,
        "difference": to_artifact.difference,
        "largest_difference": to_artifact.largest_difference,
    }


def speed(engine: str, path: Path) -> Row:
    """Tokens a second of CPU time, of a prompt and of generating behind it; memory beyond Python's and PyTorch's."""
    import torch

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prompt = [(37 * place) % 4000 for place in range(PROMPT)]
    prompts, news = [], []
    with opened(engine, path)(PROMPT + NEW) as runner:
        for _ in range(TURNS):
            runner.start()
            start = time.process_time()
            runner.decode(prompt)
            prompts.append(PROMPT / (time.process_time() - start))
            start = time.process_time()
            for token in range(NEW):
                runner.decode([token])
            news.append(NEW / (time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "prompt": median(prompts),
        "generation": median(news),
        "memory_mb": (peak - before) / 1024,
    }


# -- the page ----------------------------------------------------------------------------------------

HEAD = ["file", "MB", "perplexity", "simulated", "KL to original", "KL to simulation", "logits off"]
HEAD += ["at most", "prompt", "generation", "MB beyond"]


def _table(rows: list[Row]) -> list[list[str]]:
    return [
        [
            f"{row['by']} {row['scheme'].replace(':weight.symmetric=true', ' symmetric')}".strip(),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_simulation']:.3f}" if row["by"] in ("", "bitfold") else "",
            f"{row['kl_original']:.5f}",
            f"{row['kl_simulation']:.1e}" if row["by"] in ("", "bitfold") else "",
            f"{row['difference']:.1e}" if row["by"] in ("", "bitfold") else "",
            f"{row['largest_difference']:.1e}" if row["by"] in ("", "bitfold") else "",
            *(f"{row[key]:.0f}" for key in ("prompt", "generation", "memory_mb")),
        ]
        for row in rows
    ]


def _page(rows: list[Row]) -> str:
    parts = [
        "# Exports in their engines\n",
        "bitfold's files, and those of the engines' own quantizers with the same tensors in as many bits. Differences",
        "of logits are to the simulation in PyTorch, over their spread: root mean square, and the largest. Tokens",
        "a second by CPU time on one thread. MB beyond: how far the engine's peak memory is above that of importing",
        "packages, which of so small a model is mostly nothing. Importances: mean squares of inputs on the calibration",
        "text, as llama.cpp's `--imatrix` has them. bitfold's files also hold the logits that they are verified by.\n",
        f"`{command_line()}`\n",
        provenance(rows),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            those = [row for row in rows if (row["model"], row["engine"]) == (model, engine)]
            if those:
                parts += [
                    f"\n## {model} in {NAMES[engine]}\n",
                    *markdown_table(HEAD, _table(those)),
                ]
    return "\n".join([*parts, ""])


def _child(arguments: list[str]) -> None:
    """`figures` or `speed`, printed."""
    what, engine, path, *rest = arguments
    if what == "figures":
        artifact, model, text, windows = rest
        found = figures(engine, Path(path), Path(artifact), Path(model), Path(text), int(windows))
    else:
        found = speed(engine, Path(path))
    print(json.dumps(found))


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] in (["figures"], ["speed"]):
        _child(sys.argv[1:])
    else:
        main()
