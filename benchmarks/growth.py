"""What one step of AffineQuant's descent costs for a Llama block of a given width, against the products it must do.

    python benchmarks/growth.py 256
    python benchmarks/growth.py 4096 --compute float32 --steps 2

    # all widths, each in a process of its own, as a table
    python benchmarks/studies.py growth

The block is random: FFN 3 × hidden, heads of 64 (of 128 from hidden 2048 on), a KV head for every four. A step is timed
from one report of the descent's progress to the next: folding, rounding, the block, its loss, all gradients, Adam,
projection. The floor is what no implementation can leave out: the products of the block's seven linear layers on the
same tokens in the same dtype, forward and backward (to the inputs and to the weights), as bare `torch.mm` into memory
that is there already. Both are CPU seconds, the median of several. One JSON object is printed.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import pairwise
from math import log2
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from children import child_json, examples, fix_environment, source_version
from measuring import Row, Rows, command_line, markdown_table, provenance, show_table, write_results

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_growth_arguments", "run_growth"]

VOCABULARY = 256
# A step's time is the code's, so that another commit's is another row.
IDENTITY = ("bitfold", "hidden", "compute", "settings")
# Options that one width and all of them have in common.
SHARED = ("scheme", "length", "batch", "steps", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    parser.add_argument("hidden", type=int, help="width of the block")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="bfloat16")
    add_block_arguments(parser)
    options = parser.parse_args()
    fix_environment(options.threads)
    print(json.dumps(measure(options)))


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `SHARED`."""
    add = parser.add_argument
    add("--scheme", default="w4a4")
    add("--length", type=int, default=256, help="tokens of a window")
    add("--batch", type=int, default=2, help="windows of a step")
    add("--steps", type=int, default=4, help="so many are timed, after one that is not")
    add("--threads", type=int, default=1)


def add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all widths."""
    add = parser.add_argument
    add("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    add("--compute", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    add_block_arguments(parser)
    add("--rows", type=Path, default=Path("out/benchmarks/growth.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/growth"), help="without suffix")


def measure(options: argparse.Namespace) -> Row:
    from bitfold.evaluate.memory import peak_rss_mb

    steps = step_seconds(options)
    peak = peak_rss_mb()
    floors = floor_seconds(options)
    floor, step = median(floors), median(steps)
    return {
        "head_dim": head_dim(options.hidden),
        "floor_seconds": floor,
        "floor_gflops": 6 * options.batch * options.length * weights(options.hidden) / floor / 1e9,
        "step_seconds": step,
        "ratio": step / floor,
        "floor_range": [min(floors), max(floors)],
        "step_range": [min(steps), max(steps)],
        "peak_rss_mb": peak,
    }


# -- the block -------------------------------------------------------------------------------------


def head_dim(hidden: int) -> int:
    return 128 if hidden >= 2048 else 64


def kv_heads(hidden: int) -> int:
    return max(1, hidden // head_dim(hidden) // 4)


def linear_shapes(hidden: int) -> list[tuple[int, int]]:
    """(out, in) of the block's linear layers."""
    keys = kv_heads(hidden) * head_dim(hidden)
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*attention, (3 * hidden, hidden), (3 * hidden, hidden), (hidden, 3 * hidden)]


def weights(hidden: int) -> int:
    return sum(rows * columns for rows, columns in linear_shapes(hidden))


