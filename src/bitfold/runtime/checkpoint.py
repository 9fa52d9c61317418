"""Find a checkpoint's directory, and look at its files before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError

from bitfold.errors import CheckpointError
from bitfold.models.checkpoint import Checkpoint

__all__ = ["check_checkpoint", "find_checkpoint"]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
HUB_TIMEOUT_SECONDS = 10.0
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def find_checkpoint(model: str | Path, *, with_code: bool = False) -> Path:
    """The local directory of a checkpoint: `model` itself, or a snapshot of that name from the hub.

    From the hub only safetensors, configuration and tokenizer files are fetched, and the model's
    own Python files `with_code`. CheckpointError if there is no such directory and no such name.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as error:
        raise CheckpointError(
            f"The directory {model} cannot be read ({error.strerror}): check the path."
        ) from error
    if is_file:
        raise CheckpointError(
            f"{model} is a file: give the directory of a checkpoint; `bitfold import` makes one of a GGUF file."
        )
    if isinstance(model, Path) or not HUB_NAME.fullmatch(model):
        raise CheckpointError(
            f"There is no directory {model}: check the path, or give a name on the hub."
        )
    return _fetch(model, [*HUB_FILES, "*.py"] if with_code else HUB_FILES)


def _fetch(name: str, patterns: list[str]) -> Path:
    """A snapshot of a hub repository, from the network or else from the cache."""
    # The first question is asked here and not by snapshot_download, which waits without a limit.
    try:
        revision = huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS).sha
    except RepositoryNotFoundError as error:  # gated and private ones too
        raise CheckpointError(
            f"'{name}' is neither a local directory nor a model the hub lets you read: "
            "check the name, or log in with `hf auth login` if the model is gated."
        ) from error
    except Exception:  # offline, no route, a proxy's refusal: the cache may still have it
        revision = None
    try:
        directory = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=revision is None,
        )
    except Exception as error:  # the HTTP client's errors have no base that its versions share
        raise CheckpointError(
            f"'{name}' is not a local directory, and the hub could not be reached: "
            "give the path of a local directory."
        ) from error
    return Path(directory)


def check_checkpoint(directory: Path) -> None:
    """Raise CheckpointError unless configuration and every weight file can be read.

    Of the weights only the headers are read, so this is quick whatever the size of the model.
    """
    checkpoint = Checkpoint(directory)
    quantization = checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors":
        _check_scaled_weights(directory, checkpoint.tensors)


def _check_scaled_weights(directory: Path, names: Collection[str]) -> None:
    """Find the missing int8 weights: transformers fails as it tries to make up random ones."""
    for name in sorted(names):
        module = name.removesuffix("weight_scale")
        scaled = (f"{module}weight", f"{module}weight_packed")
        if module != name and not any(weight in names for weight in scaled):
            raise CheckpointError(
                f"{directory} has {name} but not the weight it scales: the checkpoint is incomplete; "
                "copy or download it again."
            )
