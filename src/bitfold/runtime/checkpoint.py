"""Find a checkpoint's directory and look at its files before anything is loaded.

transformers answers a damaged checkpoint with a traceback from deep inside, or not at all; every
check here ends in one sentence that names the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from bitfold.errors import CheckpointError

__all__ = ["check_checkpoint", "find_checkpoint", "read_json"]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
HUB_TIMEOUT_SECONDS = 10.0
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def find_checkpoint(model: str | Path, *, with_code: bool = False) -> Path:
    """The local directory of a checkpoint: `model` itself, or a snapshot of that name from the hub.

    From the hub only safetensors, configuration and tokenizer files are fetched, and the model's
    own Python files `with_code`. CheckpointError if there is no such directory and no such name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file: give the directory of a checkpoint")
    if isinstance(model, Path) or not HUB_NAME.fullmatch(model):
        raise CheckpointError(f"no such directory: {model}")
    return _fetch(model, [*HUB_FILES, "*.py"] if with_code else HUB_FILES)


def _fetch(name: str, patterns: list[str]) -> Path:
    """A snapshot of a hub repository, from the network or else from the cache."""
    # The first question is asked here and not by snapshot_download, which waits without a limit.
    try:
        revision = huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS).sha
    except RepositoryNotFoundError as error:  # gated and private ones too
        raise CheckpointError(
            f"'{name}' is neither a local directory nor a model the hub lets you read: check the"
            " name, or log in with `hf auth login` if the model is gated"
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
            f"'{name}' is not a local directory, and the hub could not be reached:"
            " give the path of a local directory"
        ) from error
    return Path(directory)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; CheckpointError if it is not there or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: is it the directory of a Hugging Face checkpoint?"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise CheckpointError(
            f"{path} is not valid JSON ({_first_line(error)}): copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def check_checkpoint(directory: Path) -> None:
    """Raise CheckpointError unless configuration and every weight file can be read.

    Of the weights only the headers are read, so this is quick whatever the size of the model.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{directory / 'config.json'} names no model_type: is it a transformers configuration?"
        )
    if (directory / WEIGHTS).is_file():
        names = _tensor_names(directory / WEIGHTS)
    elif (directory / INDEX).is_file():
        names = _check_shards(directory)
    elif pickles := sorted(found.name for glob in PICKLES for found in directory.glob(glob)):
        raise CheckpointError(
            f"{directory} has its weights only in {pickles[0]}, a pickle, which can run any code"
            " when opened and is refused: convert it to safetensors"
        )
    else:
        raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors":
        _check_scaled_weights(directory, names)


def _check_scaled_weights(directory: Path, names: set[str]) -> None:
    """Find the missing int8 weights: transformers fails as it tries to make up random ones."""
    for name in sorted(names):
        module = name.removesuffix("weight_scale")
        if module != name and not {f"{module}weight", f"{module}weight_packed"} & names:
            raise CheckpointError(
                f"{directory} has {name} but not the weight it scales: the checkpoint is incomplete"
            )


def _check_shards(directory: Path) -> set[str]:
    """The names of all tensors, after a look into every shard."""
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: copy or download it again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A shard outside the directory would make the checkpoint read files it was not given.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} places {tensor} in {shard!r}, which is no file name")
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory} has no {shard}, which {INDEX} names: copy or download it again"
            )
        if absent := sorted(tensors - _tensor_names(directory / shard)):
            raise CheckpointError(
                f"{directory / shard} does not hold {absent[0]}, as {INDEX} says"
                f" ({len(absent)} missing): shards and index are of different checkpoints"
            )
    return set(weight_map)


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({_first_line(error)}):"
            " copy or download it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
