"""What a model directory is: family, blocks, sites, sizes, and for an artifact its schemes, recipe and provenance."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError
from bitfold.models import family_of
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.config import read_config
from bitfold.models.family import head_counts
from bitfold.models.headers import is_export, read_json
from bitfold.report.describing_exports import describe_export
from bitfold.report.describing_gguf import describe_gguf
from bitfold.runtime.adapted import LORA_CONFIG, base_of, is_adapter, read_adapter
from bitfold.runtime.checkpoint import find_checkpoint

__all__ = ["describe"]


def describe(model: str | Path) -> dict[str, Any]:
    """A model directory, a name on the hub, a GGUF file (see `describe_gguf`) or an exported directory (see
    `describe_export`), as plain data.

    Keys: path, kind (`original`, `bitfold artifact` or `quantized by another tool`), model_type, family (None if
    bitfold has none), blocks, hidden_size, heads, kv_heads, head_dim, vocabulary, dtype, tensors, size_bytes,
    sites (kind and modules), and for an artifact format, method, scheme, bits_per_weight, online (what runs unfolded,
    where anything does), distillation (where there was one), probe, layers, recipe, provenance.

    Of an adapter: path, size_bytes, kind (`adapter`), adapter (what its file says, and LoRA's rank, alpha and targets),
    and for the rest its base's.

    Raises CheckpointError where the directory cannot be read.
    """
    if Path(model).expanduser().is_file():
        return describe_gguf(Path(model).expanduser())
    path = find_checkpoint(model)
    if is_export(path):
        return describe_export(path)
    if is_adapter(path):
        return _adapter(path)
    checkpoint = Checkpoint(path)
    config = read_config(checkpoint)
    dtypes: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
    heads, kv_heads, head_dim = head_counts(config)
    result: dict[str, Any] = {
        "path": str(path),
        "kind": _kind(path, checkpoint),
        "model_type": config.model_type,
        "blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": config.vocab_size,
        "tied_head": bool(config.tie_word_embeddings),
        "bytes_by_dtype": dict(dtypes),
        "tensors": len(checkpoint.tensors),
        "size_bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    }
    try:
        family = family_of(config.model_type)
    except BitfoldError:
        return result | {"family": None, "sites": []}
    result["family"] = family.name
    result["sites"] = [
        {"kind": type(site).__name__, **{k: v for k, v in vars(site).items() if v is not None}}
        for site in family.sites(config)
    ]
    return result | _artifact(path, checkpoint)


def _adapter(path: Path) -> dict[str, Any]:
    said = read_adapter(path)
    adapter: dict[str, Any] = vars(said) | {"kinds": list(said.kinds)}
    if "lora" in said.kinds:
        config = read_json(path / LORA_CONFIG)
        adapter |= {"rank": config["r"], "alpha": config["lora_alpha"]}
        adapter |= {"targets": config["target_modules"]}
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    mine = {"path": str(path), "kind": "adapter", "size_bytes": size, "adapter": adapter}
    return describe(base_of(path, said)) | mine


def _kind(path: Path, checkpoint: Checkpoint) -> str:
    if (path / "provenance.json").is_file():
        return "bitfold artifact"
    return "quantized by another tool" if "quantization_config" in checkpoint.config else "original"


def _artifact(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    quantization = checkpoint.config.get("quantization_config")
    result: dict[str, Any] = {"format": quantization["quant_method"]} if quantization else {}
    if (path / "report.json").is_file():
        result |= read_json(path / "report.json")
        result["provenance"] = read_json(path / "provenance.json")
        result["recipe"] = (path / "recipe.yaml").read_text(encoding="utf-8")
    return result
