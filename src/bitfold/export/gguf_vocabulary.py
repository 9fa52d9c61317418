"""A tokenizer.json from the vocabulary of a GGUF file: the way back from `gguf_tokenizer`.

Two kinds: byte-level BPE, whose way of cutting text into words has a name there, and SentencePiece's BPE (`llama`),
where pieces are joined by their scores: the join of best score first, of whichever two pieces it is made.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError
from bitfold.export.gguf_reading import GgufFile, token_id
from bitfold.export.gguf_sentencepiece import SPACE
from bitfold.export.gguf_tokenizer import PATTERNS

__all__ = ["UnknownTokenizerError", "tokenizer_files", "write_tokenizer"]

# Other names that llama.cpp has for the same cut (llama-vocab.cpp).
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# `gguf.TokenType`.
_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


class UnknownTokenizerError(Exception):
    """A tokenizer of a kind that is not written as a tokenizer.json: a clause that goes on after "because"."""


def write_tokenizer(file: GgufFile, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a file's vocabulary in a directory.

    Raises UnknownTokenizerError for a kind that bitfold cannot write, CheckpointError for a damaged one.
    """
    for name, content in tokenizer_files(file.settings, file.path).items():
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (out / name).write_text(text, encoding="utf-8")


def tokenizer_files(settings: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Both files' content by name, from the keys of a GGUF file's head; `path` is for what is said of it."""
    kind = settings.get("tokenizer.ggml.model")
    try:
        tokens = _texts(settings, "tokens")
        types = list(settings.get("tokenizer.ggml.token_type", [1] * len(tokens)))
        if len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens of {len(types)} types")
        if kind == "gpt2":
            content = _byte_level(settings, tokens, types)
        elif kind == "llama":
            content = _sentencepiece(settings, tokens, types)
        else:
            raise UnknownTokenizerError(f"it is of the kind '{kind}'")
        content["post_processor"] = _around(settings, tokens, kind)
        config = _config(settings, tokens)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"The vocabulary of {path} is damaged ({said}): make or download the file again."
        ) from error
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _texts(settings: Mapping[str, Any], name: str) -> list[str]:
    """An array of text; ValueError for another."""
    found = settings[f"tokenizer.ggml.{name}"]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"its {name} are no list of text")
    return found


def _byte_level(
    settings: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    name = settings.get("tokenizer.ggml.pre", "default")
    name = _SAME.get(name, name)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    regex = next((pattern for pattern, known in PATTERNS.items() if known == name), None)
    steps: list[dict[str, Any]]
    if name == "gpt-2":
        steps = [level | {"use_regex": True}]
    elif name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        steps = [digits, level | {"use_regex": True}]
    elif regex is not None:
        cut = {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }
        steps = [cut, level | {"use_regex": False}]
    else:
        raise UnknownTokenizerError(f"it cuts text into words as '{name}'")
    pairs = [merge.split(" ") for merge in _texts(settings, "merges")]
    if odd := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"its merge {' '.join(odd[0])[:40]!r} is not of two tokens")
    return _tokenizer(
        tokens,
        types,
        pairs,
        normalizer=None,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        decoder=level | {"use_regex": True},
        ignore_merges=name == "llama-bpe",
    )


def _sentencepiece(
    settings: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    prefix = bool(settings.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers: list[dict[str, Any]] = [replace]
    if prefix:
        normalizers = [{"type": "Prepend", "prepend": SPACE}, replace]
        decoders = [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    unknown = token_id(settings, "unknown", len(tokens))
    return _tokenizer(
        tokens,
        types,
        _joins(tokens, types, settings["tokenizer.ggml.scores"]),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )


def _joins(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every two pieces whose join is a piece, those of the best join first."""
    apart = (_CONTROL, _UNUSED, _UNKNOWN, _BYTE)
    number = {t: i for i, t in enumerate(tokens) if types[i] not in apart}
    found = []
    for token, index in number.items():
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(a, b) for a, b in parts if a in number and b in number]
        pairs.sort(key=lambda pair: (number[pair[0]], number[pair[1]]))
        found += [(-float(scores[index]), index, place, pair) for place, pair in enumerate(pairs)]
    return [list(pair) for *_, pair in sorted(found)]


def _tokenizer(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[Sequence[str]],
    *,
    normalizer: Any,
    pre_tokenizer: Any,
    decoder: Any,
    **model: Any,
) -> dict[str, Any]:
    """tokenizer.json but for its post_processor. Tokens of the type "unused" stand for rows of the embeddings that have
    no token."""
    used = [(i, token) for i, token in enumerate(tokens) if types[i] != _UNUSED]
    special = (_UNKNOWN, _CONTROL)
    added = [
        {
            **{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": types[i] in special},
        }
        for i, token in used
        if types[i] in (*special, _USER)
    ]
    usual = {
        **{"dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False},
        "ignore_merges": False,
    }
    vocabulary = {token: i for i, token in used}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            **{"type": "BPE", **usual, **model},
            **{"vocab": vocabulary, "merges": [list(pair) for pair in merges]},
        },
    }


def _around(settings: Mapping[str, Any], tokens: Sequence[str], kind: str) -> dict[str, Any]:
    """The tokens that are put around a text; llama.cpp's defaults where the file says nothing."""
    name = settings.get("tokenizer.ggml.pre")
    usually = kind == "llama" or _SAME.get(str(name), name) == "llama-bpe"
    asked = {
        "bos": bool(settings.get("tokenizer.ggml.add_bos_token", usually)),
        "eos": bool(settings.get("tokenizer.ggml.add_eos_token", False)),
    }
    found = {one: token_id(settings, one, len(tokens)) for one in asked if asked[one]}
    ids = {one: index for one, index in found.items() if index is not None}
    put = {one: tokens[index] for one, index in ids.items()}

    def parts(text: str, number: int) -> list[dict[str, Any]]:
        first = [{"SpecialToken": {"id": put["bos"], "type_id": number}}] if "bos" in put else []
        last = [{"SpecialToken": {"id": put["eos"], "type_id": number}}] if "eos" in put else []
        return [*first, {"Sequence": {"id": text, "type_id": number}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": [*parts("A", 0), *parts("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [ids[one]], "tokens": [token]} for one, token in put.items()
        },
    }


def _config(settings: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """tokenizer_config.json: the tokens that have a name, and the chat template."""
    result: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for theirs, ours in _SPECIAL.items():
        if (index := token_id(settings, theirs, len(tokens))) is not None:
            result[f"{ours}_token"] = tokens[index]
    if (template := settings.get("tokenizer.chat_template")) is not None:
        result["chat_template"] = template
    return result
