"""What directories with a graph have in common: models that no graph is written of, and what lies beside the graph."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfold.errors import ExportError
from bitfold.export.artifact import companion_files, copy_companions
from bitfold.export.reading import StoredModel

__all__ = [
    "copy_companions_of",
    "copy_probe",
    "missing_tokenizer",
    "refuse_unsaid",
    "unpacks_in_scales",
    "write_json",
]

_PROBE = "verification.npz"


def refuse_unsaid(model: StoredModel, where: str) -> None:
    """Raises ExportError for maps that run, and for queries, keys or values that are quantized."""
    model.refuse_running(where)
    if model.quantizes_heads:
        raise ExportError(
            f"{model.checkpoint.path} quantizes queries, keys or values, which {where} is written without: "
            "quantize by a scheme that leaves them alone (without q and kv in its notation), or use another --to."
        )


def copy_companions_of(model: StoredModel, directory: Path) -> None:
    """Config (of the model that is not quantized), tokenizer, chat template, generation config, and the probe."""
    source = model.checkpoint.path
    left = ("quantization_config", "attn_implementation")
    content = {key: value for key, value in model.config.items() if key not in left}
    write_json(directory / "config.json", content)
    copy_companions(source, directory)
    copy_probe(source, directory)


def copy_probe(source: Path, directory: Path) -> None:
    """The simulation's logits, where there are any: they say of which artifact a directory is."""
    if (source / _PROBE).is_file():
        shutil.copyfile(source / _PROBE, directory / _PROBE)


def unpacks_in_scales(model: StoredModel) -> bool:
    """Whether the artifact's own loader, and with it the simulation, unpacks weights in the dtype of their scales:
    compressed-tensors does where it does so once, at loading."""
    settings = model.config.get("quantization_config") or {}
    return bool(settings.get("dequantize"))


def missing_tokenizer(model: StoredModel) -> Iterator[str]:
    """The note of a model that has none."""
    source = model.checkpoint.path
    if not any(file.name.startswith("tokenizer") for file in companion_files(source)):
        yield f"{source} has no tokenizer, so there is none beside the graph"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
