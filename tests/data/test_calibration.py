import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfold.assets import CALIBRATION_TEXT, DEMO_MODEL
from bitfold.data import default_sequence_length, load_calibration, read_text, tokenize, windows
from bitfold.errors import DataError
from bitfold.runtime.load import load_tokenizer

VOCAB = 4096
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TEXT = CALIBRATION_TEXT.read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture
def chat_tokenizer():
    tokenizer = load_tokenizer(DEMO_MODEL)
    tokenizer.chat_template = CHAT
    return tokenizer


def calibrate(files, tokenizer, samples=4, sequence_length=16, seed=0, vocab_size=VOCAB):
    return load_calibration(
        files,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        vocab_size=vocab_size,
    )


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# --- text ---


def test_text_is_cut_in_consecutive_windows_and_drawn_by_seed(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", TEXT)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    every = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]

    first = calibrate([path], tokenizer)
    assert first.tokens.dtype == torch.int64
    assert first.tokens.shape == (4, 16)
    assert first.notes == ()
    places = [every.index(row) for row in first.tokens.tolist()]
    assert places == sorted(places)
    assert first.sha256 == hashlib.sha256(first.tokens.numpy().tobytes()).hexdigest()
    assert "a.txt" in first.source
    assert "\n" not in first.source

    assert calibrate([path], tokenizer).sha256 == first.sha256
    assert calibrate([path], tokenizer, seed=1).sha256 != first.sha256


def test_all_windows_are_used_with_a_note_where_there_are_fewer(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", TEXT)
    n = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) // 16
    calibration = calibrate([path], tokenizer, samples=1000)
    assert calibration.tokens.tolist() == windows(tokenize(TEXT, tokenizer), 16).tolist()
    assert calibration.notes == (f"a.txt: {n} samples where 1000 were asked for: all are used",)


def test_without_files_the_embedded_text_is_used_and_said(tokenizer):
    calibration = calibrate([], tokenizer, samples=128, sequence_length=256)
    assert calibration.tokens.shape == (128, 256)
    assert "embedded" in calibration.notes[0]
    same = calibrate([CALIBRATION_TEXT], tokenizer, samples=128, sequence_length=256)
    assert same.sha256 == calibration.sha256
    assert same.notes == ()


def test_text_files_and_json_lines_are_joined(tmp_path, tokenizer):
    a = write(tmp_path / "a.txt", "One two three. " * 10)
    lines = [json.dumps({"text": "Four\u2028five. " * 10}), "", json.dumps({"text": "Six. " * 10})]
    b = write(tmp_path / "b.JSONL", "\n".join(lines))
    calibration = calibrate([a, b], tokenizer, samples=999)
    whole = "\n\n".join(["One two three. " * 10, "Four\u2028five. " * 10, "Six. " * 10])
    assert calibration.tokens.tolist() == windows(tokenize(whole, tokenizer), 16).tolist()


def test_messages_go_through_the_chat_template(tmp_path, chat_tokenizer):
    messages = [{"role": "user", "content": "hello " * 20}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    calibration = calibrate([path], chat_tokenizer, samples=99)
    whole = f"[user] {'hello ' * 20}\n"
    assert calibration.tokens.tolist() == windows(tokenize(whole, chat_tokenizer), 16).tolist()


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_text(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")) == "abc"


def test_tokenizing_a_long_text_is_silent(tokenizer, capfd):
    assert tokenize("word " * 2000, tokenizer).numel() > tokenizer.model_max_length
    assert capfd.readouterr() == ("", "")


def test_default_sequence_length():
    from transformers import LlamaConfig, OPTConfig

    assert default_sequence_length(LlamaConfig(max_position_embeddings=131072)) == 2048
    assert default_sequence_length(OPTConfig(max_position_embeddings=512)) == 512


# --- arrays ---


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u2"])
def test_rows_of_an_array_are_cut(tmp_path, tokenizer, dtype):
    ids = np.arange(6 * 20).reshape(6, 20).astype(dtype)
    calibration = calibrate([saved(tmp_path / "a.npy", ids)], tokenizer)
    assert calibration.tokens.tolist() == ids[:4, :16].tolist()
    assert calibration.tokens.dtype == torch.int64
    assert calibration.notes == ()


def test_short_and_few_rows_are_used_with_notes(tmp_path, tokenizer):
    ids = np.arange(30).reshape(3, 10)
    calibration = calibrate([saved(tmp_path / "a.npy", ids)], tokenizer)
    assert calibration.tokens.tolist() == ids.tolist()
    short, few = calibration.notes
    assert "10 tokens, shorter than 16" in short
    assert "3 samples where 4 were asked for" in few


def test_arrays_follow_each_other(tmp_path, tokenizer):
    paths = [saved(tmp_path / f"{i}.npy", np.full((2, 20 + i), i)) for i in range(2)]
    assert calibrate(paths, tokenizer).tokens[:, 0].tolist() == [0, 0, 1, 1]


# --- bad input: what is given, and the words the sentence must have ---

FILES = {
    "no such file": (lambda d: d / "absent.txt", "There is no file .*absent.txt"),
    "directory": (lambda d: d, "is a directory"),
    "empty": (lambda d: write(d / "a.txt", ""), "a.txt is empty"),
    "white space": (lambda d: write(d / "a.txt", " \n"), "white space"),
    "suffix": (lambda d: write(d / "a.csv", "x"), "unknown kind.*.txt, .jsonl, .npy"),
    "not UTF-8": (lambda d: write(d / "a.txt", b"ab\xff"), r"not UTF-8 \(byte 2\).*iconv"),
    "too short": (lambda d: write(d / "a.txt", "Hello."), r"a.txt gives \d tokens.*needs 16"),
    "broken JSON": (lambda d: write(d / "a.jsonl", '{"text": "a"}\n{'), "line 2 is broken JSON"),
    "no object": (lambda d: write(d / "a.jsonl", '"text"'), "line 1 has neither 'text' nor"),
    "no field": (
        lambda d: write(d / "a.jsonl", '\n{"body": "a"}'),
        "line 2 has neither 'text' nor",
    ),
    "number": (lambda d: write(d / "a.jsonl", '{"text": 7}'), "line 1: 'text' must be a string"),
    "surrogate": (lambda d: write(d / "a.jsonl", r'{"text": "\ud800"}'), "line 1 holds half of a"),
    "no template": (lambda d: write(d / "a.jsonl", '{"messages": []}'), "line 1.*chat template"),
    "float": (lambda d: saved(d / "a.npy", np.ones((2, 16))), "float64.*must be integers"),
    "bool": (lambda d: saved(d / "a.npy", np.ones((2, 16), bool)), "bool.*must be integers"),
    "one axis": (lambda d: saved(d / "a.npy", np.arange(9)), r"shape \(9,\).*\[samples, length\]"),
    "no rows": (lambda d: saved(d / "a.npy", np.ones((0, 9), int)), r"shape \(0, 9\).*1 row"),
    "no columns": (lambda d: saved(d / "a.npy", np.ones((9, 1), int)), "2 tokens"),
    "garbage": (lambda d: write(d / "a.npy", b"garbage"), "not a plain NumPy array"),
    "truncated": (
        lambda d: write(d / "a.npy", saved(d / "b.npy", np.ones((9, 9))).read_bytes()[:200]),
        "not a plain NumPy array",
    ),
    "pickled": (
        lambda d: saved(d / "a.npy", np.array([[{}]], dtype=object)),
        "pickles are refused",
    ),
    "id too large": (
        lambda d: saved(d / "a.npy", np.full((2, 9), VOCAB)),
        "token id 4096, outside the model's vocabulary of 4096",
    ),
    "negative id": (lambda d: saved(d / "a.npy", np.full((2, 9), -1)), "token id -1"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file(tmp_path, tokenizer, case):
    make, words = FILES[case]
    with pytest.raises(DataError, match=f"(?s){words}"):
        calibrate([make(tmp_path)], tokenizer)


def test_an_archive_of_arrays(tmp_path, tokenizer):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.savez(file, ids=np.ones((2, 9), int))
    with pytest.raises(DataError, match="archive"):
        calibrate([path], tokenizer)


def test_a_chat_template_that_refuses(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(DataError, match=r"line 1: the chat template refuses.*roles must alternate"):
        calibrate([path], chat_tokenizer)


def test_kinds_and_lengths_do_not_mix(tmp_path, tokenizer):
    text = write(tmp_path / "a.txt", TEXT)
    short = saved(tmp_path / "s.npy", np.ones((2, 9), int))
    long = saved(tmp_path / "l.npy", np.ones((2, 16), int))
    with pytest.raises(DataError, match=r"cannot be mixed .a.txt, s.npy"):
        calibrate([text, short], tokenizer)
    with pytest.raises(DataError, match=r"different lengths.*s.npy 9, l.npy 16"):
        calibrate([short, long], tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"sequence_length": 1}, "sequence length of 1 is too short"),
        ({"vocab_size": 100}, r"token id \d+, but the model's vocabulary ends at 99"),
    ],
)
def test_bad_options(tokenizer, options, words):
    with pytest.raises(DataError, match=words):
        calibrate([], tokenizer, **options)
