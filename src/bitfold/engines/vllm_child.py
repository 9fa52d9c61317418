"""Runs in vLLM's environment, where there is no bitfold: log-probabilities of given tokens, by files.

    python -I vllm_child.py DIRECTORY

DIRECTORY/request.json   model: its directory; dtype; length: tokens of the longest window; most: how many
                         log-probabilities of a position are kept
DIRECTORY/tokens.npz     NAME: windows of token ids [windows, length] int64
DIRECTORY/answer.npz     is written: NAME.ids [windows, length − 1, most] int64 and NAME.logprobs, float32, of the token
                         that comes next, in the first column, and of the likeliest others

On stdout there are lines of JSON, {"doing": …} and at last {"done": …} or {"failed": …}; all else goes to stderr. When
stdin ends, which is when the parent is gone, it and whatever it started are killed.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # In this process, where an exception keeps its message.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # On processors with AMX, w4a16 would be computed with inputs in 8 bits, which the artifact does not say.
    "VLLM_CPU_INT4_W4A8": "0",
}


def main(directory: Path) -> None:
    """Answer the request in `directory`."""
    say = _line_writer()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    request = json.loads((directory / "request.json").read_text(encoding="utf-8"))
    with np.load(directory / "tokens.npz", allow_pickle=False) as stored:
        windows = {name: stored[name].tolist() for name in stored.files}
    try:
        say({"doing": "importing vLLM"})
        import vllm

        dtype = request["dtype"].replace("auto", "the checkpoint's dtype")
        say({"doing": f"starting vLLM {vllm.__version__} in {dtype}"})
        engine = _start(vllm, request)
        arrays: dict[str, Any] = {}
        for name, rows in windows.items():
            say({"doing": f"running vLLM on the {name}"})
            arrays |= _log_probabilities(vllm, engine, name, rows, request["most"])
        np.savez(directory / "answer.npz", **arrays)
        dtype = str(engine.llm_engine.model_config.dtype).removeprefix("torch.")
        say({"done": {"version": vllm.__version__, "dtype": dtype}})
    except Exception as error:  # whatever vLLM raises is the answer
        say({"failed": _root(error)})
        raise


def _start(vllm: Any, request: dict[str, Any]) -> Any:
    return vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["length"] + 1,
        max_num_seqs=8,
        max_logprobs=request["most"],
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        seed=0,
    )


def _log_probabilities(
    vllm: Any, engine: Any, name: str, rows: list[list[int]], most: int
) -> dict[str, np.ndarray]:
    asked = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=most, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    ids, values = [], []
    for row, output in zip(rows, outputs, strict=True):
        for token, found in zip(row[1:], output.prompt_logprobs[1:], strict=True):
            others = sorted(set(found) - {token}, key=lambda other: -found[other].logprob)
            kept = [token, *others[: most - 1]]
            ids.append(kept)
            values.append([found[other].logprob for other in kept])
    shape = (len(rows), len(rows[0]) - 1, most)
    return {
        f"{name}.ids": np.array(ids, dtype=np.int64).reshape(shape),
        f"{name}.logprobs": np.array(values, dtype=np.float32).reshape(shape),
    }


def _line_writer() -> Any:
    """Writes JSON lines to what stdout was; stdout itself, which libraries print to, becomes stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return lambda content: stream.write(json.dumps(content) + "\n")


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _root(error: BaseException) -> str:
    """The error that others were raised after, with its name where it has no sentence of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error)
    return said if " " in said else f"{type(error).__name__} {said}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
