"""Adapters and biases beside a base that stays as it is: what their directory says, and the model they make of it.

    bitfold_adapter.json        what it is of: the base's path and checksum, the scheme of an original, figures
    adapter_config.json         peft's, with adapter_model.safetensors: LoRA (arXiv 2106.09685), where there is one
    adapter_model.safetensors
    biases.safetensors          what is added to each bias, float32, by its name: BitFit (arXiv 2106.10199)

The base is not in it. It is found by its path again, and has to have the checksum it had.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitfold.errors import CheckpointError, MissingExtraError
from bitfold.models.checkpoint import Checkpoint, sha256_of
from bitfold.models.headers import read_json
from bitfold.numerics import Scheme
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.frozen import FrozenLinear, load_frozen
from bitfold.runtime.loading import quiet

__all__ = [
    "BIASES",
    "LORA_CONFIG",
    "LORA_WEIGHTS",
    "MARK",
    "AdapterFile",
    "add_biases",
    "base_of",
    "base_sum",
    "biases_of",
    "is_adapter",
    "load_adapted",
    "peft_or_error",
    "read_adapter",
    "read_deltas",
    "read_lora",
    "teach_peft",
]

MARK = "bitfold_adapter.json"
BIASES = "biases.safetensors"
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """What `bitfold_adapter.json` says.

    kinds: `lora`, `bitfit` or both. base: the directory, or the name on the hub, it was trained on; base_sum: of its
    weights and config. scheme: in which an original is rounded as it is loaded, None where the base is quantized by
    itself; double: whether its scales are nested. figures: of the training, for people.
    """

    kinds: tuple[str, ...]
    base: str
    base_sum: str
    scheme: str | None = None
    double: bool = True
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The file's content."""
        return json.dumps({"version": _VERSION} | asdict(self), indent=2) + "\n"


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, bitfold's or peft's alone."""
    return (directory / MARK).is_file() or (
        (directory / LORA_CONFIG).is_file() and not (directory / "config.json").is_file()
    )


def read_adapter(directory: Path) -> AdapterFile:
    """What the directory of an adapter says of itself; CheckpointError where it is damaged, or not bitfold's."""
    if not (directory / MARK).is_file():
        raise CheckpointError(
            f"{directory} is an adapter that bitfold did not make ({MARK} is missing), so nothing says which base it "
            "belongs to in few bits: load it with peft"
        )
    content = read_json(directory / MARK)
    if content.pop("version", None) != _VERSION:
        raise CheckpointError(
            f"{directory / MARK} is of another version of bitfold: use the one that wrote it, or train again"
        )
    try:
        found = AdapterFile(**content | {"kinds": tuple(content["kinds"])})
        if not found.kinds or not {*found.kinds} <= {"lora", "bitfit"}:
            raise ValueError(f"kinds {found.kinds}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / MARK} is damaged ({' '.join(str(error).split())}): train again"
        ) from error
    needed = {"lora": (LORA_CONFIG, LORA_WEIGHTS), "bitfit": (BIASES,)}
    for file in (directory / name for kind in found.kinds for name in needed[kind]):
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks {file.name}: copy it again, or train again")
    return found


def base_of(directory: Path, adapter: AdapterFile) -> Path:
    """The base's directory; CheckpointError where it is gone, or no longer what the adapter was trained on."""
    place = Path(adapter.base)
    if place.is_absolute() and not place.is_dir():
        raise CheckpointError(
            f"The base of the adapter {directory} was at {place}, which is gone: put it there again, or write its new "
            f"place as `base` into {directory / MARK}"
        )
    found = find_checkpoint(adapter.base)
    if base_sum(found) != adapter.base_sum:
        raise CheckpointError(
            f"The base of the adapter {directory}, {found}, is not the one that it was trained on (its checksum is "
            "another): put that one there again, or train again"
        )
    return found


def base_sum(directory: Path) -> str:
    """The SHA-256 of a checkpoint's weight files and config.json, in the order of their names."""
    digest = hashlib.sha256(sha256_of(directory / "config.json").encode())
    for file in Checkpoint(directory).files:
        digest.update(f"{file.name}:{sha256_of(file)}".encode())
    return digest.hexdigest()


