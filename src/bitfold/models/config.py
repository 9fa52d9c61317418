"""A checkpoint's config.json as transformers reads it."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from bitfold.errors import CheckpointError
from bitfold.models.checkpoint import Checkpoint

__all__ = ["config_in", "read_config", "said_of"]


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's config as transformers reads it.

    Raises CheckpointError where it cannot be read.
    """
    return config_in(checkpoint.path)


def config_in(directory: Path) -> PretrainedConfig:
    """The same of a directory that holds a config.json."""
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:
        # transformers and huggingface_hub raise a dozen classes here, all about this file.
        raise CheckpointError(
            f"{directory / 'config.json'} is not a valid config ({said_of(error)}): "
            "copy or download it again."
        ) from error


def said_of(error: Exception) -> str:
    """What transformers says of a value, without the names of the validators it went through."""
    said = str(error).rpartition("Error: ")[2].strip().rstrip(".")
    return said if " " in said else f"{type(error).__name__}: {said}"
