"""Kill -9 at random moments of a run, resume, and compare every file with those of an uninterrupted run.

    python benchmarks/kill_and_resume.py src/bitfold/assets/tiny-llama --kills 20

A moment is drawn evenly between the appearance of the working directory and the end of the uninterrupted run; where
the run ends before it, another is drawn. After each kill the state on disk says how many blocks were finished, and the
resumed run has to have kept them. Ends with 1 if a file differs or work was lost.
"""

import argparse
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from children import bitfold_json, fix_environment, machine, source_version

Row = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    fix_environment(threads=1)
    with tempfile.TemporaryDirectory(prefix="bitfold-kill-") as directory:
        rows = list(measure(Path(directory), options))
    print(json.dumps({"rows": rows}) if options.json else page(rows))
    lost = [row for row in rows if row["resumed"] != row["finished"] or row["differing"]]
    sys.exit(bool(lost))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", type=Path)
    add("--kills", type=int, default=20)
    add("--method", default="awq")
    add("--samples", type=int, default=16)
    add("--sequence-length", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--json", action="store_true")
    return parser.parse_args()


def measure(directory: Path, options: argparse.Namespace) -> list[Row]:
    whole = directory / "whole" / "out"
    start = time.perf_counter()
    process, work_start = start_run(whole, options)
    process.wait()
    seconds = time.perf_counter() - work_start
    print(
        f"uninterrupted: {time.perf_counter() - start:.1f} s, work {seconds:.1f} s", file=sys.stderr
    )
    expected = contents(whole)
    moments = random.Random(options.seed)
    rows: list[Row] = []
    while len(rows) < options.kills:
        out = directory / f"run-{len(rows)}" / "out"
        moment = moments.uniform(0, seconds)
        process, work_start = start_run(out, options)
        time.sleep(max(0.0, work_start + moment - time.perf_counter()))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            shutil.rmtree(out.parent)
            continue
        finished = finished_blocks(out)
        resumed = bitfold_json(*arguments(out, options))
        found = contents(out)
        differing = [name for name in expected | found if found.get(name) != expected.get(name)]
        leftover = [path.name for path in out.parent.iterdir() if path != out]
        rows.append(
            {
                "seconds": moment,
                "finished": finished,
                "resumed": resumed["resumed_blocks"],
                "files": len(found),
                "differing": differing + leftover,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(out.parent)
    return rows


def arguments(out: Path, options: argparse.Namespace) -> list[str]:
    return [
        *("quantize", str(options.model), "-o", str(out), "--method", options.method),
        *("--samples", str(options.samples), "--sequence-length", str(options.sequence_length)),
    ]


def start_run(out: Path, options: argparse.Namespace) -> tuple[subprocess.Popen[bytes], float]:
    """A run, and when its working directory appeared."""
    command = [sys.executable, "-m", "bitfold", *arguments(out, options)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    while not working_directory(out).exists():
        if process.poll() is not None:
            raise SystemExit(f"{shlex.join(command)} ended before it began: run it to see why.")
        time.sleep(0.001)
    return process, time.perf_counter()


def working_directory(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def finished_blocks(out: Path) -> int:
    """As the state on disk says; all of them where the artifact has its name already."""
    state = working_directory(out) / "state.json"
    if out.exists():
        return len(json.loads((out / "report.json").read_text())["folding_errors"])
    return len(json.loads(state.read_text())["blocks"]) if state.exists() else 0


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def page(rows: list[Row]) -> str:
    lines = [
        f"Written by: python {shlex.join(sys.argv)}",
        f"bitfold {source_version()}; {machine()}",
        "",
        "killed after  finished blocks  resumed_blocks  files  differing",
    ]
    for row in rows:
        lines.append(
            f"{row['seconds']:10.2f} s  {row['finished']:15d}  {row['resumed']:14d}  {row['files']:5d}  "
            f"{', '.join(row['differing']) or 'none'}"
        )
    kept = sum(row["resumed"] == row["finished"] for row in rows)
    same = sum(not row["differing"] for row in rows)
    lines += [
        "",
        f"{same} of {len(rows)} gave the bytes of an uninterrupted run, "
        f"{kept} of {len(rows)} kept every finished block.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
