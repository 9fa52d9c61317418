"""The directory that comes out, beside its weights: config, tokenizer, recipe, provenance, report, model card."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COMPANIONS",
    "companion_files",
    "copy_companions",
    "index_json",
    "model_card",
    "package_versions",
    "shard_name",
    "tensor_sum",
    "tensor_sums",
]

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
)

_PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "numpy")


def shard_name(number: int, total: int) -> str:
    """Shard `number` (from 0) of `total`, as transformers counts them.

    >>> shard_name(0, 7)
    'model-00001-of-00007.safetensors'
    """
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def companion_files(source: Path) -> list[Path]:
    """Tokenizer, chat template, generation config: what travels unchanged."""
    found = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    return sorted(found)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what travels unchanged."""
    for file in companion_files(source):
        shutil.copyfile(file, target / file.name)


def index_json(shards: Mapping[str, Iterable[str]], total_bytes: int) -> str:
    """transformers' index of a sharded checkpoint, from shard name → tensor names."""
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    content = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(content, indent=2) + "\n"


def tensor_sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first 16 hexadecimal digits of each tensor's SHA-256, so that damage can be told by name."""
    return {name: tensor_sum(tensor) for name, tensor in tensors.items()}


def tensor_sum(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of what an artifact's bytes depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_card(
    source: str, scheme: str, method: str, report: Mapping[str, Any], loads_with: str
) -> str:
    """README.md of the artifact."""
    probe = report["probe"]
    parts = [report[key]["note"] for key in ("online", "distillation") if key in report]
    notes = "".join(f"\n{note}\n" for note in parts)
    return f"""---
tags: [quantized, bitfold]
---
# {Path(source).name}, {scheme} by {method}

Made by [bitfold](https://pypi.org/project/bitfold/) from `{source}`: scheme **{scheme}**, method **{method}**,
{report["bits_per_weight"]:.3f} bits per quantized weight (scales, zero-points and codebooks counted).
{notes}
On {probe["tokens"]} probe tokens its distance to the original is KL {probe["kl_mean"]:.4f} nats per token, and the top
token agrees {probe["top1_agreement"]:.1%} of the time. That is a smoke test, not an evaluation: measure it on your own
text with `bitfold eval . --text FILE --against {source}`.

## Use

{loads_with}

`recipe.yaml` says in full how it was made, `provenance.json` from what, `report.json` what each layer lost.
The licence of the original model holds for this one too.
"""
