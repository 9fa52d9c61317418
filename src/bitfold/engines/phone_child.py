"""Runs in an environment with ExecuTorch or LiteRT, where there is no bitfold: logits of given tokens, by files.

    python -I phone_child.py FORMAT FILE DIRECTORY

FORMAT                   executorch or litert
FILE                     model.pte or model.tflite
DIRECTORY/tokens.npy     token ids [length] int64
DIRECTORY/logits.npy     is written: [length, vocabulary] float32 behind each of them

On stdout there are lines of JSON, at first {"version": …, "memory": bytes of the process before the model}, and for
each line on stdin, {"start": the place of the first token}, one of {"done": {"seconds": …, "peak": bytes that it had at
most}} or {"failed": …}; all else goes to stderr. It ends when stdin does.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]

Decode = Callable[[np.ndarray, int], np.ndarray]
"""Token ids [length] and the place of the first → logits [length, vocabulary]."""


def main(format: str, file: Path, directory: Path) -> None:
    """Answer the lines of stdin."""
    say = _line_writer()
    try:
        kind = _KINDS[format]
        start = kind.start()
        before = _memory()
        decode = start(file)
    except Exception as error:  # whatever the engine raises is the answer
        traceback.print_exc()
        say({"failed": f"{type(error).__name__} {error}"})
        return
    say({"version": version(kind.package), "memory": before})
    for line in sys.stdin:
        try:
            tokens = np.load(directory / "tokens.npy")
            began = time.perf_counter()
            logits = decode(tokens, json.loads(line)["start"])
            seconds = time.perf_counter() - began
            np.save(directory / "logits.npy", logits)
            say({"done": {"seconds": seconds, "peak": _peak()}})
        except Exception as error:
            traceback.print_exc()
            say({"failed": f"{type(error).__name__} {error}"})


class _ExecuTorch:
    package = "executorch"

    @classmethod
    def start(cls) -> Callable[[Path], Decode]:
        """Import the engine, with one thread; what loads a file and gives what runs it."""
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)

        def load(file: Path) -> Decode:
            method = Runtime.get().load_program(str(file)).load_method("forward")

            def decode(tokens: np.ndarray, start: int) -> np.ndarray:
                given = [torch.from_numpy(tokens)[None].contiguous(), torch.tensor([start])]
                logits: np.ndarray = method.execute(given)[0][0].numpy()
                return logits

            return decode

        return load


class _LiteRt:
    package = "ai-edge-litert"

    @classmethod
    def start(cls) -> Callable[[Path], Decode]:
        """As `_ExecuTorch.start`."""
        from ai_edge_litert.interpreter import Interpreter

        def load(file: Path) -> Decode:
            interpreter = Interpreter(model_path=str(file), num_threads=1)
            run = interpreter.get_signature_runner("decode")
            cache = {
                name: np.zeros(one["shape"], np.float32)
                for name, one in run.get_input_details().items()
                if name.startswith("past_")
            }

            def decode(tokens: np.ndarray, start: int) -> np.ndarray:
                places = np.arange(start, start + len(tokens), dtype=np.int32)
                found = run(tokens=tokens[None].astype(np.int32), input_pos=places, **cache)
                cache.update({name: found[name.replace("past_", "present_")] for name in cache})
                logits: np.ndarray = found["logits"][0]
                return logits

            return decode

        return load


_KINDS: dict[str, type[_ExecuTorch] | type[_LiteRt]] = {
    "executorch": _ExecuTorch,
    "litert": _LiteRt,
}


def _memory() -> int:
    """Bytes of memory that the process has now. What it had at most is forgotten, where that can be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    """Bytes of memory that it had at most since then."""
    return _status("VmHWM")


def _status(key: str) -> int:
    """Linux says it; 0 elsewhere. (getrusage would count the parent's memory before it started this.)"""
    file = Path("/proc/self/status")
    if not file.is_file():
        return 0
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == f"{key}:"), 0)


def _line_writer() -> Any:
    """Writes JSON lines to what stdout was; stdout itself, which libraries print to, becomes stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return lambda content: stream.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
