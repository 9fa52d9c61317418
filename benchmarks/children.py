"""What the benchmarks share: one environment for this process and its children, and bitfold as a subprocess."""

import argparse
import ctypes.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitfold

__all__ = [
    "Failed",
    "bitfold_json",
    "child_json",
    "examples",
    "fix_environment",
    "machine",
    "source_version",
]


def examples(doc: str | None) -> dict[str, Any]:
    """Arguments of an ArgumentParser whose help begins with a module's first line and ends with the rest of it."""
    first, _, rest = (doc or "").partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    return {"description": first, "epilog": rest, "formatter_class": layout}


def fix_environment(threads: int) -> None:
    """Start this process again with `threads` threads that sleep when they wait, and jemalloc (if found); its children
    inherit all of it."""
    wanted = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    wanted["TOKENIZERS_PARALLELISM"] = "false"
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc and "LD_PRELOAD" not in os.environ:
        wanted |= {"LD_PRELOAD": jemalloc, "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


class Failed(SystemExit):
    """A child that failed: this process ends with what it said. kind: of bitfold's error, empty for any other."""

    def __init__(self, command: Sequence[str], done: "subprocess.CompletedProcess[str]") -> None:
        super().__init__(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stderr}")
        said = done.stdout.strip().splitlines()[-1:]
        answer = json.loads(said[0]) if said and said[0].startswith('{"error"') else {}
        self.kind: str = answer.get("kind", "")
        self.sentence: str = answer.get("error", "")


def bitfold_json(*arguments: str | Path) -> dict[str, Any]:
    """What `bitfold ARGUMENTS --json` prints, and what the process took; see `child_json`."""
    return child_json("-m", "bitfold", *arguments, "--json")


def child_json(*arguments: str | Path) -> dict[str, Any]:
    """The JSON object that `python ARGUMENTS` prints, and what the process took, its start included: process_seconds on
    the clock, process_cpu_seconds on the processors. Its error, where it fails, is this process's."""
    command = [sys.executable, *map(str, arguments)]
    start, start_cpu = time.perf_counter(), _children_cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(command, done)
    content: dict[str, Any] = json.loads(done.stdout)
    content["process_seconds"] = time.perf_counter() - start
    content["process_cpu_seconds"] = _children_cpu_seconds() - start_cpu
    return content


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine() -> str:
    """One line on what the figures were measured with."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    allocator = "jemalloc" if "jemalloc" in os.environ.get("LD_PRELOAD", "") else "malloc"
    threads = os.environ.get("OMP_NUM_THREADS")
    return (
        f"{cpu}, {os.cpu_count()} cores, {threads} thread(s), {allocator}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def source_version() -> str:
    """bitfold's version, and the commit it is run from if that is a git checkout."""
    where = Path(bitfold.__file__).parent
    asked = ["git", "-C", str(where), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    commit = f" ({done.stdout.strip()})" if done.returncode == 0 else ""
    return f"{bitfold.__version__}{commit}"
