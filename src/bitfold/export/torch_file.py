"""A directory with a graph of `torch.export` from an artifact, which runs without bitfold."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

from bitfold.export.artifact import tensor_sum
from bitfold.export.directory import appearing, bytes_of
from bitfold.export.exported import Exported, Progress
from bitfold.export.model_directory import copy_companions_of, missing_tokenizer, refuse_unsaid
from bitfold.export.onnx_graph import Stored
from bitfold.export.reading import StoredModel
from bitfold.export.sums import write_sums
from bitfold.export.torch_decoder import build_decoder, trace_decoder
from bitfold.models.config import read_config

__all__ = ["PROGRAM_FILE", "export_torch"]

PROGRAM_FILE = "model.pt2"


def export_torch(model: StoredModel, out: Path, progress: Progress) -> Exported:
    """Write an artifact as a directory with model.pt2, which appears whole or not at all.

    The packed weights are in memory, all of them. Raises ExportError for what the graph would compute differently,
    OutputError where it cannot be written.
    """
    refuse_unsaid(model, "a graph of torch.export")
    config: Any = read_config(model.checkpoint)
    steps = len(model.schemes) + 3
    done = iter(range(steps))

    def step(what: str) -> None:
        progress(next(done, steps - 1), steps, what)

    with appearing(out) as directory:
        decoder, types = build_decoder(model, config, step)
        step("tracing")
        program = trace_decoder(decoder)
        torch.export.save(program, directory / PROGRAM_FILE)
        copy_companions_of(model, directory)
        stored = _stored(directory / PROGRAM_FILE)
        sums = {name: asdict(place) for name, place in stored.items()}
        bits = [s.activation.bits for s in model.schemes.values() if s.activation is not None]
        more = {"input_bits": min(bits, default=None)}
        write_sums(directory, "torch", sums, more, data=PROGRAM_FILE)
        size = bytes_of(directory)
    progress(1, 1, "done")
    return Exported(out, "torch", size, types, tuple(_notes(model)))


def _stored(file: Path) -> dict[str, Stored]:
    """Of every weight, with what is before it in the archive; and of what follows the last one, under `the graph`.

    Weights lie in the archive as they lie in memory.
    """
    ends: dict[str, int] = {}
    with ZipFile(file) as archive, file.open("rb") as raw:
        members = {info.filename: info for info in archive.infolist()}
        for path in members:
            if not path.endswith("_config.json"):
                continue
            for name, entry in json.loads(archive.read(path))["config"].items():
                info = members[f"{path.rpartition('/')[0]}/{entry['path_name']}"]
                # A local header: 30 bytes, of which the last 4 are the lengths of a name and of an extra field.
                raw.seek(info.header_offset + 26)
                lengths = np.frombuffer(raw.read(4), dtype="<u2").astype(int)
                start = info.header_offset + 30 + int(lengths.sum())
                ends.setdefault(name.removeprefix("network."), start + info.file_size)
    places = {"the graph": file.stat().st_size, **ends}
    stored, start = {}, 0
    for name, end in sorted(places.items(), key=lambda item: item[1]):
        if end == start:
            continue  # the same as the one before, or nothing
        raw_bytes = np.fromfile(file, dtype=np.uint8, count=end - start, offset=start)
        stored[name] = Stored(start, end - start, tensor_sum(torch.from_numpy(raw_bytes)))
        start = end
    return stored


def _notes(model: StoredModel) -> Iterator[str]:
    weights = [s.weight for s in model.schemes.values() if s.weight and s.weight.grid == "int"]
    between = sorted({weight.bits for weight in weights} & {3, 5, 6, 7})
    if between:
        yield f"weights of {between[0]} bits are stored in {4 if between[0] == 3 else 8}"
    yield from missing_tokenizer(model)