def load_adapted(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base of an adapter, frozen and packed, with the adapter on it, in evaluation mode.

    Raises CheckpointError where one of the two is gone, damaged, or does not belong to the other; MissingExtraError
    without peft, where there is LoRA.
    """
    adapter = read_adapter(directory)
    model = load_frozen(
        base_of(directory, adapter),
        device=device,
        dtype=dtype,
        scheme=None if adapter.scheme is None else Scheme.parse(adapter.scheme),
        double=adapter.double,
        trust_remote_code=trust_remote_code,
    )
    # Biases first: LoRA hides the layers by their names.
    if "bitfit" in adapter.kinds:
        deltas = read_deltas(directory)
        add_biases(model)
        biases = biases_of(model)
        if deltas.keys() != biases.keys() or any(
            deltas[name].shape != bias.shape for name, bias in biases.items()
        ):
            raise CheckpointError(f"{directory / BIASES} is of another model: train again")
        for name, bias in biases.items():
            bias.data = (bias.data.float() + deltas[name].to(bias.device)).to(bias.dtype)
    if "lora" in adapter.kinds:
        _put_lora(model, directory)
    return model.requires_grad_(False).eval()


def add_biases(model: nn.Module) -> None:
    """Give every linear layer that has no bias one of zeros, and every one but the head's stays where it is."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if not isinstance(module, nn.Linear | FrozenLinear) or module is head:
            continue
        if module.bias is None:
            kind = next(t for t in (*module.parameters(), *module.buffers())).device
            dtype = getattr(model, "dtype", torch.float32)
            zeros = torch.zeros(module.out_features, dtype=dtype, device=kind)
            module.bias = nn.Parameter(zeros, requires_grad=False)


def biases_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All of a model's biases, those of norms too, by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def read_deltas(directory: Path) -> dict[str, Tensor]:
    """What is added to each bias, by its name, float32."""
    return _read(directory / BIASES)


def read_lora(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer, by its name in the model, alpha/rank · B [out, rank] and A [rank, in], float32: their product is
    what the adapter adds to the weight. CheckpointError for what is damaged, or no plain LoRA."""
    config, tensors = read_json(directory / LORA_CONFIG), _read(directory / LORA_WEIGHTS)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        if config.get("use_dora") or config.get("use_rslora"):
            raise ValueError("DoRA or rank-stabilised LoRA")
        factor = float(config["lora_alpha"]) / int(config["r"])
        for name, first in _without_prefix(tensors).items():
            layer, mark, _ = name.partition(".lora_A.")
            if mark:
                second = tensors[f"base_model.model.{layer}.lora_B.weight"]
                found[layer] = (factor * second.float(), first.float())
        if 2 * len(found) != len(tensors):
            raise ValueError("more than pairs of A and B")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{directory} is no LoRA that bitfold merges ({' '.join(str(error).split())}): merge with peft, or train "
            "again"
        ) from error
    return found


def peft_or_error() -> Any:
    """The module peft; MissingExtraError where it is not installed."""
    # It asks transformers, which warns where it finds no GPU and no network; and it takes seconds.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "LoRA adapters are peft's, which is not installed: pip install 'bitfold[train]' (or peft); BitFit does "
            "without"
        ) from error
    return peft


def teach_peft(config: Any) -> Any:
    """Have a LoraConfig take packed layers as it takes linear ones; returns it."""
    from peft.tuners.lora import Linear

    config._register_custom_module({FrozenLinear: Linear})
    return config


def _put_lora(model: PreTrainedModel, directory: Path) -> None:
    peft = peft_or_error()
    tensors = _read(directory / LORA_WEIGHTS)
    try:
        config = teach_peft(peft.LoraConfig.from_pretrained(str(directory)))
        config.inference_mode = True
        with quiet():  # of layers that it was taught a moment ago
            peft.inject_adapter_in_model(config, model)
        report = peft.set_peft_model_state_dict(model, _without_prefix(tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} does not fit its base ({' '.join(str(error).split())[:200]}): train again"
        ) from error
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        name = next(iter([*missing, *report.unexpected_keys]))
        raise CheckpointError(
            f"{directory / LORA_WEIGHTS} does not fit its base ({name}): train again"
        )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.device)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are in the model itself, and not in the one that peft wraps round it."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}): copy it again, or train again"
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{file} holds numbers in {name} that are not finite: train again"
            )
    return tensors
