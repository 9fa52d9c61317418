"""What an exported directory is, for ONNX Runtime, OpenVINO or torch.export."""

from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError
from bitfold.export.sums import SUMS_FILE
from bitfold.models import family_of
from bitfold.models.config import config_in
from bitfold.models.family import head_counts
from bitfold.models.headers import read_json
from bitfold.pipeline.probe import PROBE_FILE

__all__ = ["describe_export"]

_ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch.export"}


def describe_export(path: Path) -> dict[str, Any]:
    """A directory as plain data, under the keys of `describe`, and: format, form (of onnx), engine (what runs it),
    input_bits (of quantized inputs, or None), recorded (whether the simulation's logits are there, which
    `bitfold verify` holds it against).

    Raises CheckpointError where its export.json, or config.json, is damaged.
    """
    content = read_json(path / SUMS_FILE)
    format, tensors = content.get("format"), content.get("tensors")
    if format not in _ENGINES or not isinstance(tensors, dict):
        raise CheckpointError(f"{path / SUMS_FILE} is damaged: export the artifact again.")
    config: Any = config_in(path)
    heads, kv_heads, head_dim = head_counts(config)
    return {
        "path": str(path),
        "kind": f"exported for {_ENGINES[format]}",
        "format": format,
        **({"form": content["form"]} if "form" in content else {}),
        "engine": _ENGINES[format],
        "input_bits": content.get("input_bits"),
        "recorded": (path / PROBE_FILE).is_file(),
        "model_type": config.model_type,
        "family": family_of(config.model_type).name,
        "blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": config.vocab_size,
        "tied_head": bool(config.tie_word_embeddings),
        "bytes_by_dtype": {},
        "tensors": len(tensors),
        "size_bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "sites": [],
    }
