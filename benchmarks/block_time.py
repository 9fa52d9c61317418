"""What a method takes for one block of Llama-2-7B's shape (4096, FFN 11008, 32 heads), and which part of it dominates.

    python benchmarks/block_time.py --method rtn awq gptq gptaq signround --samples 16
    python benchmarks/block_time.py --method affine --samples 8 --length 256

The checkpoint is one random block with a small vocabulary, so that the block is all there is. Every method runs in a
process of its own under cProfile, whose cost is nothing beside products of this size. The floor is one pass of the
calibration windows through the original block. A finished row is kept: the same command goes on where it was stopped.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from children import child_json, examples, fix_environment
from depth import write_checkpoint
from measuring import Row, Rows, command_line, markdown_table, provenance, show_table, write_results

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 512,
}
IDENTITY = ("method", "scheme", "settings")
# Functions of the pipeline that stand for its parts: none is called by another, but for the statistics.
PARTS = {
    "statistics": ("input_statistics",),
    "transforms": ("rewrite_block",),
    "rounding": ("round_block",),
    "end to end": ("learn", "put_in"),
    "streams": ("advance",),
    "report and files": ("_layer_errors", "write_tensors", "check_shard", "verify_blocks"),
}


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--method", nargs="+", default=["rtn", "awq", "gptq", "gptaq", "qep+gptq", "signround"])
    add("--scheme", default="w3a16g128")
    add("--samples", type=int, default=16)
    add("--length", type=int, default=256, help="tokens of a window")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/block_time.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/block_time"), help="without suffix")
    add("--model", type=Path, help=argparse.SUPPRESS)  # of a child: measure one method on it
    options = parser.parse_args()
    fix_environment(options.threads)
    if options.model:
        print(json.dumps(measure(options.model, options.method[0], options)))
        return
    finished = Rows(options.rows, IDENTITY)
    settings = {key: getattr(options, key) for key in ("samples", "length", "threads")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="bitfold-block-") as directory:
        model = Path(directory) / "model"
        write_checkpoint(model, 1, SHAPE)
        for method in options.method:
            of = {"method": method, "scheme": options.scheme}
            asked = ["--method", method, "--scheme", options.scheme, "--model", model]
            asked += [word for key, value in settings.items() for word in (f"--{key}", value)]
            make = partial(child_json, Path(__file__), *asked)
            rows.append(finished.get(of | {"settings": settings}, make, method))
    command = command_line()
    write_results(options.out, {"command": command, "rows": rows}, page(rows, options, command))
    show_table(*table(rows))


def measure(model: Path, method: str, options: argparse.Namespace) -> Row:
    import numpy as np

    import bitfold
    from bitfold.evaluate.memory import peak_rss_mb

    name, _, given = method.partition(":")
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, SHAPE["vocab_size"], (options.samples, options.length))
    with tempfile.TemporaryDirectory(prefix="bitfold-block-") as directory:
        file = Path(directory) / "tokens.npy"
        np.save(file, tokens.astype(np.int64))
        profile = cProfile.Profile(time.process_time)
        start = time.process_time()
        profile.enable()
        bitfold.quantize(
            model, Path(directory) / "out", method=name, scheme=options.scheme, calibration=[file],
            samples=options.samples, set=[item for item in given.split(",") if item],
        )  # fmt: skip
        profile.disable()
        seconds = time.process_time() - start
    return {
        "seconds": seconds,
        "parts": parts_of(profile),
        "floor_seconds": floor_seconds(model, tokens),
        "peak_rss_mb": peak_rss_mb(),
    }


def parts_of(profile: cProfile.Profile) -> dict[str, float]:
    """CPU seconds of each part; the statistics that transforms and rounding ask for are taken off them."""
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    askers = {"rewrite.py": "transforms", "round.py": "rounding"}
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, _, cumulative, callers) in stats.items():
        if "bitfold" not in file:
            continue
        for part, names in PARTS.items():
            found[part] += cumulative if function in names else 0.0
        if function in PARTS["statistics"]:
            for (asker, _, _), (_, _, _, spent) in callers.items():
                if Path(asker).name in askers:
                    found[askers[Path(asker).name]] -= spent
    return found


def floor_seconds(model: Path, tokens: Any) -> float:
    """CPU seconds of one pass of the windows through the original block, the quickest of three."""
    import torch
    from transformers import AutoModelForCausalLM

    block = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    passes = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            for part in torch.from_numpy(tokens).split(4):
                block(part)
            passes.append(time.process_time() - start)
    return min(passes)


# -- the page --------------------------------------------------------------------------------------


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "CPU s", "÷ floor", *(f"{part} s" for part in PARTS), "other s", "peak MB"]
    lines = []
    for row in rows:
        seconds, parts = row["seconds"], [row["parts"][part] for part in PARTS]
        figures = [seconds, seconds / row["floor_seconds"], *parts, max(0.0, seconds - sum(parts))]
        cells = [f"{figure:.1f}" for figure in figures]
        lines.append([row["method"].replace(":", " "), *cells, f"{row['peak_rss_mb']:.0f}"])
    return header, lines


def page(rows: list[Row], options: argparse.Namespace, command: str) -> str:
    floor = min(row["floor_seconds"] for row in rows)
    lines = [
        "# One block of Llama-2-7B's shape",
        "",
        f"Written by `{command}`.",
        "",
        provenance(rows),
        "",
        f"One random block (hidden 4096, FFN 11008, 32 heads, 202 M weights), {options.scheme}, {options.samples} "
        f"windows of {options.length} tokens. One float32 pass of them through the block takes {floor:.1f} CPU "
        "seconds: the floor. Statistics, streams and learned parts grow with the tokens, the solvers of gptq and its "
        "heirs do not. CPU seconds, without the interpreter's start.",
        "",
        *markdown_table(*table(rows)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
