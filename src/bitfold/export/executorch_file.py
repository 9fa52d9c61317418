"""A directory with a program of ExecuTorch from an artifact, whose integers its XNNPACK backend multiplies."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import ExportError, MissingExtraError
from bitfold.export.directory import appearing, bytes_of
from bitfold.export.executorch_decoder import (
    CachedDecoder,
    PhoneLinears,
    trace_cached,
)
from bitfold.export.exported import Exported, Progress
from bitfold.export.model_directory import copy_companions_of, missing_tokenizer, refuse_unsaid
from bitfold.export.phone_rules import check_phone, expected_inputs, input_notes
from bitfold.export.reading import StoredModel
from bitfold.export.stored_bytes import halves, stored_in
from bitfold.export.sums import write_sums
from bitfold.export.torch_decoder import build_decoder
from bitfold.models.config import read_config

__all__ = ["EXECUTORCH_FILE", "export_executorch"]

EXECUTORCH_FILE = "model.pte"


def export_executorch(
    model: StoredModel, out: Path, progress: Progress, *, context: int
) -> Exported:
    """Write an artifact as a directory with model.pte, which appears whole or not at all.

    context: tokens that the cache has room for, if the model sees as many. All weights are in memory. Raises
    ExportError for what XNNPACK would compute differently, OutputError where it cannot be written, MissingExtraError
    without the package executorch.
    """
    refuse_unsaid(model, "ExecuTorch")
    check_phone(model, "ExecuTorch")
    lower = _package()
    config: Any = read_config(model.checkpoint)
    context = min(context, getattr(config, "max_position_embeddings", None) or context)
    steps = len(model.schemes) + 5
    done = iter(range(steps))

    def step(what: str) -> None:
        progress(next(done, steps - 1), steps, what)

    with appearing(out) as directory:
        linears = PhoneLinears()
        try:
            plain, types = build_decoder(model, config, step, linears)
        except OverflowError as error:
            raise ExportError(
                f"{model.checkpoint.path}: {error} of bfloat16, in which XNNPACK has scales of groups: quantize it "
                "again, or use another --to."
            ) from error
        decoder = CachedDecoder(plain.network, context).eval()
        step("tracing")
        traced = trace_cached(decoder)
        step("lowering to XNNPACK")
        (directory / EXECUTORCH_FILE).write_bytes(lower(traced, len(linears.integers)))
        step("looking for the integers in the file")
        copy_companions_of(model, directory)
        stored = stored_in(directory / EXECUTORCH_FILE, _integers(linears), _others(decoder))
        more = {
            "input_bits": 8,
            "context": context,
            "same_inputs": expected_inputs(model) and not linears.scale_error,
        }
        sums = {name: asdict(place) for name, place in stored.items()}
        write_sums(directory, "executorch", sums, more, data=EXECUTORCH_FILE)
        size = bytes_of(directory)
    progress(1, 1, "done")
    return Exported(out, "executorch", size, types, tuple(_notes(model, linears, context)))


def _integers(linears: PhoneLinears) -> dict[str, Any]:
    """By name, the bytes of codes and scales as XNNPACK has them in a file."""
    found: dict[str, Any] = {}
    for name, layer in linears.integers.items():
        codes = layer.codes
        found[f"{name}.weight"] = halves(codes, 8) if layer.bits == 4 else _raw(codes).reshape(-1)
        scale = layer.scale.bfloat16() if layer.scale.ndim == 2 else layer.scale
        found[f"{name}.weight.scales"] = _raw(scale)
    return found


def _others(decoder: CachedDecoder) -> dict[str, Any]:
    """By name, the bytes of parameters that are not quantized, if they lie in the file as they are here."""
    return {name.removeprefix("network."): _raw(p) for name, p in decoder.named_parameters()}


def _raw(value: Tensor) -> Any:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _notes(model: StoredModel, linears: PhoneLinears, context: int) -> Iterator[str]:
    yield f"the cache has room for {context} tokens"
    if linears.integers:
        yield from input_notes(model, "XNNPACK")
    if linears.scale_error:
        yield f"scales of groups are rounded to bfloat16, by at most {linears.scale_error:.1e} of their size"
    few = sorted({s.weight.bits for s in model.schemes.values() if s.weight} & {2, 3, 5, 6, 7})
    if few:
        yield f"weights of {few[0]} bits are stored in {4 if few[0] < 4 else 8}"
    yield "layers that are not quantized are stored in float32"
    yield from missing_tokenizer(model)


def _package() -> Any:
    """What lowers a traced graph to the bytes of a program: (graph, integer layers) → bytes.

    Raises MissingExtraError without the package executorch.
    """
    try:
        with _quiet():
            exir: Any = importlib.import_module("executorch.exir")
            xnnpack: Any = importlib.import_module(
                "executorch.backends.xnnpack.partition.xnnpack_partitioner"
            )
    except ImportError as error:
        raise MissingExtraError(
            "Programs of ExecuTorch are written with the package executorch: pip install -c constraints.txt "
            "'.[executorch]', or make an environment by scripts/make_phones_environment.sh."
        ) from error

    def lower(traced: Any, layers: int) -> bytes:
        with _quiet():
            edge = exir.to_edge_transform_and_lower(
                traced, partitioner=[xnnpack.XnnpackPartitioner()]
            )
            _check_delegated(edge.exported_program().graph)
            program = edge.to_executorch(exir.ExecutorchBackendConfig(run_reinplace_pass=True))
        return bytes(program.buffer)

    return lower


def _check_delegated(graph: Any) -> None:
    """Raises ExportError where an operation of a layer in integers was left to ExecuTorch's own kernels."""
    left = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    for target in left:
        if "quantize" in target or "choose_qparams" in target or "linear" in target:
            raise ExportError(
                f"ExecuTorch's XNNPACK backend did not take all layers ({target} is left): use the version that "
                "pyproject.toml names."
            )


class _quiet:  # noqa: N801
    """No warnings of libraries meanwhile."""

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(self._level)
        self._caught.__exit__(None, None, None)
