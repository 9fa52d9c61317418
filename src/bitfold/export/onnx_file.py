"""An ONNX directory from an artifact: graph, weights, and what belongs to a model, for ONNX Runtime."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bitfold.errors import ExportError
from bitfold.export.directory import appearing, bytes_of
from bitfold.export.exported import Exported, Progress, rounded_scales, unstored
from bitfold.export.model_directory import (
    copy_companions_of,
    missing_tokenizer,
    refuse_unsaid,
    unpacks_in_scales,
    write_json,
)
from bitfold.export.onnx_decoder import add_decoder
from bitfold.export.onnx_genai import genai_config
from bitfold.export.onnx_graph import DATA_FILE, Graph, onnx_package
from bitfold.export.onnx_linear import Linears
from bitfold.export.onnx_tensorrt import TensorRtLinears, tensorrt_faults
from bitfold.export.reading import StoredModel
from bitfold.export.sums import write_sums
from bitfold.models.config import read_config
from bitfold.version import VERSION

__all__ = ["GRAPH_FILE", "export_onnx"]

GRAPH_FILE = "model.onnx"


def export_onnx(model: StoredModel, out: Path, progress: Progress, *, form: str) -> Exported:
    """Write an artifact as a directory with model.onnx, which appears whole or not at all.

    form: `fast` or `compact` (`onnx_integers`), or `tensorrt` (`onnx_tensorrt`). One weight is in memory at a time.
    Raises ExportError for what ONNX Runtime would run differently, OutputError where it cannot be written,
    MissingExtraError without the package onnx.
    """
    onnx_package()
    refuse_unsaid(model, "ONNX")
    config = read_config(model.checkpoint)
    blocks: Any = config
    steps = blocks.num_hidden_layers + 2
    done = iter(range(steps))
    with appearing(out) as directory:
        with (directory / DATA_FILE).open("wb") as data:
            graph, linears = _started(data, model, form)
            add_decoder(
                graph, linears, model, config, lambda what: progress(next(done), steps, what)
            )
        metadata = {"bitfold": VERSION, "form": form}
        content = graph.to_bytes(model.checkpoint.path.name, metadata)
        (directory / GRAPH_FILE).write_bytes(content)
        if form == "tensorrt" and (faults := tensorrt_faults(directory / GRAPH_FILE)):
            raise ExportError(f"TensorRT would not take the graph: {faults[0]}.")
        copy_companions_of(model, directory)
        write_json(directory / "genai_config.json", genai_config(config, model.checkpoint.path))
        more = {
            "form": form,
            "input_bits": linears.input_bits,
            "simulation_unpacks_in_half": linears.half_scales and unpacks_in_scales(model),
        }
        sums = {name: asdict(place) for name, place in graph.stored.items()}
        write_sums(directory, "onnx", sums, more, data=DATA_FILE)
        size = bytes_of(directory)
    progress(1, 1, "done")
    return Exported(out, "onnx", size, dict(linears.types), tuple(_notes(model, linears, form)))


def _started(data: BinaryIO, model: StoredModel, form: str) -> tuple[Graph, Linears]:
    """A graph, and what writes linear layers into it."""
    if form == "tensorrt":
        graph = Graph(data, dtype=torch.float16, basic=True)
        return graph, TensorRtLinears(graph, model)
    graph = Graph(data)
    return graph, Linears(graph, model, form)


def _notes(model: StoredModel, linears: Linears, form: str) -> Iterator[str]:
    yield from unstored(linears.unstored, "16 or 32 bits")
    few = {s.weight.bits for s in model.schemes.values() if s.weight and s.weight.grid == "int"}
    if form == "fast" and min(few, default=4) < 4:
        yield (
            f"weights of {min(few)} bits are stored in 4, which ONNX Runtime multiplies as they are packed; "
            'form="compact" stores fewer where it can, and is far slower'
        )
    if isinstance(linears, TensorRtLinears):
        yield "layers that are not quantized, and what is between layers, are in half precision"
        yield from rounded_scales(linears.scale_error)
    yield from missing_tokenizer(model)
