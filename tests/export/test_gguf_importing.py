"""A GGUF file, bitfold's own or llama.cpp's, computes the same once it is imported, and damage is named."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import DEMO, TEXT, by_llama_cpp, changed, logits, small

import bitfold
from bitfold.engines.exported import compare_text
from bitfold.errors import BitfoldError, CheckpointError
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.export.reading import read_model
from bitfold.models.headers import read_json
from bitfold.numerics import QuantizedTensor
from bitfold.runtime.load import load_tokenizer

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")

import gguf

from bitfold.engines.llama_cpp import LlamaCpp

EVALUATION = Path(bitfold.__file__).parent / "assets" / "text" / "wikitext2-evaluation.txt"
# Of Llama 3: words, numbers of up to three digits; and Qwen2's, digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def same(name: str, data: np.ndarray, type: Any) -> tuple[np.ndarray, Any]:
    return data, type


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, not quantized, as a file."""
    out = tmp_path_factory.mktemp("plain") / "demo.gguf"
    export_to(DEMO, "gguf", out)
    return out


@pytest.mark.parametrize(
    "family", ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma3"]
)
def test_every_family_comes_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(family, tmp_path / "model", monkeypatch)
    export_to(model, "gguf", tmp_path / "model.gguf")
    imported = import_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert imported.notes == ()
    # A GGUF file's Mistral sees no further than its window.
    tokens = torch.arange(8 if family == "mistral" else 24) * 37 % 4096
    before, after = logits(model, tokens), logits(tmp_path / "back", tokens)
    assert float((before - after).abs().max() / before.std()) < 1e-4
    theirs, ours = read_json(model / "config.json"), read_json(tmp_path / "back" / "config.json")
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "dtype"):
        assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("scheme", ["w4a16", "w2a16", "w5a16", "w4a16g128", "w8a16g32"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_integers_come_back(scheme: str, symmetric: str, tmp_path: Path) -> None:
    bitfold.quantize(
        DEMO, tmp_path / "a", method="rtn", scheme=scheme, set=[f"weight.symmetric={symmetric}"]
    )
    export_to(tmp_path / "a", "gguf", tmp_path / "a.gguf")
    import_checkpoint(tmp_path / "a.gguf", tmp_path / "b")
    before, after = read_model(tmp_path / "a"), read_model(tmp_path / "b")
    assert set(before.names) == set(after.names)
    stored = 0
    for name in before.names:
        left, right = before.read(name), after.read(name)
        if isinstance(right, QuantizedTensor):
            assert isinstance(left, QuantizedTensor)
            assert torch.equal(left.dequantize(), right.dequantize())
            assert left.scale.shape == right.scale.shape
            stored += 1
        else:  # 8 bits asymmetric have no type there
            assert not isinstance(left, QuantizedTensor) or scheme == "w8a16g32"
    assert stored == (0 if (scheme, symmetric) == ("w8a16g32", "false") else 42)
    if symmetric == "false" and scheme in ("w4a16", "w2a16", "w5a16"):
        assert after.schemes == before.schemes


def test_tokens_come_back(plain: Path, tmp_path: Path) -> None:
    import_checkpoint(plain, tmp_path / "back")
    theirs, ours = load_tokenizer(DEMO), load_tokenizer(tmp_path / "back")
    text = TEXT + "<|endoftext|> again" + EVALUATION.read_text()[:20_000]
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert ours.all_special_tokens == theirs.all_special_tokens


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm"])
def test_ways_of_cutting_text_come_back(name: str, tmp_path: Path) -> None:
    """The demo's vocabulary after other regular expressions, with a first token put before every text."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    content = read_json(model / "tokenizer.json")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    if name != "smollm":
        cut = {"Regex": WORDS % ("{1,3}" if name == "llama-bpe" else "")}
        first = {"type": "Split", "pattern": cut, "behavior": "Isolated", "invert": False}
    steps = [first, level | {"use_regex": name == "smollm"}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"]["ignore_merges"] = name == "llama-bpe"
    bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": bos},
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(content))
    export_to(model, "gguf", tmp_path / "model.gguf")
    import_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    text = TEXT + " in 1997, 20005 of them" + EVALUATION.read_text()[:5000]
    expected = load_tokenizer(model)(text)["input_ids"]
    assert load_tokenizer(tmp_path / "back")(text)["input_ids"] == expected
    assert expected[0] == 0
    with LlamaCpp(tmp_path / "model.gguf", context=8) as engine:
        assert engine.tokenize(text, special=True) == expected


# What llama.cpp's quantizer takes for a file of that name, in the main.
MIXES = {
    "Q4_0": ("Q4_0", "Q6_K"),
    "Q4_1": ("Q4_1", "Q6_K"),
    "Q5_1": ("Q5_1", "Q8_0"),
    "Q2_K": ("Q2_K", "Q3_K"),
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K"),
    "IQ4_NL": ("IQ4_NL", "IQ4_XS"),
    "MXFP4": ("MXFP4", "Q8_0"),
    "TQ": ("TQ2_0", "TQ1_0"),
}


@pytest.mark.parametrize("mix", MIXES)
def test_what_llama_cpp_quantized_computes_what_it_computes(
    mix: str, plain: Path, tmp_path: Path
) -> None:
    usual, finer = MIXES[mix]
    file = by_llama_cpp(
        plain,
        tmp_path / "file.gguf",
        lambda name: finer if "attn_v" in name or "token_embd" in name else usual,
    )
    imported = import_checkpoint(file, tmp_path / "back")
    assert imported.types[usual] + imported.types[finer] == 5_767_168
    found = compare_text(
        lambda length: LlamaCpp(file, context=length), tmp_path / "back", EVALUATION, 2
    )
    # llama.cpp rounds inputs to 8 bits.
    assert found.difference < (0.1 if mix == "TQ" else 0.04)
    assert abs(found.perplexity_engine / found.perplexity_simulation - 1) < 0.015
    # Nothing was rounded here: every value is the one that the package gguf makes of the file's bytes.
    stored = read_model(tmp_path / "back")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    pairs = {
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
        "model.layers.2.self_attn.v_proj.weight": "blk.2.attn_v.weight",
        "model.embed_tokens.weight": "token_embd.weight",
    }
    for ours, theirs in pairs.items():
        value, tensor = stored.read(ours), reader[theirs]
        values = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
        assert np.array_equal(
            values.numpy(), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        )


def test_what_was_imported_is_exported_as_it_was(plain: Path, tmp_path: Path) -> None:
    types = {"ffn_down": "Q8_0", "ffn_up": "Q5_0"}
    file = by_llama_cpp(
        plain, tmp_path / "a.gguf", lambda n: next((t for k, t in types.items() if k in n), "Q4_0")
    )
    import_checkpoint(file, tmp_path / "b")
    export_to(tmp_path / "b", "gguf", tmp_path / "c.gguf")
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(one).tensors}
        for one in (file, tmp_path / "c.gguf")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith("blk."):
            assert after[name].tensor_type == tensor.tensor_type
            assert np.array_equal(after[name].data, tensor.data), name


def test_a_tokenizer_that_cannot_be_written_is_said(plain: Path, tmp_path: Path) -> None:
    file = changed(plain, tmp_path / "a.gguf", same, {"tokenizer.ggml.pre": "tekken"})
    imported = import_checkpoint(file, tmp_path / "b")
    assert (
        "there is no tokenizer, because it cuts text into words as 'tekken'" in imported.notes[-1]
    )
    with pytest.raises(CheckpointError, match="copy the tokenizer files"):
        load_tokenizer(tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"general.architecture": "phi3"}, "holds a 'phi3', and bitfold reads llama"),
        ({"llama.attention.head_count": None}, "does not say llama.attention.head_count"),
        ({"llama.attention.head_count": 0}, "what cannot be|does not say"),
        ({"llama.embedding_length": 128}, "token_embd.weight in .* has the shape"),
        ({"llama.block_count": 7}, "has tensors of 6 layers, but its head says 7"),
        ({"llama.block_count": 2**31}, "has tensors of 6 layers, but its head says"),
        ({"llama.rope.dimension_count": 32}, "turns 32 of 64 dimensions"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "The vocabulary of .* is damaged"),
        ({"tokenizer.ggml.bos_token_id": 99_999}, "bos token is '99999', of 4096 tokens"),
        ({"tokenizer.ggml.eos_token_id": 4096}, "The vocabulary of .* is damaged"),
        (
            {"tokenizer.ggml.merges": [1, 2]},
            "vocabulary of .* is damaged .its merges are no list of text",
        ),
        ({"tokenizer.ggml.merges": ["ab"]}, "its merge 'ab' is not of two tokens"),
        ({"tokenizer.ggml.tokens": list(range(4096))}, "its tokens are no list of text"),
    ],
)
def test_files_that_contradict_themselves(
    settings: dict[str, Any], sentence: str, plain: Path, tmp_path: Path
) -> None:
    file = changed(plain, tmp_path / "a.gguf", same, settings)
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(file, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_tensors_that_are_broken_are_named(plain: Path, tmp_path: Path) -> None:
    def infinite(name: str, data: np.ndarray, type: Any) -> tuple[np.ndarray, Any]:
        if name == "blk.1.attn_norm.weight":
            data[3] = math.inf
        return data, type

    file = changed(plain, tmp_path / "a.gguf", infinite)
    with pytest.raises(CheckpointError, match=r"blk.1.attn_norm.weight in .* is NaN or infinite"):
        import_checkpoint(file, tmp_path / "b")
    without = changed(
        plain, tmp_path / "c.gguf", lambda n, d, t: None if n == "blk.2.ffn_up.weight" else (d, t)
    )
    with pytest.raises(CheckpointError, match=r"has no blk.2.ffn_up.weight, which its llama needs"):
        import_checkpoint(without, tmp_path / "b")
    more = changed(plain, tmp_path / "d.gguf", same, more={"blk.0.attn_sinks": np.ones((1, 4))})
    with pytest.raises(CheckpointError, match=r"blk.0.attn_sinks, for which a llama has no place"):
        import_checkpoint(more, tmp_path / "b")


@pytest.mark.parametrize("kept", [2, 10, 1000, 100_000, 5_000_000])
def test_a_truncated_file_is_named(plain: Path, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(plain.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"short.gguf is (truncated or damaged|a file, but no GGUF)"
    ):
        import_checkpoint(short, tmp_path / "b")


def test_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model" * 1000)
    with pytest.raises(CheckpointError, match=r"text.gguf is a file, but no GGUF file"):
        import_checkpoint(tmp_path / "text.gguf", tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_checkpoint(tmp_path / "none", tmp_path / "b")


def test_whatever_bit_of_the_head_is_wrong_there_is_a_sentence(plain: Path, tmp_path: Path) -> None:
    """Or the model is still one; never a traceback."""
    small_head = changed(
        plain,
        tmp_path / "a.gguf",
        lambda name, data, type: (data[:1] if "embd" in name else data[..., :2], type),
        {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1]}
        | {"tokenizer.ggml.merges": ["a a"]},
    )
    content = small_head.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for place in range(4, min(len(content), 1600), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        damaged.write_bytes(flipped)
        with pytest.raises(BitfoldError):
            import_checkpoint(damaged, tmp_path / "b")
