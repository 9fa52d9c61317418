"""What a GGUF file is, whoever wrote it: family, sizes, types of tensors, tokenizer, head."""

from collections import Counter
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError
from bitfold.export.gguf_config import model_type_of
from bitfold.export.gguf_reading import GgufFile, open_gguf, token_id
from bitfold.models import family_of

__all__ = ["describe_gguf"]

_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"


def describe_gguf(path: Path) -> dict[str, Any]:
    """A file as plain data, under the keys of `describe`, and: format, architecture (llama.cpp's name), name,
    weights_by_type (how many weights there are in each of ggml's types), head (the type of its tensor, or `tied`),
    tokenizer (kind, cut, tokens, special tokens, whether there is a chat template), written_by, importable (whether
    `bitfold import` reads its family).

    Raises CheckpointError for a file that cannot be read.
    """
    file = open_gguf(path)
    types: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type] += tensor.nbytes
        count = 1
        for size in tensor.shape:
            count *= size
        types[tensor.type] += count
    model_type = model_type_of(file)
    heads = _number(file, "attention.head_count")
    width = _number(file, "embedding_length")
    tied = _EMBEDDINGS in file.tensors and _HEAD not in file.tensors
    return {
        "path": str(path),
        "kind": "GGUF file",
        "format": "gguf",
        "architecture": file.architecture,
        "name": file.settings.get("general.name"),
        "written_by": "bitfold" if "bitfold.sums" in file.settings else None,
        "model_type": model_type or file.architecture,
        "family": None if model_type is None else family_of(model_type).name,
        "importable": model_type is not None,
        "blocks": _number(file, "block_count"),
        "hidden_size": width,
        "heads": heads,
        "kv_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": _number(file, "attention.key_length", width // heads if heads else 0),
        "vocabulary": file.tensors[_EMBEDDINGS].shape[0] if _EMBEDDINGS in file.tensors else 0,
        "tied_head": tied,
        "head": "tied" if tied else file.tensors[_HEAD].type if _HEAD in file.tensors else None,
        "tokenizer": _tokenizer(file),
        "bytes_by_dtype": dict(sizes),
        "weights_by_type": dict(types),
        "tensors": len(file.tensors),
        "size_bytes": path.stat().st_size,
        "sites": [],
    }


def _number(file: GgufFile, key: str, default: int = 0) -> int:
    """A setting that may be missing, or differ from layer to layer; of those the largest."""
    found = file.setting(key, default)
    try:
        return max(map(int, found), default=0) if isinstance(found, list) else int(found)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file.path} is damaged ({file.architecture}.{key} is {str(found)[:40]!r}, no number): make or download "
            "it again."
        ) from error


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    known = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.settings.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = known.get("tokens", [])
    tokens = tokens if isinstance(tokens, list) else []
    names = [key.removesuffix("_token_id") for key in known if key.endswith("_token_id")]
    special = {
        name: tokens[index] for name in names if (index := _id(file, name, len(tokens))) is not None
    }
    return {
        "kind": known.get("model"),
        "cut": known.get("pre"),
        "tokens": len(tokens),
        "special": special,
        "chat_template": "tokenizer.chat_template" in file.settings,
    }


def _id(file: GgufFile, name: str, tokens: int) -> int | None:
    """The number of a special token; None where there is none, or the file is wrong about it."""
    try:
        return token_id(file.settings, name, tokens)
    except ValueError:
        return None