def save_block(path: Path, hidden: int, length: int) -> None:
    """A random Llama of one block."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // head_dim(hidden),
        num_key_value_heads=kv_heads(hidden),
        head_dim=head_dim(hidden),
        vocab_size=VOCABULARY,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


# -- the two times ---------------------------------------------------------------------------------


def floor_seconds(options: argparse.Namespace) -> list[float]:
    """Of all products of the linear layers, forward and backward, repeatedly."""
    import torch

    dtype, tokens = getattr(torch, options.compute), options.batch * options.length
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, columns in linear_shapes(options.hidden):
        x, y = torch.randn(tokens, columns, dtype=dtype), torch.randn(tokens, rows, dtype=dtype)
        weight = torch.randn(rows, columns, dtype=dtype)
        products += [
            (x, weight.T, torch.empty_like(y)),
            (y, weight, torch.empty_like(x)),
            (y.T, x, torch.empty_like(weight)),
        ]
    found: list[float] = []
    while len(found) < 1 + options.steps or sum(found) < 0.5:
        start = time.process_time()
        for left, right, out in products:
            torch.mm(left, right, out=out)
        found.append(time.process_time() - start)
    return found[1:]


def step_seconds(options: argparse.Namespace) -> list[float]:
    """Of the steps of a descent of one epoch, but the first."""
    import torch

    from bitfold import Recipe
    from bitfold.pipeline.job import prepare
    from bitfold.pipeline.problem import block_problem
    from bitfold.transforms import BlockTransform

    settings = [f"affine.{key}" for key in ("epochs=1", f"batch={options.batch}")]
    recipe = Recipe.make(
        "affine", options.scheme, set=[*settings, f"affine.compute={options.compute}"]
    )
    (descent,) = (part for part in recipe.transforms if isinstance(part, BlockTransform))
    moments: list[float] = []

    def report(done: int, total: int, what: str) -> None:
        moments.append(time.process_time())

    with tempfile.TemporaryDirectory(prefix="bitfold-growth-") as directory, torch.no_grad():
        model = Path(directory) / "model"
        save_block(model, options.hidden, options.length)
        ids = Path(directory) / "ids.npy"
        save_tokens(ids, (1 + options.steps) * options.batch, options.length)
        job = prepare(
            str(model),
            Path(directory) / "out",
            recipe,
            calibration=[ids],
            samples=(1 + options.steps) * options.batch,
            sequence_length=options.length,
            device="cpu",
            dtype="float32",
        )
        streams = job.start_streams()
        block = job.skeleton.load_block(0, torch.float32)
        descent.fit(block_problem(job.skeleton, 0, job.plan, block, streams, report))
    return [later - earlier for earlier, later in pairwise(moments)]


def save_tokens(file: Path, windows: int, length: int) -> None:
    import numpy as np

    np.save(file, np.random.default_rng(0).integers(0, VOCABULARY, (windows, length)))


# -- all widths --------------------------------------------------------------------------------------

COLUMNS = ["head dim", "compute", "floor s", "step s", "step ÷ floor", "step grows as", "MB"]


def run_growth(options: argparse.Namespace) -> None:
    finished = Rows(options.rows, IDENTITY)
    settings = {name: getattr(options, name) for name in SHARED}
    rows = []
    for compute in options.compute:
        for hidden in options.hidden:
            of = {"hidden": hidden, "compute": compute, "settings": settings}
            of["bitfold"] = source_version()
            make = partial(grown, hidden, compute, options)
            rows.append(finished.get(of, make, f"growth {hidden} {compute}"))
    content = {"command": command_line(), "rows": rows}
    write_results(options.out, content, page(content, options))
    show_table(["hidden", *COLUMNS], cells(rows))


def grown(hidden: int, compute: str, options: argparse.Namespace) -> Row:
    shared = [part for name in SHARED for part in (f"--{name}", str(getattr(options, name)))]
    return child_json(__file__, str(hidden), "--compute", compute, *shared)


def cells(rows: list[Row]) -> list[list[str]]:
    lines = []
    for before, row in zip([None, *rows], rows, strict=False):
        power = ""
        if before is not None and before["compute"] == row["compute"]:
            times = row["step_seconds"] / before["step_seconds"]
            power = f"hidden^{log2(times) / log2(row['hidden'] / before['hidden']):.2f}"
        lines.append(
            [
                str(row["hidden"]),
                str(row["head_dim"]),
                row["compute"],
                f"{row['floor_seconds']:.4f}",
                f"{row['step_seconds']:.4f}",
                f"{row['ratio']:.2f}",
                power,
                f"{row['peak_rss_mb']:.0f}",
            ]
        )
    return lines


def page(content: Row, options: argparse.Namespace) -> str:
    rows = content["rows"]
    text = [
        "# Cost of a step against the width of a block",
        "",
        f"Written by `{content['command']}`.",
        "",
        provenance(rows),
        "",
        "One step of `affine` on a random Llama block (FFN 3 × hidden, a KV head for every four), scheme "
        f"{options.scheme}, {options.batch} windows of {options.length} tokens: folding, rounding, the block, its "
        "loss, all gradients, Adam, projection. floor: the products of the block's linear layers on the same tokens in "
        "the same dtype, forward and backward, as bare `torch.mm`. Both are CPU seconds, medians; see "
        "`benchmarks/growth.py`. grows as: from the width before. MB: peak resident memory of the process.",
        "",
        *markdown_table(["hidden", *COLUMNS], cells(rows)),
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
