"""`bitfold verify`: which way a result is verified, by what it is, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitfold.engines.sums import format_of
from bitfold.export.sums import SUMS_FILE
from bitfold.report import outcome, terminal
from bitfold.report.ending import USAGE_ERROR
from bitfold.report.progress import showing_steps

__all__ = ["verify_and_print"]

# Engines that run in an environment of their own, by the format that is said in export.json.
PHONES = {"executorch": "ExecuTorch", "litert": "LiteRT"}
# What it is, the engine that it runs in, and what verifies it there.
Verifier = tuple[str, str, Callable[..., Any]]


def verify_and_print(
    out: str,
    engine: str | None,
    engine_python: str | None,
    against: str | None,
    text: Path | None,
    device: str,
    json: bool,
) -> None:
    """An artifact in PyTorch, or in vLLM too; a GGUF file in llama.cpp; other exports in their engines.

    Those for phones may run in another Python."""
    if Path(out).suffix == ".gguf" or (Path(out) / SUMS_FILE).is_file():
        result: Any = _exported(out, engine, engine_python, against, text)
        say = _say_exported
    elif engine is not None:
        if against is not None:
            raise USAGE_ERROR("--against is the artifact of what was exported: leave it out")
        result = _engine(out, engine, engine_python, text, device)
        say = outcome.print_engine_verification
    else:
        if engine_python is not None or text is not None or against is not None:
            raise USAGE_ERROR(
                "--engine-python and --text go with --engine vllm, --against with what was exported"
            )
        result = _artifact(out, device)
        say = _say_artifact
    if json:
        terminal.print_json(result.to_json())
    else:
        say(result)


def _artifact(out: str, device: str) -> Any:
    from bitfold.pipeline.verify import verify

    with terminal.console(stderr=True).status("verifying") as status:
        return verify(out, device=device, progress=lambda what: status.update(what))


def _engine(out: str, engine: str, python: str | None, text: Path | None, device: str) -> Any:
    from bitfold.engines.verify import verify_in_engine

    if python is None:
        raise USAGE_ERROR(
            "--engine needs --engine-python, the python of its environment: scripts/make_vllm_environment.sh makes one"
        )
    with showing_steps() as say:
        return verify_in_engine(
            out, engine=engine, python=python, text=text, device=device, progress=say
        )


def _exported(
    out: str, engine: str | None, python: str | None, against: str | None, text: Path | None
) -> Any:
    gguf = Path(out).suffix == ".gguf"
    format = None if gguf else format_of(Path(out))
    if format in PHONES:
        return _phone(out, PHONES[format], engine, python, against, text)
    what, its, verify = _gguf() if gguf else _DIRECTORIES.get(format, _onnx)()
    if engine not in (None, its) or python is not None:
        raise USAGE_ERROR(
            f"This {what} runs in {its}, in this process: leave --engine and --engine-python out"
        )
    _check_texts(what, text, against)
    with showing_steps() as say:
        return verify(Path(out), against=against, text=text, progress=say)


def _phone(
    out: str,
    its: str,
    engine: str | None,
    python: str | None,
    against: str | None,
    text: Path | None,
) -> Any:
    """its: the engine's name."""
    from bitfold.engines.verify_phone import verify_phone

    what = f"{its} directory"
    if engine not in (None, its, its.lower()):
        raise USAGE_ERROR(f"This {what} runs in {its}: leave --engine out")
    _check_texts(what, text, against)
    with showing_steps() as say:
        return verify_phone(Path(out), python=python, against=against, text=text, progress=say)


def _check_texts(what: str, text: Path | None, against: str | None) -> None:
    if (text is None) != (against is None):
        raise USAGE_ERROR(
            f"--text FILE and --against ARTIFACT compare this {what} with its artifact: give both, or neither"
        )


def _gguf() -> Verifier:
    from bitfold.engines.verify_gguf import verify_gguf

    return "GGUF file", "llama.cpp", verify_gguf


def _onnx() -> Verifier:
    from bitfold.engines.verify_onnx import verify_onnx

    return "ONNX directory", "ONNX Runtime", verify_onnx


def _openvino() -> Verifier:
    from bitfold.engines.verify_openvino import verify_openvino

    return "OpenVINO directory", "OpenVINO", verify_openvino


def _torch() -> Verifier:
    from bitfold.engines.verify_torch import verify_torch

    return "graph of torch.export", "torch.export", verify_torch


# By the format that is said in export.json. What says none is damaged, as the first of them says.
_DIRECTORIES: Mapping[str | None, Callable[[], Verifier]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch": _torch,
}


def _say_artifact(result: Any) -> None:
    terminal.console().print(
        f"[green]verified[/]: {result.tensors} tensors are what was written; logits of {result.positions} "
        f"tokens differ from the simulation by at most {result.difference:.1e} of their spread "
        f"({result.dtype}, up to {result.tolerance:g} is rounding)"
    )


def _say_exported(result: Any) -> None:
    console = terminal.console()
    logits = (
        "it has no recorded logits to compare with (it was made from a checkpoint that is no artifact)"
        if result.difference is None
        else f"logits of {result.positions} tokens in {result.engine} differ from the simulation by "
        f"{result.difference:.1e} of their spread, root mean square (up to {result.tolerance:g} is rounding)"
    )
    console.print(f"[green]verified[/]: {result.tensors} tensors are what was written; {logits}")
    if result.text is not None:
        text = result.text
        heads = [
            "tokens",
            f"perplexity in {result.engine}",
            "in PyTorch",
            "KL",
            "difference",
            "largest",
        ]
        row = [
            f"{text.tokens:,}",
            f"{text.perplexity_engine:,.2f}",
            f"{text.perplexity_simulation:,.2f}",
            f"{text.kl_mean:.1e}",
            f"{text.difference:.1e}",
            f"{text.largest_difference:.1e}",
        ]
        console.print(terminal.table(heads, [row]))
