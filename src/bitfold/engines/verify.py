"""Is what an engine computes what was simulated? The artifact runs there and in PyTorch, on the same tokens.

How far apart two right answers may be is no constant: it is what rounding does to this artifact on these tokens, which
is measured in PyTorch. Where inputs are quantized, a last bit that differs moves codes, which move others, until all of
that noise is drawn anew: rounding to bfloat16 shows how far that goes (docs/engines.md).
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.assets import EVALUATION_TEXT
from bitfold.data.text import read_text, tokenize
from bitfold.data.text import windows as cut_windows
from bitfold.engines.child import has_module, resolve_python, run_script, say_shortly
from bitfold.engines.compare import Answer, Distance, distance, perplexity
from bitfold.engines.simulation import Simulation
from bitfold.errors import BitfoldError, DataError, EngineError, VerificationError, did_you_mean
from bitfold.export.importing import import_checkpoint
from bitfold.models.headers import read_json
from bitfold.pipeline.probe import PROBE_FILE, Probe
from bitfold.pipeline.verify import check_artifact, verify
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.load import load_tokenizer

__all__ = ["EngineText", "EngineVerification", "check_engine", "verify_in_engine"]

ENGINES = ("vllm",)
_CHILD = Path(__file__).with_name("vllm_child.py")

# Text: so many windows, of so many tokens. Log-probabilities of so many tokens at each position.
_WINDOWS, _LENGTH, _MOST = 8, 256, 20

# How many times as far as PyTorch's own rounding the engine may be: its kernels round elsewhere, and not less often.
# More for the largest difference, which is one number, and so chance.
_MEAN, _MAX = 2.0, 5.0
# In nats. Engines that round to nothing else still sum in another order, and take exponentials of their own.
_FLOOR = Distance(mean=1e-3, max=1e-2)
# Of an engine that leaves inputs as they are: it is so much nearer to the simulation that does the same.
_NEARER = 0.5

_REFERENCE = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}


@dataclass(frozen=True)
class EngineText:
    """One text in the engine and in PyTorch: perplexities, and differences of log-probabilities in nats.

    *_tolerance: up to which a difference is rounding. rounding_mean: the difference that rounding makes in PyTorch.
    inputs_mean: the one that quantizing inputs makes there; None where they are not quantized.
    """

    windows: int
    tokens: int
    perplexity: float
    simulation_perplexity: float
    mean_difference: float
    mean_tolerance: float
    max_difference: float
    max_tolerance: float
    rounding_mean: float
    inputs_mean: float | None


@dataclass(frozen=True)
class EngineVerification:
    """texts: `probe`, the tokens that quantization recorded, and `text`. dtype: in which the engine ran."""

    out: str
    engine: str
    version: str
    dtype: str
    texts: dict[str, EngineText]
    ok: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_engine(engine: str, python: str | Path) -> Path:
    """The path of a Python that has the engine; EngineError where it has not."""
    if engine not in ENGINES:
        raise EngineError(f"There is no engine '{engine}': {did_you_mean(engine, ENGINES)}")
    found = resolve_python(python)
    if not has_module(found, engine):
        raise EngineError(
            f"{python} has no vLLM: make an environment by scripts/make_vllm_environment.sh DIRECTORY, "
            "and give DIRECTORY/bin/python"
        )
    return found


def verify_in_engine(
    out: str | Path,
    *,
    engine: str,
    python: str | Path,
    text: str | Path | None = None,
    device: str | torch.device = "auto",
    progress: Callable[[str], None] | None = None,
) -> EngineVerification:
    """Verify an artifact as `verify` does, then run it in an engine and compare the log-probabilities.

    out: an artifact, or a directory in GPTQ's or AWQ's format, whoever wrote it: that is held against what its integers
    are in PyTorch, as `import_checkpoint` reads them. python: of the environment that has the engine. text: a plain
    text file, or else an embedded one. device: PyTorch's.

    Raises EngineError where there is no such engine or it cannot run the artifact; VerificationError where it computes
    something else than was simulated.
    """
    say = progress or (lambda what: None)
    out = find_checkpoint(out).absolute()
    packed = _method(out) in ("gptq", "awq")
    if not packed:
        check_artifact(out)
    dtypes = _dtypes_to_ask_for(out)
    windows = _windows(out, text, None if packed else out / PROBE_FILE)
    interpreter = check_engine(engine, python)
    if not packed:
        verify(out, device=device, progress=progress)

    with tempfile.TemporaryDirectory(prefix="bitfold-engine-") as name:
        directory = Path(name)
        answers, version, dtype = _ask(interpreter, directory, out, windows, dtypes, say)
        say("comparing with PyTorch")
        simulated = out
        if packed:
            simulated = directory / "imported"
            import_checkpoint(out, simulated)
        reference = Simulation(simulated, device, _REFERENCE[dtype])
        rounded = Simulation(simulated, device, "bfloat16" if reference.quantizes_inputs else dtype)
    texts = {
        name: _compare(f"{out} in {engine}", name, answer, windows[name], reference, rounded)
        for name, answer in answers.items()
    }
    return EngineVerification(str(out), engine, version, dtype, texts)


# --- what is asked ---


def _method(out: Path) -> str | None:
    """The quantization method that config.json names; None where there is none."""
    found = (read_json(out / "config.json").get("quantization_config") or {}).get("quant_method")
    return None if found is None else str(found)


def _dtypes_to_ask_for(out: Path) -> tuple[str, ...]:
    """float32 shows the most, and the checkpoint's own is what is served. Of packed integers there are kernels for
    inputs of 16 bits alone.

    Raises EngineError where the engine cannot load the format.
    """
    quantization = read_json(out / "config.json").get("quantization_config", {})
    if _method(out) == "bitfold":
        raise EngineError(
            f"{out} is in bitfold's own format, which vLLM does not know: "
            "run it by `bitfold generate`, or quantize by a method and scheme that compressed-tensors can say "
            "(docs/engines.md)."
        )
    if "pack-quantized" in json.dumps(quantization) or _method(out) in ("gptq", "awq"):
        return ("auto",)
    return ("float32", "auto")


def _windows(out: Path, text: str | Path | None, recorded: Path | None) -> dict[str, Tensor]:
    """Token ids [windows, length] of the probe, where one was recorded, and of a text.

    At least one token shorter than the model's longest, since an engine writes one more.
    """
    longest = read_json(out / "config.json").get("max_position_embeddings") or _LENGTH + 1
    probe = {} if recorded is None else {"probe": Probe.load(recorded).tokens[:, : longest - 1]}
    file = EVALUATION_TEXT if text is None else Path(text)
    content = read_text(file)
    length = min(_LENGTH, longest - 1)
    try:
        tokens = tokenize(content, load_tokenizer(out))
    except BitfoldError:
        if text is not None or not probe:
            raise
        return probe  # a model without a tokenizer: the probe is all
    cut = cut_windows(tokens, length)[:_WINDOWS]
    if not len(cut):
        raise DataError(
            f"{file} gives {tokens.numel()} tokens, but one window needs {length}: give more text."
        )
    return probe | {"text": cut}


# --- the engine's answer ---


def _ask(
    python: Path,
    directory: Path,
    out: Path,
    windows: Mapping[str, Tensor],
    dtypes: tuple[str, ...],
    say: Callable[[str], None],
) -> tuple[dict[str, Answer], str, str]:
    """Answers by name of the text, the engine's version and dtype; of the first of `dtypes` in which it runs."""
    tokens: dict[str, Any] = {name: rows.numpy() for name, rows in windows.items()}
    np.savez(directory / "tokens.npz", **tokens)
    request: dict[str, Any] = {
        "model": str(out),
        "length": max(rows.shape[1] for rows in windows.values()),
        "most": _MOST,
    }
    said: Mapping[str, Any] = {}
    for dtype in dtypes:
        (directory / "request.json").write_text(json.dumps(request | {"dtype": dtype}))
        said = run_script(python, _CHILD, [directory], directory / "log", say)
        if "done" in said:
            break
    else:
        raise EngineError(
            f"{out} does not run in vLLM ({_helpful(said['failed'])}): choose a scheme that does there "
            "(docs/engines.md)"
        )
    with np.load(directory / "answer.npz", allow_pickle=False) as stored:
        answers = {
            name: Answer(
                torch.from_numpy(stored[f"{name}.ids"]),
                torch.from_numpy(stored[f"{name}.logprobs"]),
            )
            for name in windows
        }
    return answers, said["done"]["version"], said["done"]["dtype"]


