"""A directory with a model of LiteRT from an artifact, whose integers XNNPACK multiplies."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitfold.errors import ExportError
from bitfold.export.directory import appearing, bytes_of
from bitfold.export.exported import Exported, Progress
from bitfold.export.litert_decoder import LiteRtDecoder, check_litert
from bitfold.export.litert_graph import TfGraph, litert_schema
from bitfold.export.litert_linear import TfLinears
from bitfold.export.model_directory import copy_companions_of, missing_tokenizer, refuse_unsaid
from bitfold.export.phone_rules import check_phone, expected_inputs, input_notes
from bitfold.export.reading import StoredModel
from bitfold.export.sums import write_sums
from bitfold.models.config import read_config
from bitfold.version import VERSION

__all__ = ["LITERT_FILE", "export_litert"]

LITERT_FILE = "model.tflite"


def export_litert(model: StoredModel, out: Path, progress: Progress, *, context: int) -> Exported:
    """Write an artifact as a directory with model.tflite, which appears whole or not at all.

    context: tokens that the cache has room for, if the model sees as many. One weight is in memory at a time. Raises
    ExportError for what XNNPACK would compute differently, OutputError where it cannot be written, MissingExtraError
    without the package ai-edge-litert.
    """
    refuse_unsaid(model, "LiteRT")
    check_phone(model, "LiteRT")
    config: Any = read_config(model.checkpoint)
    check_litert(config)
    litert_schema()
    context = min(context, getattr(config, "max_position_embeddings", None) or context)
    steps = config.num_hidden_layers + 2
    done = iter(range(steps))
    with appearing(out) as directory:
        weights = directory / "weights"
        with weights.open("wb") as data:
            graph = TfGraph(data)
            linears = TfLinears(graph, model)
            decoder = LiteRtDecoder(
                graph,
                linears,
                model,
                config,
                context,
                lambda what: progress(next(done), steps, what),
            )
            try:
                decoder.write()
            except OverflowError as error:
                raise ExportError(
                    f"{model.checkpoint.path}: {error} of half precision, in which LiteRT has scales of groups: "
                    "quantize with --for litert, or use another --to."
                ) from error
        stored = graph.finish(directory / LITERT_FILE, weights, f"bitfold {VERSION}")
        weights.unlink()
        copy_companions_of(model, directory)
        more = {
            "input_bits": 8,
            "context": context,
            "same_inputs": expected_inputs(model) and not linears.scale_error,
        }
        sums = {name: asdict(place) for name, place in stored.items()}
        write_sums(directory, "litert", sums, more, data=LITERT_FILE)
        size = bytes_of(directory)
    progress(1, 1, "done")
    return Exported(
        out, "litert", size, dict(linears.types), tuple(_notes(model, linears, context))
    )


def _notes(model: StoredModel, linears: TfLinears, context: int) -> Iterator[str]:
    yield f"the cache has room for {context} tokens"
    if linears.integers:
        yield from input_notes(model, "XNNPACK")
    if linears.scale_error:
        yield (
            "scales of groups are rounded to half precision, and by XNNPACK to bfloat16, by at most "
            f"{linears.scale_error:.1e} of their size"
        )
    few = sorted({s.weight.bits for s in model.schemes.values() if s.weight} & {2, 3, 5, 6, 7})
    if few:
        yield f"weights of {few[0]} bits are stored in {4 if few[0] < 4 else 8}"
    yield "layers that are not quantized are stored in float32"
    yield from missing_tokenizer(model)
