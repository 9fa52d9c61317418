"""An OpenVINO directory from an artifact: its intermediate representation, and what belongs to a model."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

from bitfold.errors import ExportError
from bitfold.export.directory import appearing, bytes_of
from bitfold.export.exported import Exported, Progress, unstored
from bitfold.export.model_directory import (
    copy_companions_of,
    missing_tokenizer,
    refuse_unsaid,
    unpacks_in_scales,
)
from bitfold.export.onnx_decoder import add_decoder
from bitfold.export.onnx_graph import DATA_FILE as ONNX_DATA_FILE
from bitfold.export.onnx_graph import Graph, onnx_package
from bitfold.export.openvino_graph import DATA_FILE, write_graph
from bitfold.export.openvino_linear import OpenVinoLinears
from bitfold.export.openvino_package import openvino_package
from bitfold.export.reading import StoredModel
from bitfold.export.sums import write_sums
from bitfold.models.config import read_config
from bitfold.version import VERSION

__all__ = ["export_openvino"]


def export_openvino(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact as a directory with openvino_model.xml and .bin, which appears whole or not at all.

    On the way the weights lie on disk twice, one of them in memory at a time. Raises ExportError for what OpenVINO
    would run differently, OutputError where it cannot be written, MissingExtraError without the packages openvino and
    onnx.
    """
    openvino_package()
    onnx_package()
    refuse_unsaid(model, "OpenVINO")
    config: Any = read_config(model.checkpoint)
    if getattr(config, "attn_logit_softcapping", None):
        raise ExportError(
            "The model caps attention's scores (attn_logit_softcapping), which OpenVINO is written without: use "
            "another --to."
        )
    steps = config.num_hidden_layers + 3
    done = iter(range(steps))
    with appearing(out) as directory:
        between = directory / "onnx"
        between.mkdir()
        with (between / ONNX_DATA_FILE).open("wb") as data:
            graph = Graph(data)
            linears = OpenVinoLinears(graph, model)
            add_decoder(
                graph, linears, model, config, lambda what: progress(next(done), steps, what)
            )
        (between / "model.onnx").write_bytes(graph.to_bytes("model", {}))
        progress(next(done), steps, DATA_FILE)
        stored = write_graph(between, graph.stored, directory, VERSION)
        rmtree(between)
        copy_companions_of(model, directory)
        more = {
            "input_bits": linears.input_bits,
            "simulation_unpacks_in_half": linears.half_scales and unpacks_in_scales(model),
        }
        sums = {name: asdict(place) for name, place in stored.items()}
        write_sums(directory, "openvino", sums, more, data=DATA_FILE)
        size = bytes_of(directory)
    progress(1, 1, "done")
    return Exported(out, "openvino", size, dict(linears.types), tuple(_notes(model, linears)))


def _notes(model: StoredModel, linears: OpenVinoLinears) -> Iterator[str]:
    yield from unstored(linears.unstored, "16 or 32 bits")
    weights = [s.weight for s in model.schemes.values() if s.weight and s.weight.grid == "int"]
    between = sorted({weight.bits for weight in weights} & {3, 5, 6, 7})
    if between:
        yield f"weights of {between[0]} bits are stored in {4 if between[0] == 3 else 8}, the next that OpenVINO has"
    yield from missing_tokenizer(model)