# --- what is right ---


def _compare(
    where: str,
    name: str,
    answer: Answer,
    windows: Tensor,
    reference: Simulation,
    rounded: Simulation,
) -> EngineText:
    """Raises VerificationError where the answer is not what was simulated."""
    expected = reference.answer(windows, answer.ids)
    found = distance(answer, expected)
    rounding = distance(rounded.answer(windows, answer.ids), expected)
    tolerance = _tolerance(rounding)
    inputs = None
    if reference.quantizes_inputs:
        weights_only = reference.answer(windows, answer.ids, quantize_inputs=False)
        inputs = distance(weights_only, expected)
        _check_inputs(where, found, distance(answer, weights_only))
    _check_distance(where, name, found, tolerance)
    return EngineText(
        windows=answer.ids.shape[0],
        tokens=answer.ids[..., 0].numel(),
        perplexity=perplexity(answer),
        simulation_perplexity=perplexity(expected),
        mean_difference=found.mean,
        mean_tolerance=tolerance.mean,
        max_difference=found.max,
        max_tolerance=tolerance.max,
        rounding_mean=rounding.mean,
        inputs_mean=None if inputs is None else inputs.mean,
    )


def _tolerance(rounding: Distance) -> Distance:
    """How far apart two right answers may be."""
    return Distance(_MEAN * rounding.mean + _FLOOR.mean, _MAX * rounding.max + _FLOOR.max)


def _check_inputs(where: str, found: Distance, weights_only: Distance) -> None:
    if weights_only.mean < _NEARER * found.mean:
        raise VerificationError(
            f"The inputs of {where} are not quantized: log-probabilities differ from the simulation's by "
            f"{found.mean:.4f} nats in the mean, and from those of the weights alone by {weights_only.mean:.4f}; "
            "choose a scheme that quantizes weights only, or one whose inputs are quantized there (docs/engines.md)"
        )


def _check_distance(where: str, name: str, found: Distance, tolerance: Distance) -> None:
    if found.mean <= tolerance.mean and found.max <= tolerance.max:
        return
    raise VerificationError(
        f"The log-probabilities of {where} are not what was simulated: on the {name} they differ by "
        f"{found.mean:.4f} nats in the mean and {found.max:.3f} at most (up to {tolerance.mean:.4f} and "
        f"{tolerance.max:.3f} may be rounding); do not serve it there, and see docs/engines.md for schemes that were "
        "found to be right"
    )


def _helpful(message: str) -> str:
    """vLLM's message without the objects that it prints in full, and without reasons where it gives none."""
    objects = r",? (\w+=QuantizationArgs\(|\[type=\w+_error).*"
    said = re.sub(objects, "", message, flags=re.DOTALL).strip()
    return say_shortly(said.removesuffix("Reasons:").rstrip(" ,"))
