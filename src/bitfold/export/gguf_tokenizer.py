"""A tokenizer in llama.cpp's words: byte-level BPE, whose way of cutting text before merging has a name there, or
SentencePiece's BPE, whose pieces have scores."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitfold.errors import ExportError
from bitfold.export.gguf_model import gguf_package
from bitfold.export.gguf_sentencepiece import (
    byte_pieces,
    piece_scores,
    puts_space_first,
    spares_space,
)
from bitfold.models.headers import read_json

__all__ = ["PATTERNS", "add_tokenizer", "check_tokenizer"]

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    _WORD + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORD + r"\p{N}" + _REST: "qwen2",
}
"""The regular expressions of `Split` before byte-level BPE, and llama.cpp's names for them (llama-vocab.cpp)."""


def add_tokenizer(writer: Any, directory: Path, vocabulary: int) -> tuple[str, ...]:
    """Give a `gguf.GGUFWriter` the tokenizer of a checkpoint: tokens, merges, special tokens, chat template; returns
    notes on what llama.cpp does otherwise.

    vocabulary: rows of the embeddings; places without a token get a name that no text has.
    Raises ExportError for a tokenizer that bitfold cannot say there.
    """
    gguf = gguf_package()
    name = check_tokenizer(directory)
    file = directory / "tokenizer.json"
    content = read_json(file)
    space_first = puts_space_first(content)
    tokens: dict[str, int] = dict(content["model"]["vocab"])
    types = dict.fromkeys(tokens.values(), gguf.TokenType.NORMAL)
    for added in content.get("added_tokens", ()):
        tokens[added["content"]] = added["id"]
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = kind
    if tokens and max(tokens.values()) >= vocabulary:
        raise ExportError(
            f"{file} has a token of number {max(tokens.values())}, but the model has embeddings for {vocabulary}: they "
            "are of different models."
        )
    by_number = {index: token for token, index in tokens.items()}
    if space_first is None:
        writer.add_tokenizer_model("gpt2")
    else:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(space_first)
        apart = {by_number[i] for i, kind in types.items() if kind == gguf.TokenType.CONTROL}
        scores = piece_scores(content, apart, file)
        lowest = -float(len(scores))
        writer.add_token_scores(
            [scores.get(by_number.get(i, ""), lowest) for i in range(vocabulary)]
        )
        types |= dict.fromkeys(byte_pieces(tokens, file), gguf.TokenType.BYTE)
        if (unknown := content["model"].get("unk_token")) is not None:
            types[tokens[unknown]] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_pre(name)
    writer.add_token_list([by_number.get(i, f"[PAD{i}]") for i in range(vocabulary)])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in range(vocabulary)])
    special = gguf.SpecialVocab(directory, load_merges=space_first is None, n_vocab=vocabulary)
    special.add_special_token |= _added_around(file, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)
    if not spares_space(content):
        return ()
    return (
        "llama.cpp puts a space before every text, this tokenizer only before one that does not begin with a space",
    )


def check_tokenizer(directory: Path) -> str:
    """What llama.cpp calls the tokenizer of a checkpoint. Raises ExportError for one that it has not."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ExportError(
            f"{directory} has no tokenizer.json, which a GGUF file needs: copy the original model's into it."
        )
    content = read_json(file)
    return "default" if puts_space_first(content) is not None else _name_of(content, file)


def _name_of(content: dict[str, Any], file: Path) -> str:
    """What llama.cpp calls this way of cutting text into words."""
    model, before = content["model"], content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
            return "gpt-2"
        one_by_one = kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
        if one_by_one and steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in PATTERNS:
                return PATTERNS[pattern]
    raise ExportError(
        f"{file} cuts text in a way that bitfold cannot name for llama.cpp ({model['type']} after "
        f"{json.dumps(kinds)}): byte-level BPE as in GPT-2, Llama 3, Qwen2 and SmolLM, and SentencePiece's as in Llama "
        "2 and Gemma can be."
    )


def _added_around(file: Path, special: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last tokens around a text."""
    ids = Tokenizer.from_file(str(file)).encode("a").ids
    return {"bos": ids[0] == special.get("bos"), "eos": ids[-1] == special.get("eos")}
