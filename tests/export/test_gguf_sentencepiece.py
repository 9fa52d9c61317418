"""SentencePiece's tokenizers give the same tokens in llama.cpp, and come back by an import."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_models import DEMO, TEXT
from tokenizers import Tokenizer, models, normalizers, trainers

import bitfold
from bitfold.errors import ExportError
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.models.headers import read_json
from bitfold.runtime.load import load_tokenizer

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")

from bitfold.engines.llama_cpp import LlamaCpp

CORPUS = (
    Path(bitfold.__file__).parent / "assets" / "text" / "wikitext2-evaluation.txt"
).read_text()
TEXTS = (TEXT, " a space before", "two  spaces\t", "x", "\n", CORPUS[200_000:203_000])


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in the order of their scores, and every two pieces that join to one, in that order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.train_from_iterator(
        CORPUS[:100_000].splitlines(),
        trainers.BpeTrainer(vocab_size=1200, max_token_length=9, show_progress=False),
    )
    content = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(content["vocab"], key=content["vocab"].get)
    letters = [piece for piece in pieces if len(piece) == 1]
    joined = list(dict.fromkeys(first + second for first, second in content["merges"]))
    known = {*letters, *joined}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    return [*joined, *letters], merges


def content_of(trained: tuple[list[str], list[tuple[str, str]]], *, first: bool) -> dict[str, Any]:
    """tokenizer.json as Llama 2 (first: a space before each text, and a BOS) and Gemma have it."""
    pieces, merges = trained
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    added = [
        {"id": i, "content": name, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i, name in enumerate(special)
    ]  # fmt: skip
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
             "invert": False}  # fmt: skip
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if first else replace,
        "pre_tokenizer": None if first else split,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": bos},
        },
        "decoder": {"type": "Sequence",
                    "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": True, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [list(pair) for pair in merges]},
    }  # fmt: skip


def with_tokenizer(directory: Path, content: dict[str, Any]) -> Path:
    """The demo with another tokenizer."""
    shutil.copytree(DEMO, directory)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = read_json(directory / "tokenizer_config.json") | names
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("first", [True, False], ids=["llama-2", "gemma"])
def test_tokens_are_the_same(
    trained: tuple[list[str], list[tuple[str, str]]], first: bool, tmp_path: Path
) -> None:
    model = with_tokenizer(tmp_path / "model", content_of(trained, first=first))
    export_to(model, "gguf", tmp_path / "model.gguf")
    import_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    original, back = load_tokenizer(model), load_tokenizer(tmp_path / "back")
    with LlamaCpp(tmp_path / "model.gguf", context=8) as engine:
        for text in TEXTS:
            expected = original(text)["input_ids"]
            assert expected[0] == 1
            assert engine.tokenize(text, special=True) == expected, text
            assert back(text)["input_ids"] == expected, text
            assert back.decode(expected, skip_special_tokens=True) == text
    assert back.special_tokens_map == original.special_tokens_map


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_that_is_spared_is_said(
    trained: tuple[list[str], list[tuple[str, str]]], scheme: str, tmp_path: Path
) -> None:
    """As in newer tokenizers of Llama 2 and Mistral."""
    content = content_of(trained, first=True)
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False
    }  # fmt: skip
    model = with_tokenizer(tmp_path / "model", content)
    exported = export_to(model, "gguf", tmp_path / "model.gguf")
    assert "puts a space before every text" in exported.notes[-1]
    tokenizer = load_tokenizer(model)
    with LlamaCpp(tmp_path / "model.gguf", context=8) as engine:
        for text in TEXTS:
            same = engine.tokenize(text, special=True) == tokenizer(text)["input_ids"]
            assert same != text.startswith(" "), text


def _unlisted(content: dict[str, Any]) -> None:
    del content["model"]["merges"][5]


def _no_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0x0a>"] = content["model"]["vocab"].pop("<0x0A>")


def _moved(content: dict[str, Any]) -> None:
    """The last of a piece's merges to the end."""
    merges = content["model"]["merges"]
    joined = ["".join(pair) for pair in merges]
    place = next(i for i in range(1, len(joined)) if joined[i] == joined[i - 1])
    merges.append(merges.pop(place))


def _lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_unlisted, "does not join|llama.cpp goes by pieces"),
        (_no_byte, "has no piece <0x0A>"),
        (_moved, "goes by pieces alone"),
        (_lowercase, "cuts text in a way that bitfold cannot name"),
    ],
)
def test_what_llama_cpp_would_join_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None],
    sentence: str,
    trained: tuple[list[str], list[tuple[str, str]]],
    tmp_path: Path,
) -> None:
    content = content_of(trained, first=True)
    change(content)
    model = with_tokenizer(tmp_path / "model", content)
    with pytest.raises(ExportError, match=sentence):
        export_to(model, "gguf", tmp_path / "model.gguf")
