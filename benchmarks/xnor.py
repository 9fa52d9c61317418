"""How fast products of signs are on this machine, against PyTorch's in float32 and bfloat16.

    python benchmarks/xnor.py
    python benchmarks/xnor.py --sizes 2048 --rows 1 16 --threads 1

A layer of signs is given numbers in float32, whose packing is part of its time, and gives numbers in float32, scaled by
channel. It and `F.linear` in both dtypes take turns; of each the medians, by the clock, and for one thread by the
process' CPU time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from children import examples, fix_environment, machine, source_version
from measuring import Row, command_line, markdown_table, show_table, write_results

if TYPE_CHECKING:
    from torch import Tensor

WAYS = ("float32", "bfloat16", "xnor")


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add(
        "--sizes", type=int, nargs="+", default=[1024, 4096], help="inputs, and outputs, of a layer"
    )
    add("--rows", type=int, nargs="+", default=[1, 64, 1024])
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--turns", type=int, default=5)
    add("-o", "--out", type=Path, default=Path("docs/results/xnor"), help="without suffix")
    options = parser.parse_args()
    fix_environment(max(options.threads))
    from bitfold.runtime.xnor import xnor_kernel

    rows = [
        measured(size, count, threads, options.turns)
        for threads in options.threads
        for size in options.sizes
        for count in options.rows
    ]
    content = {
        "command": command_line(),
        "bitfold": source_version(),
        "machine": machine(),
        "kernel": xnor_kernel().why,
        "turns": options.turns,
        "rows": rows,
    }
    write_results(options.out, content, page(content))
    show_table(*table(content))


def measured(size: int, rows: int, threads: int, turns: int) -> Row:
    """Seconds of each way, medians, and whether the integers are those of a product in float32."""
    import torch
    import torch.nn.functional as F

    from bitfold.runtime.xnor import pack_signs, xnor_product
    from bitfold.runtime.xnor_layers import XnorLinear, filter_scale

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    x = torch.randn(rows, size, generator=generator)
    layer = XnorLinear(weight, scale=filter_scale(weight))
    half_x, half = x.bfloat16(), weight.bfloat16()
    runs: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(half_x, half),
        "xnor": lambda: layer(x),
    }
    signs = [torch.where(values < 0, -1.0, 1.0) for values in (x, weight)]
    found = xnor_product(pack_signs(x), pack_signs(weight))
    if not torch.equal(found, (signs[0] @ signs[1].T).int()):
        raise SystemExit(f"xnor_product of {rows} rows of {size} is not what float32 gives.")
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in range(turns + 1):
        for way, run in runs.items():
            # At least some milliseconds: the clock of CPU time is coarse.
            times = max(1, 2**24 // (rows * size)) if way == "xnor" else max(1, 64 // rows)
            times = min(times, 256)
            cpu, clock = time.process_time(), time.perf_counter()
            for _ in range(times):
                run()
            taken = ((time.process_time() - cpu) / times, (time.perf_counter() - clock) / times)
            if turn:  # the first one warms up
                seconds[way].append(taken)
    row: Row = {"size": size, "rows": rows, "threads": threads}
    for way, turned in seconds.items():
        cpu, clock = map(statistics.median, zip(*turned, strict=True))
        row[way] = {"cpu_seconds": cpu, "seconds": clock}
    return row


def table(content: Row) -> tuple[list[str], list[list[str]]]:
    header = ["threads", "inputs × outputs", "rows", *(f"{way} ms" for way in WAYS)]
    header += ["× float32", "× bfloat16"]
    lines = []
    for row in content["rows"]:
        key = "cpu_seconds" if row["threads"] == 1 else "seconds"
        taken = [row[way][key] for way in WAYS]
        cells = [str(row["threads"]), f"{row['size']} × {row['size']}", str(row["rows"])]
        cells += [f"{1e3 * seconds:.3f}" for seconds in taken]
        lines.append([*cells, *(f"{seconds / taken[-1]:.1f}" for seconds in taken[:-1])])
    return header, lines


def page(content: Row) -> str:
    lines = [
        "# Products of signs",
        "",
        f"Written by `{content['command']}`.",
        "",
        f"bitfold {content['bitfold']}; {content['machine']}. Kernel: {content['kernel']}.",
        "",
        f"Medians of {content['turns']} turns: of CPU time for one thread, of the clock for more. xnor packs its input "
        "and scales what comes out; its integers were compared with float32's. Ratios are times of PyTorch's product "
        "over xnor's. bfloat16 is what `F.linear` gives on this processor, with instructions for it or without.",
        "",
        *markdown_table(*table(content)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
