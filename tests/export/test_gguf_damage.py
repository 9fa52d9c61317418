"""Damaged heads of GGUF files: a sentence, and never the last token for one that is not there."""

import re
from pathlib import Path
from typing import Any

import pytest

from bitfold.errors import CheckpointError
from bitfold.export.gguf_config import config_of
from bitfold.export.gguf_reading import GgufFile, GgufTensor, open_gguf
from bitfold.export.gguf_vocabulary import tokenizer_files
from bitfold.report.describe import describe

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

FILE = Path("some.gguf")
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
SPECIAL = ("bos", "eos", "unknown", "padding")
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]},
    "llama": {"tokenizer.ggml.scores": [0.0] * len(TOKENS)},
}


def head(kind: str, **ids: Any) -> dict[str, Any]:
    """What a file says of its vocabulary. ids: of special tokens."""
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        **KINDS[kind],
        **{f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()},
    }


def model(**ids: Any) -> GgufFile:
    """A file of a tiny Llama, as far as its config goes."""
    sizes = {
        **{"block_count": 0, "embedding_length": 8, "feed_forward_length": 8, "context_length": 9},
        **{"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5},
    }
    said = {f"llama.{key}": value for key, value in sizes.items()}
    embeddings: Any = None
    name = "token_embd.weight"
    tensors = {name: GgufTensor(name, "F32", (len(TOKENS), 8), embeddings)}
    return GgufFile(
        FILE, {"general.architecture": "llama", **said, **head("llama", **ids)}, tensors
    )


@pytest.mark.parametrize("none", [-1, 2**32 - 1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_there(kind: str, none: int | None) -> None:
    """As if the file did not speak of it, which it then need not."""
    found = tokenizer_files(head(kind, **dict.fromkeys(SPECIAL, none)), FILE)
    assert found == tokenizer_files(head(kind), FILE)
    config = found["tokenizer_config.json"]
    assert not [key for key in config if key.endswith("_token")]
    content = found["tokenizer.json"]
    assert content["post_processor"]["special_tokens"] == {}
    assert content["model"]["unk_token"] is None
    settings = config_of(model(**dict.fromkeys(SPECIAL, none)))
    assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_there(kind: str) -> None:
    ids = dict(zip(SPECIAL, (1, 2, 0, 5), strict=True))
    found = tokenizer_files(head(kind, **ids), FILE)
    config = found["tokenizer_config.json"]
    named = [config[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")]
    assert named == ["<s>", "</s>", "<unk>", "ab"]
    assert set(found["tokenizer.json"]["post_processor"]["special_tokens"]) == {"<s>", "</s>"}
    settings = config_of(model(**ids))
    assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 5]


@pytest.mark.parametrize("odd", [-2, 6, 2**31, "one", 1.5, [1]])
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_cannot_be(kind: str, name: str, odd: Any) -> None:
    sentence = f"The vocabulary of some.gguf is damaged (its {name} token is"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        tokenizer_files(head(kind, **{name: odd}), FILE)
    if name != "unknown":
        with pytest.raises(CheckpointError, match=re.escape(sentence)):
            config_of(model(**{name: odd}))


def written(file: Path, **texts: str) -> Path:
    """A file without tensors that says texts where there should be numbers."""
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {"tokenizer.ggml.bos_token_id": "one", **texts}.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_int32("tokenizer.ggml.eos_token_id", -1)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_count_of_parts_that_is_no_number(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", split__count="two")
    with pytest.raises(CheckpointError, match=r"damaged \(its split.count is 'two', no number\)"):
        open_gguf(file)


def test_what_is_shown_of_a_damaged_head(tmp_path: Path) -> None:
    shown = describe(written(tmp_path / "a.gguf"))
    assert shown["tokenizer"]["special"] == {"padding": "<unk>"}
    file = written(tmp_path / "b.gguf", llama__block_count="few")
    with pytest.raises(CheckpointError, match=r"llama.block_count is 'few', no number"):
        describe(file)
