"""Runs in an environment with ExecuTorch or LiteRT, where there is no bitfold: logits of given tokens, by files.

    python -I phone_child.py FORMAT FILE DIRECTORY

FORMAT                   executorch or litert
FILE                     model.pte or model.tflite
DIRECTORY/tokens.npy     token ids [length] int64
DIRECTORY/logits.npy     is written: [length, vocabulary] float32 behind each of them

On stdout there are lines of JSON, at first {"version": …}, and for each line on stdin, {"start": the place of the first
token}, one of {"done": {"seconds": …, "peak": bytes of memory}} or {"failed": …}; all else goes to stderr. It ends when
stdin does.
"""

import json
import os
import resource
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]


def main(format: str, file: Path, directory: Path) -> None:
    """Answer the lines of stdin."""
    say = _line_writer()
    try:
        engine = {"executorch": _ExecuTorch, "litert": _LiteRt}[format](file)
    except Exception as error:  # whatever the engine raises is the answer
        traceback.print_exc()
        say({"failed": f"{type(error).__name__} {error}"})
        return
    say({"version": version(engine.package)})
    for line in sys.stdin:
        try:
            tokens = np.load(directory / "tokens.npy")
            began = time.perf_counter()
            logits = engine.decode(tokens, json.loads(line)["start"])
            seconds = time.perf_counter() - began
            np.save(directory / "logits.npy", logits)
            say({"done": {"seconds": seconds, "peak": _peak()}})
        except Exception as error:
            traceback.print_exc()
            say({"failed": f"{type(error).__name__} {error}"})


class _ExecuTorch:
    package = "executorch"

    def __init__(self, file: Path) -> None:
        import torch
        from executorch.runtime import Runtime

        self._torch = torch
        self._method = Runtime.get().load_program(str(file)).load_method("forward")

    def decode(self, tokens: np.ndarray, start: int) -> np.ndarray:
        torch = self._torch
        given = [torch.from_numpy(tokens)[None].contiguous(), torch.tensor([start])]
        logits: np.ndarray = self._method.execute(given)[0][0].numpy()
        return logits


class _LiteRt:
    package = "ai-edge-litert"

    def __init__(self, file: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(file), num_threads=1)
        self._run = self._interpreter.get_signature_runner("decode")
        self._cache = {
            name: np.zeros(one["shape"], np.float32)
            for name, one in self._run.get_input_details().items()
            if name.startswith("past_")
        }

    def decode(self, tokens: np.ndarray, start: int) -> np.ndarray:
        places = np.arange(start, start + len(tokens), dtype=np.int32)
        found = self._run(tokens=tokens[None].astype(np.int32), input_pos=places, **self._cache)
        self._cache = {name: found[name.replace("past_", "present_")] for name in self._cache}
        logits: np.ndarray = found["logits"][0]
        return logits


def _peak() -> int:
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line_writer() -> Any:
    """Writes JSON lines to what stdout was; stdout itself, which libraries print to, becomes stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return lambda content: stream.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
